"""The list of all kinds of mixers: the package's own, and those of installed packages.

Another package adds a kind by an entry point of the group "megahybrid.mixers" whose value is a class of `Kind`, in its
pyproject.toml

    [project.entry-points."megahybrid.mixers"]
    mine = "my_package.mine:MineKind"

Only what is installed can do so: a recipe or checkpoint names kinds by their letters, and no code.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from megahybrid.errors import UserError
from megahybrid.mixers.attention import FullAttentionKind, SlidingWindowKind
from megahybrid.mixers.gdn import GDNKind
from megahybrid.mixers.kind import Kind
from megahybrid.mixers.lte import LTEKind
from megahybrid.mixers.nsa import NSAKind

GROUP = "megahybrid.mixers"


def with_installed(own: Iterable[Kind], installed: Iterable[EntryPoint]) -> dict[str, Kind]:
    """All kinds by letter. Raises UserError for an installed one that cannot be added."""
    kinds = {kind.letter: kind for kind in own}
    for entry in sorted(installed, key=lambda entry: entry.name):
        try:
            kind = entry.load()()
            fault = _fault(kind, kinds)
        except Exception as error:  # whatever another package does must be told with its name
            fault = f"importing it fails ({type(error).__name__}: {error})"
        if fault:
            source = entry.dist.name if entry.dist else entry.value
            raise UserError(f"The installed package '{source}' has the mixer '{entry.name}', but {fault}; remove it.")
        kinds[kind.letter] = kind
    return kinds


def _fault(kind: Kind, others: dict[str, Kind]) -> str | None:
    """Why a kind cannot be added, or None."""
    if not isinstance(kind, Kind):
        return f"'{type(kind).__name__}' is no Kind"
    if len(kind.letter) != 1 or not "A" <= kind.letter <= "Z":
        return f"its letter '{kind.letter}' is not one of A to Z"
    if kind.letter in others:
        return f"its letter '{kind.letter}' is that of {others[kind.letter].title}"
    known = sections(others)
    taken = [name for name, section in kind.sections.items() if known.get(name, section) is not section]
    return f"its section 'model.{taken[0]}' is another mixer's" if taken else None


def sections(kinds: dict[str, Kind]) -> dict[str, type]:
    """The sections of all kinds by their name under `model`."""
    return {name: section for kind in kinds.values() for name, section in kind.sections.items()}


KINDS = with_installed(
    (GDNKind(), LTEKind(), SlidingWindowKind(), FullAttentionKind(), NSAKind()), entry_points(group=GROUP)
)
"""Every kind by its letter."""
