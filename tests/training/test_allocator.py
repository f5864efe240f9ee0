"""How training takes a GPU's memory."""

import os
import subprocess

import pytest

from megahybrid.config import save_config
from megahybrid.training import loop, trial
from tests.model import tiny
from tools.workers import environment, python

NAMES = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"


class JoinedError(Exception):
    """In place of the process group."""


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("begin", ["train", "trial"])
def test_before_a_group_is_joined_it_is_said_how(begin, graphs, tmp_path, monkeypatch):
    def join(*_):
        raise JoinedError(os.environ.get("PYTORCH_ALLOC_CONF"))

    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(loop.groups, "initialize", join)
    config = tiny.config("GL")
    config.data.path, config.train.cuda_graph = str(tmp_path), graphs
    save_config(config, tmp_path / "config.yaml")
    with pytest.raises(JoinedError, match=r"^None$" if graphs else r"^expandable_segments:True$"):
        loop.train(config) if begin == "train" else trial.main(tmp_path / "config.yaml", 1)


@pytest.mark.parametrize("given", [{}, {NAMES[0]: "max_split_size_mb:512"}, {NAMES[1]: "expandable_segments:False"}])
def test_memory_is_taken_in_segments_that_grow_unless_the_user_says_otherwise(given):
    program = (
        "import torch, megahybrid.training.loop; from megahybrid.config.schema import ParallelConfig\n"
        "from megahybrid.devices import prepare_allocator; prepare_allocator()\n"
        "from megahybrid.parallel import groups; groups.initialize(ParallelConfig())\n"
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    around = {name: value for name, value in environment(**given).items() if name not in NAMES or name in given}
    done = subprocess.run([python(), "-c", program], env=around, capture_output=True, text=True)
    (said,) = given.values() or ["expandable_segments:True"]
    assert done.stdout.split() == [said], done.stderr
