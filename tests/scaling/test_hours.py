"""GPU hours by the table, beside the figures of docs/performance."""

import re
from pathlib import Path
from statistics import median

import pytest

from megahybrid.config import load_config
from megahybrid.scaling.flops import flops_per_token
from megahybrid.scaling.hours import by_utilisation, tabled
from megahybrid.scaling.layouts import seconds

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
WHOLE_STEP = (ROOT / "docs/performance/whole-step.md").read_text()


def rows():
    """Recipe, tokens a sample, micro-batch, samples and tokens/s of the table of whole steps."""
    for cells in re.findall(r"^\| `(\S+)` \| ([\d,]+) \| (\d+), (\d+) \| ([\d,]+) \|", WHOLE_STEP, re.MULTILINE):
        yield cells[0], *(int(each.replace(",", "")) for each in cells[1:])


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0]}-{row[1]}")
def test_the_table_gives_the_steps_that_were_measured(row):
    """But for full attention over long samples, whose kernel computes at another rate."""
    name, length, micro, samples, speed = row
    if (name.startswith("transformer"), length) == (True, 65536):
        pytest.skip("slower than the table says")
    long = ["train.recompute=all"] if length == 65536 else []
    keys = [f"train.seq_length={length}", f"train.micro_batch_size={micro}", f"train.global_batch_size={samples}"]
    found = tabled(load_config(RECIPES / f"{name}.yaml", [*keys, *long]))
    assert found.step_seconds == pytest.approx(samples * length / speed, rel=0.04)
    assert "MFU" in found.source and found.gpu == "H100"


def test_what_is_computed_twice_is_counted_at_the_lengths_of_the_data():
    """Attention alone, all of whose layers are: at any lengths they add the forward pass but the output layer."""
    keys = ["model.pattern=(F)*24", "train.seq_length=32768", "train.micro_batch_size=4", "train.global_batch_size=4"]
    seconds = {}
    for name in ("none", "all"):
        config = load_config(RECIPES / "transformer-1.4b.yaml", [*keys, f"train.recompute={name}"])
        seconds[name] = tabled(config, lengths={512: 1.0})
    parts = flops_per_token(config, {512: 1}).parts
    layers = 1 - parts["output layer"] / sum(parts.values())
    assert seconds["all"].step_seconds / seconds["none"].step_seconds == pytest.approx(1 + layers / 3, rel=1e-6)


def test_launches_give_the_steps_that_were_measured():
    """ms a step of runs that hosts bound, on five hosts and at different times (docs/performance/small-runs.md): each
    within 60 %, in the middle within a tenth."""
    measured = {
        (2, "GL"): (16.2, 18.2, 18.6, 24.9),  # recall, which has as many layers as its pattern says
        (6, "F"): (23.6, 24.4),
        (6, "G"): (29.6, 45.8),
        (3, "GL"): (38.8,),
    }
    ratios = []
    for (count, letters), found in measured.items():
        keys = [f"model.pattern=({letters})*{count}", "model.hidden_size=96", "model.intermediate_size=256"]
        planned = tabled(load_config(RECIPES / "base/study-tiny.yaml", keys))
        assert "launches" in planned.source
        ratios += [planned.step_seconds * 1e3 / each for each in found]
    assert 0.6 < min(ratios) < max(ratios) < 1.6
    assert median(ratios) == pytest.approx(1, abs=0.1)


def test_launches_of_micro_batches_follow_one_another():
    one, four = (
        tabled(
            load_config(RECIPES / "lalte-0.4b.yaml", [f"train.micro_batch_size={size}", "train.global_batch_size=4"])
        )
        for size in (4, 1)
    )
    assert "launches" in four.source
    assert four.step_seconds == pytest.approx(80e-6 * (4 * 12 * (61 + 69) + 62))
    assert one.step_seconds < four.step_seconds / 2


def test_a_step_that_is_replayed_is_not_bound_by_its_launches():
    """4.6 ms of recall, without its data; docs/performance/small-runs.md. Its MFU at this width is a guess."""
    found = tabled(load_config(RECIPES / "recall.yaml"))
    assert found.step_seconds == pytest.approx(0.0046, rel=0.2) and "launches" not in found.source
    for elsewhere in ("parallel.pipeline=2", "parallel.zero_stage=3"):
        assert "launches" in tabled(load_config(RECIPES / "recall.yaml", [elsewhere])).source
    layout = seconds(load_config(RECIPES / "recall.yaml"), 1)
    assert layout.step == pytest.approx(found.step_seconds)


def test_hours_are_flops_by_peak_and_utilisation_and_a_start():
    config = load_config(RECIPES / "lalte-0.4b.yaml")
    flops = flops_per_token(config).training * 20480 * 2**19
    assert by_utilisation(config, 0.4, "").hours == pytest.approx((flops / (989e12 * 0.4) + 4) / 3600)
    assert by_utilisation(config, 0.4, "", "A100").hours == pytest.approx((flops / (312e12 * 0.4) + 4) / 3600)
    config.train.branch_from = "runs/trunk@16384"
    assert by_utilisation(config, 0.4, "").hours == pytest.approx((flops / (989e12 * 0.4) / 5 + 4) / 3600)
