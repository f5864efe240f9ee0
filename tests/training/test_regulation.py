"""A second regulated quantity beside LTE's: how many of a sliding window head's queries are above 0.07 in their first
channel, under the regulator of tests/mixers/gated_mean. Layouts and resumes: tests/mixers/test_a_new_kind.py."""

import json
from unittest.mock import patch

import pytest
import torch

from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.mixers import KINDS
from megahybrid.mixers.attention import SlidingWindowKind
from megahybrid.mixers.attention.module import SlidingWindowAttention
from megahybrid.model.context import Aux
from megahybrid.model.regulation import Quantity
from megahybrid.parallel import groups
from megahybrid.training import plots, report
from megahybrid.training.metrics_file import OWN_KEYS
from megahybrid.training.step_report import StepReport
from tests.mixers.gated_mean.module import GOAL, GateRegulator
from tests.training.conftest import metrics

HEADS = 4


class Volume(GateRegulator):
    name, member = "volume", "voice"

    @classmethod
    def of(cls, config, layers, device):
        return cls(layers, HEADS, config.train.seq_length, device)

    @staticmethod
    def quantities(config):
        count, weight = GateRegulator.quantities(config)
        row = "loud queries", f"{{mean:.1f}} of {config.train.seq_length}"
        return count._replace(line="{low:.0f} to {high:.0f} loud", summary=row), weight


class Watched(SlidingWindowAttention):
    """Its auxiliary loss is the heads' mean square of queries, each times its weight."""

    def forward(self, x, context, state=None):
        y, _, state = super().forward(x, context, state)
        if not context.training:
            return y, None, state
        q, _, _ = self.project(x)
        volume = q.square().mean(-1)
        loss = torch.dot(self.weight.to(volume), volume.mean(0)) / HEADS
        return y, Aux(loss, {"open": (q[..., 0] > 0.07).sum(0), "tokens": torch.tensor(len(volume))}), state


class WatchedKind(SlidingWindowKind):
    def module(self):
        return Watched

    def regulator(self):
        return Volume


def watched():
    return patch.dict(KINDS, S=WatchedKind())


@pytest.fixture(scope="module")
def of_one(tmp_path_factory, brief, text, prepared):
    """The recipe and the run of one process, what it printed, and in which step how much was counted."""
    folder = tmp_path_factory.mktemp("regulation")
    recipe, printed, counted = folder / "recipe.yaml", [], []
    recipe.write_text(brief.format(run=folder / "run", data=prepared, text=text))
    sum_over_all = StepReport.sum_over_all

    def noted(self):
        sum_over_all(self)
        counted.append(self.counts)

    from megahybrid.training.loop import train

    with watched(), patch.object(StepReport, "sum_over_all", noted):
        train(load_config(recipe, ["train.steps=8"]), printed.append)
    groups.shut_down()
    return folder, printed, counted


def test_it_stands_in_the_step_report_the_metrics_and_the_line(of_one):
    folder, printed, counted = of_one
    lines = metrics(folder / "run")
    for line, counts in zip(lines, counted, strict=True):
        assert counts["S"]["tokens"].tolist() == [[512]] and len(counts["L"]["kept"]) == 2  # 8 sequences; LTE layers
        assert line["open"] == (counts["S"]["open"] / 8).tolist()
        assert {"retention_loss", "volume_loss", "kept", "lambda"} <= line.keys()
    assert lines[0]["volume_loss"] == 0 and all(line["volume_loss"] != 0 for line in lines[1:])
    weight = torch.zeros(HEADS)
    for line in lines:
        weight += torch.tensor([0.25 if loud > GOAL * 64 else -0.125 for loud in line["open"][0]])
        assert line["gate_weight"] == [weight.tolist()]
    assert len({value for line in lines for value in line["open"][0]}) > 8 and len(set(lines[-1]["gate_weight"][0])) > 1
    assert f" · {min(lines[-1]['open'][0]):.0f} to {max(lines[-1]['open'][0]):.0f} loud · " in printed[-1]
    assert " a head · " in printed[-1]


def test_a_line_has_the_keys_that_are_known(of_one):
    regulated = {"retention_loss", "volume_loss", "kept", "lambda", "open", "gate_weight"}
    lines = map(json.loads, (of_one[0] / "run" / "metrics.jsonl").read_text().splitlines())
    assert set().union(*lines) == regulated | OWN_KEYS - {"mfu", "memory_bytes"}  # of GPUs


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("name", "retention", "The mixer 'S' regulates 'retention_loss', which"),
        ("quantities", lambda config: [Quantity("kept", "")], "regulates 'kept', which"),
        ("quantities", lambda config: [Quantity("step", "")], "regulates 'step', which"),
        ("quantities", lambda config: [Quantity("probe_gain", "")], "regulates 'probe_gain', which"),
    ],
)
def test_keys_of_others_are_refused(attribute, value, said, of_one, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Volume, attribute, value)
    with watched():
        assert main(["train", str(of_one[0] / "recipe.yaml"), f"run.dir={tmp_path}"]) == 2
    assert said in capsys.readouterr().err


def test_a_checkpoint_from_before_there_was_a_regulator_is_refused(of_one, tmp_path, monkeypatch, capsys):
    command = ["train", str(of_one[0] / "recipe.yaml"), f"run.dir={tmp_path}"]
    assert main([*command, "train.steps=1"]) == 0
    with watched():
        assert main([*command, "train.steps=2"]) == 2
    assert "knows nothing of what the mixer 'S' regulates" in capsys.readouterr().err


def test_an_auxiliary_loss_needs_a_regulator(of_one, tmp_path, capsys):
    class Alone(WatchedKind):
        def regulator(self):
            return None

    with patch.dict(KINDS, S=Alone()), patch.object(Watched, "weight", torch.ones(HEADS), create=True):
        assert main(["train", str(of_one[0] / "recipe.yaml"), f"run.dir={tmp_path}"]) == 2
    assert "The mixer 'S' gives an auxiliary loss, but no regulator" in capsys.readouterr().err


def test_what_is_not_counted_is_named(of_one, tmp_path, monkeypatch, capsys):
    forward = Watched.forward

    def forgetful(self, x, context, state=None):
        y, aux, state = forward(self, x, context, state)
        return y, aux and aux._replace(counts={"open": aux.counts["open"]}), state

    monkeypatch.setattr(Watched, "forward", forgetful)
    with watched():
        assert main(["train", str(of_one[0] / "recipe.yaml"), f"run.dir={tmp_path}"]) == 2
    assert "The mixer 'S' counts no 'tokens', which its regulator declares; give it" in capsys.readouterr().err


def test_it_is_drawn_and_summed_up(of_one):
    folder = of_one[0]
    with watched():
        names = [path.name for path in plots.plot_run(folder / "run")]
        text = report.summarise(folder / "run")
        quantities = Volume.quantities(load_config(folder / "run" / "config.yaml"))
    assert names[2:] == ["retention.png", "retention-heads.png", "volume.png", "volume-voices.png"]
    lines = report.read_metrics(folder / "run")
    mean = sum(value for line in lines for value in line["open"][0]) / (HEADS * len(lines))
    assert f"loud queries       {mean:.1f} of 64" in text and "; buffer size 8" in text
    upper, lower = plots.panels_figure(lines, [2], quantities, "voice").axes
    drawn = {line.get_label(): line.get_ydata() for line in upper.get_lines()}
    assert set(drawn["goal 25.6"]) == {GOAL * 64} and "voice 3" in drawn
    assert lower.get_yscale() == "linear" and lower.get_ylim()[0] < 0 == upper.get_ylim()[0]
    assert list(lower.get_lines()[1].get_ydata()) == [line["gate_weight"][0][1] for line in lines]
