import pytest

from megahybrid.config.pattern import parse_pattern
from megahybrid.errors import UserError


@pytest.mark.parametrize(
    ("text", "letters", "starts"),
    [
        ("(GL)*3", "GLGLGL", ()),
        ("G(SF)*2", "GSFSF", ()),
        ("(GL)*2|(GL)*4", "GL" * 6, (4,)),
        ("((GGGF)*2|)*1GS", "GGGFGGGFGS", (8,)),
        (" G L\n| G ", "GLG", (2,)),
        ("(G(L)*2)*2", "GLLGLL", ()),
    ],
)
def test_patterns_expand(text, letters, starts):
    pattern = parse_pattern(text)
    assert pattern.letters == letters
    assert pattern.stage_starts == starts


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(GX)*2", "unknown letter 'X'"),
        ("(GL*2", "unknown letter '*'"),
        ("(GL", "without its ')'"),
        ("GL)", "without a '('"),
        ("(GL)*", "a number from 1"),
        ("(GL)*0", "a number from 1"),
        ("", "no layers"),
        ("|GL", "empty pipeline stage"),
        ("G||L", "empty pipeline stage"),
    ],
)
def test_bad_patterns_are_refused(text, reason):
    with pytest.raises(UserError) as caught:
        parse_pattern(text)
    assert reason in str(caught.value)


def test_layers_of_a_letter():
    assert parse_pattern("(GL)*3").layers("L") == [1, 3, 5]
