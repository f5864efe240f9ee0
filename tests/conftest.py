"""Options and surroundings of all tests."""

import os

# Before torch is imported: pytest-xdist's processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, those of its own library when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def poisoned_memory():
    """What is left unwritten is NaN; `pytestmark` asks for it, or a fixture."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that are marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The files that take minutes are in the last folders: begun last, one would keep a single core busy to the end.
    items.sort(key=lambda item: item.path, reverse=True)
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="runs only with --slow"))
