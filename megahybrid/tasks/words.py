"""Words that keys and names are made of. Changing a list changes the samples of every task that draws from it."""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    able amber ample ancient angry arctic ashen autumn awake azure bare basic beige bitter blank bleak blond
    blue blunt bold brave brief bright brisk broad broken bronze brown busy calm candid careful casual cheap
    chilly civil clean clear clever cloudy clumsy coarse cold common cosmic cozy cracked crimson crisp crooked
    cruel curious curly damp dark dear deep dense dim distant dizzy double dry dull dusty eager early earnest
    eastern easy elder elegant empty endless equal exact faint fair famous fancy fast feeble fierce final fine
    firm flat fluffy foggy formal fragile frank free fresh friendly frosty frozen full fuzzy gentle giant glad
    gloomy golden good grand gray great green grim gritty hairy handy happy hard harsh hasty hazy heavy hidden
    high hollow honest hot huge humble hungry icy ideal idle inner iron ivory jagged jolly keen kind large late
    lazy lean level light little lively local lonely long loose loud lovely low loyal lucky lunar mad marble
    mellow merry mild misty modern modest moist muddy mute narrow neat new nimble noble noisy northern novel
    oaken odd old olive open orange outer pale patient plain pleasant polite poor prime private proud pure
    purple quick quiet rapid rare raw ready red regal remote rich rigid ripe rough round royal rude rural rusty
    sacred sad safe salty sandy scarlet secret severe shallow sharp shiny short shy silent silky silver simple
    sleepy slim slow small smooth snowy sober soft solar solid sour southern spare steady steep stern still
    stormy strange strict strong sturdy subtle sudden sunny sweet swift tall tame tender thick thin tidy tiny
    tired tough tricky vast velvet violet vivid warm wary western wet white wide wild windy wise wooden yellow
    young zesty
    """
)

NOUNS = _words(
    """
    acorn actor anchor anvil apple apron arch arrow attic badge bagel balcony ballad banjo banner barley barn
    barrel basin basket beacon bean bear beetle bell bench berry birch blanket blossom boat bolt bonnet book
    boot bottle boulder bowl branch bread brick bridge broom brush bucket buffalo bugle butter button cabin
    cable camel candle canoe canyon carpet carrot castle cedar cellar cherry chimney cider circus cliff clock
    clover coat cobbler coin comet compass copper cottage cotton cradle crane crater cricket crown crystal cup
    curtain daisy dancer desert desk diamond dolphin donkey door dragon drum duck eagle easel elbow ember engine
    falcon farmer feather fence ferry fiddle field flag flame flute forest fossil fountain fox garden garlic
    gate ginger glacier glove goat goose granite grape guitar hammer harbor harp hat hawk hazel hedge helmet
    heron hill honey hook horse island jacket jar jewel jungle kettle kite kitten ladder lagoon lake lantern
    lemon lens letter lily lizard lobster locket lumber magnet mango mantle maple marsh mason meadow melon mill
    mirror mitten monkey moon moose mountain museum needle nest nickel nutmeg oak oasis ocean onion orbit
    orchard otter owl paddle palace panther paper parrot pasture peach pebble pencil pepper piano pigeon pillow
    pilot pine pirate planet plaza plum pocket pond pony poppy potato prairie pumpkin puzzle quartz quilt rabbit
    raft raven reef ribbon river robin rocket rooster rope rose saddle sailor salmon school scooter seagull
    shelf shell shovel sled slipper sparrow spider spoon squirrel stable star statue stove stream sugar summit
    swan table tailor teapot temple thimble thunder ticket tiger timber tower tractor trumpet tulip tunnel
    turnip turtle umbrella valley vase village violin wagon walnut walrus window winter wizard wolf zebra
    """
)

FIRST_NAMES = _words(
    """
    Ada Agnes Alan Alice Amos Anna Arthur Basil Beth Boris Bruno Carl Carmen Cecil Clara Colin Cora Cyril Daisy
    David Diana Doris Edgar Edith Elena Elmer Emma Erik Esther Eva Felix Flora Frank Frida George Gloria Grace
    Gustav Hanna Harold Hazel Helen Henry Hugo Ida Igor Inga Iris Ivan Jack Jane Jasper Joan Jonas Judith Julia
    Karl Kate Kurt Laura Leo Lily Linda Louis Lucy Luke Mabel Marco Maria Martin Max Mira Mona Nadia Ned Nina
    Nora Olga Oscar Otto Pamela Paul Peter Petra Ralph Rita Robin Rosa Ruth Sam Sara Silas Simon Sofia Stella
    Theo Thomas Tina Vera Victor Walter Wanda
    """
)

_BEGINNINGS = _words(
    """
    Alder Ash Beck Black Brad Bright Burn Cald Car Clay Cran Dal Dray East El Fair Farn Glen Gran Hal Har Hart
    Haw Holl Kings Lang Lock Marl Mel Nor Oak Pen Pres Rad Red Rock Sand Shel Stan Stock Thorn Wal Wen West
    White Win Wood York
    """
)

_ENDINGS = _words(
    """
    bury by croft dale den field ford gate ham hill hurst land ley man mere more ridge shaw stead ston ton wick
    win worth
    """
)

LAST_NAMES = tuple(first + second for first in _BEGINNINGS for second in _ENDINGS)
