"""Options and surroundings of all tests."""

import os
import shutil
import tempfile

# Before torch is imported: pytest-xdist's processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tools.workers import Workers, let_go, python

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined, those of its own library when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def shared_gpu(request: pytest.FixtureRequest):
    """Several processes test on one GPU: what a test has used goes back to it."""
    yield
    if request.config.getoption("--gpu"):
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def workers():
    """Processes for the tests of a file."""
    pool = Workers()
    yield pool
    pool.close()


@pytest.fixture
def poisoned_memory():
    """What is left unwritten is NaN; `pytestmark` asks for it, or a fixture."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that are marked slow")
    parser.addoption("--gpu", action="store_true", help="run the tests that use a GPU, on one, and no others")
    parser.addoption("--fuzz", type=float, default=10, metavar="SECONDS", help="of each op's fuzz, which is slow (10)")
    parser.addoption("--fuzz-seed", type=int, default=0, metavar="SEED", help="of its first case, one more each (0)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--gpu") and not torch.cuda.is_available():
        raise pytest.UsageError("torch sees no GPU here; run --gpu on a host that has one.")
    if "MEGAHYBRID_FORKS" not in os.environ and not torch.cuda.is_available():
        # For tools/workers.py; pytest-xdist's processes inherit it from the first.
        os.environ["MEGAHYBRID_FORKS"] = folder = tempfile.mkdtemp(prefix="megahybrid-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    config.add_cleanup(let_go)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list) -> None:
    """Its processes, too, have everything imported."""
    for spec in specs:
        spec.python = python()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name.endswith(("_triton.py", "_on_a_gpu.py")):
            item.add_marker("gpu")
        if item.path.name.endswith("_on_a_gpu.py"):
            item.add_marker("most_memory")
    # The files that take minutes are in the last folders: begun last, one would keep a single core busy to the end.
    items.sort(key=lambda item: item.path, reverse=True)
    if config.getoption("--gpu"):
        items[:] = [item for item in items if "gpu" in item.keywords]
    for item in items:
        if "slow" not in item.keywords:
            continue
        if "lab" in item.fixturenames:
            item.add_marker("alone")
        if not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="runs only with --slow"))
