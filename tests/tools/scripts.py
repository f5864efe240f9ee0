"""Programs of tools/ that have no .py, as modules."""

import importlib.machinery
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def loaded(name: str) -> Iterator[ModuleType]:
    """For a fixture: the program, which finds its neighbours as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        loader = importlib.machinery.SourceFileLoader(name, str(TOOLS / name))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
        loader.exec_module(module)
        yield module
