import itertools
import json
import math

import pytest
import torch

from megahybrid.cli import main
from megahybrid.config.schema import SkipConfig
from megahybrid.errors import UserError
from megahybrid.model.stack import Stack, StackOutput
from megahybrid.training.guard import StepGuard
from tests.training.conftest import metrics


def settled(**options) -> StepGuard:
    """A guard that has seen losses of 2.0 ± 0.1 and gradient norms of 1.0 ± 0.1."""
    guard = StepGuard(SkipConfig(window=10, **options))
    for step in range(10):
        sign = 1 if step % 2 else -1
        guard.record(2.0 + 0.1 * sign, 1.0 + 0.1 * sign, None)
    return guard


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_not_finite_is_left_out(loss, norm):
    assert "is" in StepGuard(SkipConfig()).reason(loss, norm)
    assert not on_device(StepGuard(SkipConfig()), loss, norm)


def on_device(guard: StepGuard, loss: float, norm: float) -> bool:
    """What the device decides, which has to be what the host says afterwards."""
    fine, void = (torch.tensor([loss, norm, 0, left_out], dtype=torch.float64) for left_out in (0, 1))
    accepted = not guard.refuses(fine)
    assert guard.refuses(void) and accepted == (guard.reason(loss, norm) is None)
    return accepted


def test_spikes_are_left_out_only_if_asked_for_and_only_beyond_sigma():
    assert settled().reason(100.0, 100.0) is None
    guard = settled(spikes=True, sigma=6)
    assert guard.reason(2.59, 1.59) is None
    assert "its loss is 2.61" in guard.reason(2.61, 1.0)
    assert "its gradient norm is 1.61" in guard.reason(2.0, 1.61)
    assert guard.reason(0.5, 0.1) is None  # lower is no spike
    found = [on_device(guard, *each) for each in ((2.59, 1.59), (2.61, 1.0), (2.0, 1.61), (0.5, 0.1))]
    assert found == [True, False, False, True]


def test_no_spike_before_the_window_is_full():
    guard = StepGuard(SkipConfig(window=10, spikes=True))
    guard.record(2.0, 1.0, None)
    assert guard.reason(100.0, 100.0) is None


def test_many_in_a_row_stop_the_run_and_an_accepted_step_starts_the_count_again():
    guard = StepGuard(SkipConfig(most_in_a_row=2))
    for _ in range(3):
        guard.record(math.nan, 1.0, "its loss is nan")
        guard.record(math.nan, 1.0, "its loss is nan")
        guard.record(1.0, 1.0, None)
    assert guard.skipped == 6
    guard.record(math.nan, 1.0, "its loss is nan")
    guard.record(math.nan, 1.0, "its loss is nan")
    with pytest.raises(UserError, match="3 steps in a row had to be left out, the last because its loss is nan"):
        guard.record(math.nan, 1.0, "its loss is nan")


def test_a_left_out_spike_does_not_enter_the_window():
    guard = settled(spikes=True)
    guard.record(50.0, 1.0, guard.reason(50.0, 1.0))
    assert guard.reason(2.61, 1.0) is not None


def test_state_survives():
    guard, other = settled(spikes=True), StepGuard(SkipConfig(window=10, spikes=True))
    guard.record(math.inf, 1.0, "its loss is inf")
    other.load_state(guard.state())
    assert (other.skipped, other.in_a_row) == (1, 1)
    assert other.reason(2.61, 1.0) == guard.reason(2.61, 1.0)


def spoilt(out: StackOutput) -> StackOutput:
    """Loss and reported losses as NaN."""
    return out._replace(loss=out.loss * math.nan, losses=out.losses * math.nan)


FAULTS = list(itertools.product(("fp32", "bf16"), ("loss", "gradient", "spike"), (1, 2, 3)))
USUAL = {
    ("fp32", "loss", 1),
    *(("bf16", "spike", n) for n in (1, 2, 3)),
}


@pytest.mark.parametrize(
    ("dtype", "fault", "stage"),
    [pytest.param(*each, marks=[] if each in USUAL else [pytest.mark.slow]) for each in FAULTS],
)
def test_a_bad_step_changes_no_weight_and_is_counted(stage, dtype, fault, recipe, tmp_path, monkeypatch):
    """Step 3 turns out NaN, or a spike, which DeepSpeed would take; the weights after it are those after step 2.

    Gone on from after it, AdamW has counted two steps: step 4 has the same outcome.
    """
    real, calls = Stack.forward, []

    def forward(self, *arguments, **options):
        out = real(self, *arguments, **options)
        if torch.is_grad_enabled():
            calls.append(None)
        if torch.is_grad_enabled() and len(calls) == 5:  # the first of the third step's two micro-batches
            if fault == "loss":
                return spoilt(out)
            factor = 1e6 if fault == "spike" else math.inf
            out.loss.register_hook(lambda gradient: gradient * factor)
        return out

    monkeypatch.setattr(Stack, "forward", forward)
    overrides = [f"parallel.zero_stage={stage}", "checkpoint.every=1", "checkpoint.keep=4", "train.steps=4"]
    overrides += ["train.skip.spikes=true", "train.skip.window=2", "train.skip.sigma=1000"]
    command, run = ["train", str(recipe), f"train.dtype={dtype}", *overrides], tmp_path / "run"

    def weights(step):
        return (run / "checkpoints" / f"step_0000000{step}" / "weights-00000.safetensors").read_bytes()

    assert main(command) == 0
    uninterrupted, last = metrics(run), weights(4)
    assert [line["skipped"] for line in uninterrupted] == [0, 0, 1, 1]
    assert weights(2) == weights(3) != last
    assert main([*command, "train.resume_from=3"]) == 0
    assert weights(4) == last
    assert json.dumps(metrics(run)) == json.dumps(uninterrupted)  # NaN is not equal to itself


def test_a_run_of_bad_steps_ends_with_one_sentence(recipe, tmp_path, monkeypatch, capsys):
    real = Stack.forward
    monkeypatch.setattr(Stack, "forward", lambda *a, **o: spoilt(real(*a, **o)))
    assert main(["train", str(recipe), "train.skip.most_in_a_row=3"]) == 2
    assert "4 steps in a row had to be left out" in capsys.readouterr().err
    assert '"state": "failed"' in (tmp_path / "run" / "status.json").read_text()
