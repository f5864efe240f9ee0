"""Samples of text: as long as they may be, needles and answers where they say, and what cannot be made."""

from __future__ import annotations

import re

import numpy as np
import pytest

from megahybrid.errors import UserError
from megahybrid.tasks import TASKS, Vocabulary
from megahybrid.tasks.draws import Draws
from megahybrid.tasks.haystack import Prose, prose
from megahybrid.tasks.words import ADJECTIVES, NOUNS
from tests.tasks.texts import FAITHFUL, byte_level, bytes_alone, few_letters, lower_case, over_spaces, prose_text

TEXT = [name for name, task in TASKS.items() if task.text]
PROSE = [name for name in TEXT if hasattr(TASKS[name].parameters(), "haystack")]
ONE_NEEDLE = [name for name in TEXT if TASKS[name].has_depth]
MADE = {name: make() for name, make in FAITHFUL.items()}


def vocabulary_of(tokenizer):
    return Vocabulary(tokenizer.vocab_size, tokenizer.document_id, tokenizer)


def parameters_of(name, haystack, **given):
    if name in PROSE:
        given.setdefault("haystack", haystack)
    return TASKS[name].parameters(**given)


def make(name, haystack, length, tokenizer, index=0, depth=None, **given):
    task, parameters, vocabulary = TASKS[name], parameters_of(name, haystack, **given), vocabulary_of(tokenizer)
    task.check(parameters, length, vocabulary)
    return task.sample(parameters, length, vocabulary, Draws("test", name, index), depth)


@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize("tokenizer", FAITHFUL)
@pytest.mark.parametrize("name", TEXT)
def test_what_every_sample_has(name, tokenizer, length, haystack):
    tokenizer = MADE[tokenizer]
    if name == "vt" and tokenizer is MADE["bytes_alone"] and length < 8192:
        pytest.skip("has no room for the example")
    sample = make(name, haystack, length, tokenizer)
    assert sample.tokens[0] == tokenizer.document_id and tokenizer.document_id not in sample.tokens[1:]
    text = tokenizer.decode(sample.tokens[1:].tolist())
    assert tokenizer.encode(text) == sample.tokens[1:].tolist()
    prompt = tokenizer.decode(sample.tokens[1 : sample.prompt].tolist())
    assert text == " ".join([prompt, *(answer.text for answer in sample.answers)])
    assert tokenizer.encode(prompt) == sample.tokens[1 : sample.prompt].tolist()
    for answer in sample.answers:
        assert answer.span.begin >= sample.prompt
        assert tokenizer.decode(sample.tokens[slice(*answer.span)].tolist()).strip() == answer.text
        assert len(answer.needles) == prompt.count(answer.text) > 0
        for needle in answer.needles:
            assert needle.end <= sample.prompt
            assert answer.text in tokenizer.decode(sample.tokens[slice(*needle)].tolist())
            # No token less would do.
            for fewer in (slice(needle.begin + 1, needle.end), slice(needle.begin, needle.end - 1)):
                assert answer.text not in tokenizer.decode(sample.tokens[fewer].tolist())


@pytest.mark.parametrize("length", [512, 1024, 4096, 32768])
@pytest.mark.parametrize("name", TEXT)
def test_as_much_haystack_as_the_length_has_room_for(name, length, haystack):
    tokenizer, task = MADE["byte_level"], TASKS[name]
    vocabulary = vocabulary_of(tokenizer)
    parameters = parameters_of(name, haystack, **({"example": False} if name == "vt" else {}))
    for index in range(3):
        sample = task.sample(parameters, length, vocabulary, Draws("test", name, index))
        draft = task.draft(parameters, length, vocabulary, Draws("test", name, index), None)
        units = sample.facts["units"]

        def needed(units, draft=draft):
            return 1 + len(tokenizer.encode(draft.prompt(units))) + task.generated

        assert sample.prompt + task.generated == needed(units) <= length
        mean = (needed(units) - needed(draft.fewest)) / max(units - draft.fewest, 1)
        # Of words, that are short, not the last is looked for.
        assert length - needed(units) < mean + 1 or needed(units + 1) > length


@pytest.mark.parametrize("name", TEXT)
def test_the_draws_alone_decide(name, haystack):
    first, again, other = (make(name, haystack, 4096, MADE["byte_level"], index) for index in (0, 0, 1))
    assert np.array_equal(first.tokens, again.tokens) and first.answers == again.answers
    assert first.facts == again.facts
    assert not np.array_equal(first.tokens, other.tokens)


@pytest.mark.parametrize("name", ONE_NEEDLE)
def test_deeper_needles_stand_later(name, haystack):
    depths = [0.0, 0.1, 0.35, 0.5, 0.8, 1.0]
    samples = [make(name, haystack, 4096, MADE["byte_level"], depth=depth) for depth in depths]
    places = [sample.answers[0].needles[0].begin / sample.prompt for sample in samples]
    assert len({sample.answers[0].text for sample in samples}) == 1
    assert places == sorted(set(places))
    # What stands before and behind the haystack takes a part of both ends.
    assert np.abs(np.array(places) - depths).max() < 0.08


def test_one_needle_is_asked_in_these():
    assert [*TASKS][3:] == TEXT and set(TEXT) - set(ONE_NEEDLE) == {"niah_multivalue", "niah_multiquery", "vt"}


@pytest.mark.parametrize("name", ["niah_multivalue", "niah_multiquery", "vt"])
def test_many_needles_are_spread_whatever_the_depth(name, haystack):
    first, last = (make(name, haystack, 4096, MADE["byte_level"], depth=depth) for depth in (0.0, 1.0))
    assert np.array_equal(first.tokens, last.tokens)


def test_depths_that_are_drawn_are_rulers_forty(haystack):
    """Of single_2 the share of sentences before the needle."""
    task, vocabulary = TASKS["niah_single_2"], vocabulary_of(MADE["byte_level"])

    def sentences(text):
        return len(re.findall(r"[.?!][\")]?(?= |$)", text)) + bool(re.search(r"[^.?!\")]$", text))

    seen, total = set(), sentences(" ".join(prose_text(6000).split()[:2000]))
    for index in range(400):
        draft = task.draft(parameters_of("niah_single_2", haystack), 3000, vocabulary, Draws(index), None)
        seen.add(sentences(draft.prompt(2000).split("\n")[1].partition("One of the special")[0].strip()))
    assert seen == {int(total * (round(100 * step / 39) / 100)) for step in range(40)}


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3", "niah_multiquery", "phonebook"])
def test_all_keys_and_values_differ(name, haystack):
    tokenizer = MADE["byte_level"]
    for index in range(5):
        sample = make(name, haystack, 16384, tokenizer, index)
        text = tokenizer.decode(sample.tokens[1 : sample.prompt].tolist())
        pattern = (
            r"^(.+): (\d{3}-\d{3}-\d{4})$"
            if name == "phonebook"
            else r"numbers? for (\S+) is: (\d{7})\.|uuids for (\S+) is: (\S{36})\."
        )
        found = [tuple(filter(None, each)) for each in re.findall(pattern, text.split("\n\n")[0], re.MULTILINE)]
        assert len(found) > (3 if name == "niah_multiquery" else 100)
        assert len({key for key, _ in found}) == len({value for _, value in found}) == len(found)
        assert len({answer.text for answer in sample.answers}) == len(sample.answers)


def test_variables_are_a_chain_in_the_order_of_the_answers():
    tokenizer = MADE["byte_level"]
    for index in range(20):
        sample = make("vt", None, 4096, tokenizer, index, hops=6, example=False)
        names = [answer.text for answer in sample.answers]
        text = tokenizer.decode(sample.tokens[1:].tolist())
        made = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})", text)
        assert [name for name, _ in made] == names and len(set(names)) == 7
        assert [value for _, value in made[1:]] == names[:-1] and f"value {made[0][1]}, they are:" in text
        assert [len(answer.needles) for answer in sample.answers] == [2] * 6 + [1]


def test_units_end_where_words_do_and_noise_outnumbers_assignments():
    vocabulary = vocabulary_of(MADE["byte_level"])
    words = TASKS["niah_multikey_2"]
    draft = words.draft(words.parameters(), 3_000_000, vocabulary, Draws("many"), None)
    assert draft.most == len(ADJECTIVES) * len(NOUNS) - 1
    tracking = TASKS["vt"]
    assert tracking.draft(tracking.parameters(hops=7), 4096, vocabulary, Draws("few"), None).fewest == 9


@pytest.mark.parametrize("tokenizer", ["byte_level", "threes", "sentence_pieces"])
def test_the_example_of_variable_tracking_takes_500_tokens_at_most(tokenizer):
    tokenizer = MADE[tokenizer]
    sample = make("vt", None, 4096, tokenizer)
    text = tokenizer.decode(sample.tokens[1:].tolist())
    example, _ = text.split("\n\n\n\n")
    lines = example.count("The grass")
    assert lines % 5 == 0
    size = len(tokenizer.encode(example)) + 30
    line = len(
        tokenizer.encode(" The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n")
    )
    assert (size <= 500 or lines == 10) and size + 5 * line > 495
    assert re.findall(r"VAR ([A-Z]{3}) =", example) == example.split("they are:  ")[1].split()


def test_phonebook_of_so_many_people():
    tokenizer = MADE["byte_level"]
    sample = make("phonebook", None, 4096, tokenizer, people=50, examples=3)
    text = tokenizer.decode(sample.tokens[1 : sample.prompt].tolist())
    book, questions = text.split("\n\n")
    people = book.split("\n")
    *shown, asked = questions.split("\n")
    assert len(people) == 50 and len(shown) == 3 and set(shown) < set(people)
    assert f"{asked} {sample.answers[0].text}" in people
    assert make("phonebook", None, 4096, tokenizer, people=50, examples=0).prompt < sample.prompt


def test_a_haystack_that_shifts_begins_with_another_sentence(haystack):
    begins = set()
    for index in range(20):
        sample = make("niah_single_2", haystack, 2048, MADE["byte_level"], index, depth=1.0, shift=True)
        text = MADE["byte_level"].decode(sample.tokens[1:].tolist())
        context = text.split("afterwards.\n")[1].split(" One of the special")[0]
        assert context in " ".join((prose_text(6000) + " " + prose_text(6000)).split())
        begins.add(context[:100])
    assert len(begins) > 15


def test_prose_goes_round_and_needles_stand_between_sentences():
    text = Prose("x", "A b. C\n d? E f")
    assert text.between(0, 10, [], []) == "A b. C d? E f A b. C d?"
    assert text.between(4, 4, [], []) == "E f A b."
    assert text.between(0, 6, ["N.", "M."], [0.34, 1.0]) == "A b. N. C d? E f M. "
    assert text.between(0, 6, ["N."], [0.0]) == " N. A b. C d? E f"
    assert text.between(0, 6, ["N.", "M."], [0.9, 0.7]) == "A b. C d? M.  N. E f"
    assert [text.sentence_after(place) for place in range(6)] == [2, 2, 4, 4, 0, 0]


def test_a_folder_of_texts_is_read_in_the_order_of_names(tmp_path):
    for name, words in {"b.txt": "third", "a.txt": "first\n second ", "c.md": "no"}.items():
        (tmp_path / name).write_text(words)
    found = prose(str(tmp_path))
    assert found.between(0, 3, [], []) == "first second third" and found.name == tmp_path.name and len(found) == 3


@pytest.mark.parametrize("name", PROSE)
def test_results_and_identity_name_the_haystack_by_its_words(name, haystack, tmp_path):
    task = TASKS[name]
    facts = make(name, haystack, 2048, MADE["byte_level"]).facts
    digest = Prose("", prose_text(6000)).digest
    assert (facts["haystack"], facts["haystack_hash"]) == ("river.txt", digest)
    moved, other = tmp_path / "moved.txt", tmp_path / "other.txt"
    moved.write_text(prose_text(6000).replace("\n", "  "), encoding="utf-8")
    other.write_text(prose_text(6000, seed=1), encoding="utf-8")
    same, others = (task.identity(parameters_of(name, str(path))) for path in (moved, other))
    assert same == task.identity(parameters_of(name, haystack)) != others
    assert same["task"] == name and same["version"] == 1 and same["answer_weight"] == 1


@pytest.mark.parametrize(
    ("name", "given", "length", "tokenizer", "words"),
    [
        ("niah_single_1", {}, 100, byte_level, r"niah_single_1 needs \d+ tokens or more with this tokenizer, not 100"),
        ("vt", {}, 300, byte_level, r"vt needs \d+ tokens or more"),
        ("phonebook", {"people": 500}, 1000, byte_level, r"phonebook needs \d+ tokens or more"),
        ("niah_multikey_2", {}, 5, byte_level, r"needs \d+ tokens or more"),
        ("niah_single_1", {}, 4096, lower_case, "cannot write niah_single_1"),
        ("vt", {}, 8192, few_letters, "cannot write vt"),
        ("phonebook", {}, 8192, over_spaces, "cannot write phonebook"),
        ("niah_single_2", {}, 4096, byte_level, "set its parameter haystack"),
        ("niah_single_2", {"haystack": "nowhere.txt"}, 4096, byte_level, "'nowhere.txt' cannot be read"),
    ],
)
def test_what_cannot_be_made_is_refused(name, given, length, tokenizer, words):
    task = TASKS[name]
    with pytest.raises(UserError, match=words) as error:
        task.check(task.parameters(**given), length, vocabulary_of(tokenizer()))
    assert str(error.value).count("\n") == 0


@pytest.mark.parametrize("tokenizer", [byte_level, bytes_alone])
@pytest.mark.parametrize("name", TEXT)
def test_the_shortest_length_is_enough_for_every_sample(name, tokenizer, haystack):
    vocabulary, parameters, task = vocabulary_of(tokenizer()), parameters_of(name, haystack), TASKS[name]

    def refused(length):
        try:
            task.check(parameters, length, vocabulary)
        except UserError as error:
            return int(re.search(r"needs (\d+) tokens", str(error))[1])

    shortest = 50
    while needed := refused(shortest):
        shortest = needed
    if name not in ("niah_multikey_2", "niah_multikey_3", "phonebook"):  # that draw more where there is more room
        assert refused(shortest - 1) == shortest
    for index in range(100):
        sample = task.sample(parameters, shortest, vocabulary, Draws(index))
        assert len(sample.tokens) <= sample.prompt + task.generated <= shortest


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "has no words"), (b"\xff\xfe\x00", "not text in UTF-8")],
)
def test_files_that_are_no_haystack_are_refused(content, words, tmp_path):
    (tmp_path / "x.txt").write_bytes(content)
    for path in (tmp_path, tmp_path / "x.txt"):
        with pytest.raises(UserError, match=words):
            prose(str(path))


def test_a_folder_without_texts_and_a_model_without_text_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no \*.txt"):
        prose(str(tmp_path))
    with pytest.raises(UserError, match="no tokenizer of text"):
        TASKS["niah_single_1"].check(TASKS["niah_single_1"].parameters(), 4096, Vocabulary(8192, 0))
