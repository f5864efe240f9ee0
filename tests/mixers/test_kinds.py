"""The list of kinds: what an installed package may add, and how a wrong one is told."""

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import megahybrid
from megahybrid.errors import UserError
from megahybrid.mixers import KINDS
from megahybrid.mixers.gdn import GDNKind
from megahybrid.mixers.kinds import with_installed


class Mine(GDNKind):
    letter = "M"


class Lower(Mine):
    letter = "m"


class Taken(GDNKind):
    pass


class Section(Mine):
    sections = {"lte": dict}  # noqa: RUF012


def entry(name):
    return EntryPoint("mine", f"tests.mixers.test_kinds:{name}", "megahybrid.mixers")


def test_an_installed_kind_comes_after_the_packages_own():
    assert [*KINDS][:5] == [*"GLSFN"]
    kinds = with_installed(KINDS.values(), [entry("Mine")])
    assert [*kinds] == [*KINDS, "M"] and isinstance(kinds["M"], Mine)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Lower", "its letter 'm' is not one of A to Z"),
        ("Taken", "its letter 'G' is that of Gated DeltaNet"),
        ("Section", "its section 'model.lte' is another mixer's"),
        ("entry.__code__", "importing it fails (TypeError: "),
        ("Absent", "importing it fails (AttributeError: "),
    ],
)
def test_a_wrong_one_is_told_with_its_package(name, said):
    with pytest.raises(UserError) as caught:
        with_installed(KINDS.values(), [entry(name)])
    assert "'tests.mixers.test_kinds:" in str(caught.value) and said in str(caught.value)


def test_nothing_else_in_the_package_names_a_kind():
    """But for a foreign format, which has no others."""
    package = Path(megahybrid.__file__).parent
    named = re.compile(rf"(?i:\b(gdn|lte|nsa)\b)|(['\"])[{''.join(KINDS)}]\2|\([{''.join(KINDS)}]\)")
    others = (each for each in package.rglob("*.py") if package / "mixers" not in each.parents)
    texts = {each.name: each.read_text() for each in others if each.name != "reference_format.py"}
    assert len(texts) > 50 and [name for name, text in texts.items() if named.search(text)] == []
