"""Several jobs and processes on one host do not disturb each other."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace

import pytest

from megahybrid.config import save_config
from megahybrid.data import TrainingData, validation_batches
from tools.workers import environment, python

_WORKER = """
import json, os, signal, sys
import torch.distributed as dist
from megahybrid.config import load_config
from megahybrid.data import TrainingData, validation_batches

recipe, store, rank, world, mode = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
config = load_config(recipe)
data = TrainingData(config, rank, world)
steps = [[b.samples[::32].tolist() for b in data.next_step()] for _ in range(5)]
if mode == "kill":
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)
held = [i for b in validation_batches(config, rank, world) for i in b.samples[::32].tolist()]
print(json.dumps([steps, held]))
"""


def start(recipe, store, world, mode):
    """One job of `world` processes, which know their ranks from torch.distributed alone; a recipe, or one each."""
    recipes = recipe if isinstance(recipe, list) else [recipe] * world
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    surroundings = {name: value for name, value in environment().items() if name not in names}
    return [
        subprocess.Popen(
            [python(), "-c", _WORKER, str(recipes[rank]), str(store), str(rank), str(world), mode],
            env=surroundings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


@pytest.mark.slow
def test_what_one_process_finds_wrong_is_raised_on_all(corpus, tmp_path):
    config, _ = corpus
    shutil.copytree(config.data.path, tmp_path / "data")
    (tmp_path / "data" / "small" / "train" / "shard.00001.mds").unlink()
    names = [tmp_path / "whole.yaml", tmp_path / "damaged.yaml"]
    save_config(config, names[0])
    save_config(replace(config, data=replace(config.data, path=str(tmp_path / "data"))), names[1])
    for process in start(names, tmp_path / "store", 2, "end"):
        said = process.communicate(timeout=60)[1]
        assert process.returncode
        assert f"UserError: '{tmp_path}/data/small/train/shard.00001.mds' is missing" in said


@pytest.mark.slow
def test_jobs_at_the_same_time_and_after_a_killed_one(corpus, tmp_path):
    config, _ = corpus
    recipe = tmp_path / "recipe.yaml"
    save_config(config, recipe)
    for process in start(recipe, tmp_path / "store0", 2, "kill"):
        process.communicate(timeout=120)
        assert process.returncode == -9
    jobs = [start(recipe, tmp_path / f"store{i}", 2, "end") for i in (1, 2)]
    with TrainingData(config, 0, 1) as data, validation_batches(config, 0, 1) as validation:
        expected = [[int(i) for batch in data.next_step() for i in batch.samples[::32]] for _ in range(5)]
        held = [int(i) for batch in validation for i in batch.samples[::32]]
    for job in jobs:
        outputs = [json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in job]
        assert [process.returncode for process in job] == [0, 0]
        for step in range(5):
            first, second = ([i for part in output[0][step] for i in part] for output in outputs)
            assert (first, second) == (expected[step][0::2], expected[step][1::2])
        assert sorted(outputs[0][1] + outputs[1][1]) == held
