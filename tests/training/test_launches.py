"""How many launches a training step of a small model takes, counted without a GPU: none may join them unseen."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from megahybrid.config import load_config
from megahybrid.data.packing import Batch
from megahybrid.mixers import KINDS
from megahybrid.parallel import groups
from megahybrid.training import reduction
from megahybrid.training.engine import Engine
from megahybrid.training.step_report import StepReport
from megahybrid_kernels import Sequences, counter_dropout
from megahybrid_kernels.linear_cross_entropy import chunks
from tests.inference.test_launches import Launches
from tests.scaling.test_memory import use_triton

TOKENS = 16384
# Of a profiler, which AdamW has.
_MARKS = "_record_function_enter_new", "_record_function_exit"


def on_the_host(patch, owner, name):
    """Its torch ops are of the host: not counted."""
    function = getattr(owner, name)

    def uncounted(*arguments, **options):
        with _disable_current_modes():
            return function(*arguments, **options)

    patch.setattr(owner, name, uncounted)


def batch(length: int, weighted: bool) -> Batch:
    """Documents of one length."""
    tokens, count = torch.arange(TOKENS + 1) % 100, TOKENS // length
    samples, positions = torch.arange(count).repeat_interleave(length), torch.arange(length).repeat(count)
    weights = torch.ones(TOKENS) if weighted else None
    return Batch(tokens[:-1], tokens[1:], Sequences.of((length,) * count), samples, positions, weights)


@pytest.fixture
def launches_of(monkeypatch):
    """Of a step of a recipe, transfers of batches left out; warmed up, since what is kept does not count."""
    use_triton(monkeypatch)
    monkeypatch.setattr(counter_dropout, "takes_triton", lambda *_, **__: True)
    for owner, name in ((Engine, "_divisor"), (StepReport, "tell")):
        on_the_host(monkeypatch, owner, name)

    def count(recipe, length, weighted, *keys):
        samples = (f"train.{name}_batch_size={TOKENS // length}" for name in ("micro", "global"))
        config = load_config(recipe, ["train.skip.most_in_a_row=9", f"train.seq_length={length}", *samples, *keys])
        groups.initialize(config.parallel, config.train.seed)
        engine, launches = Engine(config), Launches()
        engine.initialize()
        for owner in (reduction, chunks):  # on a GPU they are one product each
            monkeypatch.setattr(owner, "add_product", lambda *_: launches.found.update(["addmm"]))
        batches = [batch(length, weighted)]
        for step in (1, 2):
            engine.step(batches, step)
        launches.found.clear()

        def stop(report, to_host=StepReport.to_host):
            launches.__exit__(None, None, None)  # all that follows is of the host
            to_host(report)

        with mock.patch.object(StepReport, "to_host", stop):
            launches.__enter__()
            engine.step(batches, 3)
        for mark in _MARKS:
            del launches.found[mark]
        groups.shut_down()
        return launches.found

    yield count
    groups.shut_down()


@pytest.mark.parametrize(
    ("recipe", "length", "weighted", "expected"),
    [("recipes/recall.yaml", 512, True, 324), ("recipes/base/study-tiny.yaml", 256, False, 329)],
)
def test_launches_of_a_step(recipe, length, weighted, expected, launches_of):
    found = launches_of(recipe, length, weighted)
    assert found.total() == expected, found


@pytest.mark.parametrize(("letter", "expected"), [("F", 37), ("S", 37), ("G", 61), ("L", 69), ("N", 62)])
def test_launches_of_a_layer(letter, expected, launches_of):
    """What `plan` takes a layer's share of the host's time from."""
    two, four = (
        launches_of("recipes/base/study-tiny.yaml", 256, False, f"model.pattern=({letter})*{count}").total()
        for count in (2, 4)
    )
    assert (four - two) / 2 == expected == KINDS[letter].launches
