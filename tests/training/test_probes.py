"""Probes equal brute force, on every layout; and in runs they come when they are due, and find the same again."""

import json
import math
import re
import time

import pytest

from megahybrid.cli import main
from megahybrid.config import load_config
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.errors import UserError
from megahybrid.tasks import TASKS, Vocabulary
from megahybrid.training import tracking
from megahybrid.training.engine import Engine
from megahybrid.training.probes.questions import questions
from megahybrid.training.probes.suite import Probes
from tests.config.test_load import QUICKSTART
from tests.training.conftest import metrics

MODULE = "tests.training.probing"
LAYOUTS = [
    {"tensor": 2},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"data": 2},
    {"data": 2, "zero_stage": 3},
    {"tensor": 2, "sequence": True, "zero_stage": 3},
    {"context": 2},
]
REPRESENTATIVE = [1, 3, 5, 7]


def numbers(value):
    return [math.nan if each is None else each for each in (value if isinstance(value, list) else [value])]


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert numbers(found[key]) == pytest.approx(numbers(value), rel=tolerance, abs=tolerance, nan_ok=True), key


@pytest.fixture(scope="module")
def by_hand(workers):
    """Of a pattern, with its window; made once."""
    made = {}

    def of(pattern, window):
        if pattern not in made:
            text, recall = (
                workers.run(1, f"{MODULE}:{name}_by_hand", pattern, window)[0] for name in ("text", "recall")
            )
            made[pattern] = text | recall
        return made[pattern]

    return of


@pytest.mark.parametrize(("pattern", "window"), [("GLSN", 8), ("GLSLF", 16)])
def test_probes_equal_brute_force(pattern, window, workers, by_hand):
    """The window is the largest of the layers', or a quarter of the sequence where they see everything."""
    found, expected = workers.run(1, f"{MODULE}:by_engine", pattern, {})[0], by_hand(pattern, window)
    assert_same(found, expected, 2e-5)


def test_the_brute_force_has_everything_to_compare(by_hand):
    found = by_hand("GLSN", 8)
    assert abs(found["probe_gain"]) > 1e-3
    for key, value in found.items():
        if "mqar" in key:
            continue
        values = [each for each in value if each is not None] if isinstance(value, list) else [value]
        assert len(values) > 1 or not isinstance(value, list), key
        assert any(each not in (0, 1) for each in values), key


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            layout,
            id="-".join(f"{key}={value}" for key, value in layout.items()),
            marks=[] if number in REPRESENTATIVE else [pytest.mark.slow],
        )
        for number, layout in enumerate(LAYOUTS)
    ],
)
def test_probes_do_not_depend_on_the_layout(layout, workers, by_hand):
    parallel = {key: value for key, value in layout.items() if key != "data"}
    ranks = workers.run(2, f"{MODULE}:by_engine", "GLSN", parallel, 1)
    assert ranks[0] == ranks[1]
    assert_same(ranks[0], by_hand("GLSN", 8), 2e-5)


PROBING = ["evaluate.every=3", "evaluate.samples=4", "evaluate.tasks=[mqar]", "train.steps=7", "checkpoint.every=2"]
TEXT = {"probe_position_loss", "probe_gain", "probe_hit_loss", "probe_other_loss"}
ANSWERS = {f"probe_{name}_mqar_64" for name in ("accuracy", "nll", "recency_null")}
KEPT = {f"probe_{name}_mqar_64" for name in ("kept", "by_layer", "held", "given")} | {"probe_dead_heads"}


def probed(run):
    lines = ({key: value for key, value in line.items() if key.startswith("probe")} for line in metrics(run))
    return {step: line for step, line in enumerate(lines, start=1) if line}


def test_a_run_probes_when_it_is_due_and_finds_the_same_again(recipe, tmp_path, monkeypatch):
    """Without a break, and interrupted between a checkpoint and the next probes."""
    command = ["train", str(recipe), *PROBING]
    assert main([*command, f"run.dir={tmp_path / 'whole'}"]) == 0
    whole = probed(tmp_path / "whole")
    assert [*whole] == [3, 6, 7]
    assert all(line.keys() == TEXT | ANSWERS | KEPT for line in whole.values())
    assert whole[3]["probe_other_loss"] > whole[7]["probe_other_loss"]
    real = Engine.step

    def interrupted(self, batches, step, *flags, **others):
        if step == 6:
            raise RuntimeError("the machine went away")
        return real(self, batches, step, *flags, **others)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(RuntimeError, match="went away"):
        main(command)
    monkeypatch.setattr(Engine, "step", real)
    assert main(command) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    without = [*command[:-4], "evaluate.every=0", "train.steps=7", f"run.dir={tmp_path / 'without'}"]
    assert main(without) == 0
    bare = [{key: each[key] for key in each if not key.startswith("probe")} for each in metrics(tmp_path / "whole")]
    assert metrics(tmp_path / "without") == bare, "probing changes training"


@pytest.mark.parametrize(
    ("probes", "keys"),
    [
        ("[position]", {"probe_position_loss"}),
        ("[gain,hits]", TEXT - {"probe_position_loss"}),
        ("[recall]", ANSWERS),
        ("[kept]", KEPT),
    ],
)
def test_what_is_not_asked_is_not_probed(probes, keys, recipe, tmp_path):
    assert main(["train", str(recipe), *PROBING, "train.steps=1", f"evaluate.probes={probes}"]) == 0
    assert probed(tmp_path / "run")[1].keys() == keys


def test_the_window_and_the_lengths_are_the_recipes(recipe, tmp_path):
    keys = ["train.steps=1", "evaluate.probes=[recall,gain]", "evaluate.lengths=[40,100]", "evaluate.window=40"]
    assert main(["train", str(recipe), *PROBING, *keys]) == 0
    found = probed(tmp_path / "run")[1]
    assert {key for key in found if "null" in key} == {f"probe_recency_null_mqar_{n}" for n in (40, 100)}
    assert found["probe_recency_null_mqar_40"] == 1 and found["probe_accuracy_mqar_40"][1] is None
    assert 0 < found["probe_recency_null_mqar_100"] < 1
    assert found["probe_gain"] is None  # no sample of 64 tokens loses anything at twice the window


BARE = """
model: {pattern: GL, hidden_size: 32, intermediate_size: 48, vocab_size: 64,
        gdn: {num_heads: 2, head_dim: 8}, attention: {num_heads: 2, head_dim: 8},
        lte: {window_size: 7, buffer_size: 8, sink_size: 2}}
train: {seq_length: 64, micro_batch_size: 2, global_batch_size: 4, steps: 4, dtype: fp32}
data:
  path: unused
  sources:
    recall: {format: task, task: selective_mqar, weight: 1, stages: [{until: 4, length: 32, pairs: 2},
             {length: 48, pairs: 4}]}
evaluate: {every: 2, samples: 3}
tracking: {wandb: disabled}
"""


def test_a_run_on_tasks_alone_is_asked_what_it_is_trained_on_last(tmp_path, capsys):
    """Without text there is none to probe."""
    (tmp_path / "bare.yaml").write_text(BARE + f"run: {{dir: {tmp_path / 'run'}}}")
    assert main(["train", str(tmp_path / "bare.yaml")]) == 0
    found, said = probed(tmp_path / "run"), capsys.readouterr().out
    (told,) = re.findall(r"step 2/4 .*recall_48 beyond the window ([\d.]+)%", said)
    assert [*found] == [2, 4]
    assert float(told) == pytest.approx(100 * found[2]["probe_accuracy_recall_48"][1], abs=0.06)
    keys = {key.replace("mqar_64", "recall_48") for key in ANSWERS | KEPT}
    assert found[4].keys() == keys
    assert found[4]["probe_recency_null_recall_48"] < 0.5


def chosen(tokenizer, *overrides):
    config = load_config(QUICKSTART, [*overrides, "train.seq_length=1024", "train.micro_batch_size=1"])
    found = questions(config, Vocabulary(config.model.vocab_size, 0, tokenizer))
    return {(each.task.name, each.length, getattr(each.parameters, "pairs", None)) for each in found}


def test_tasks_are_those_asked_for_or_trained_or_a_needle(bytes_tokenizer):
    source = "data.sources.recall={format: task, task: mqar, weight: 1, parameters: {pairs: 5, length: 256}}"
    both = [source, "data.sources.python.weight=1"]
    assert chosen(bytes_tokenizer) == {("niah_single_1", 1024, None)}
    assert chosen(bytes_tokenizer, "evaluate.lengths=[1024,4]") == {("niah_single_1", 1024, None)}
    assert chosen(None, *both) == {("mqar", 256, 5)}
    assert chosen(None, *both, "evaluate.lengths=[64,128]") == {("mqar", 64, 5), ("mqar", 128, 5)}
    asked = {("mqar", 256, 5), ("copy", 1024, None)}
    assert chosen(None, *both, "evaluate.tasks=[mqar,copy]") == asked
    assert chosen(None, *both, "evaluate.tasks=[recall,copy]") == asked
    with pytest.raises(UserError, match="niah_single_1"):
        chosen(bytes_tokenizer, "evaluate.tasks=[niah_single_1]", "evaluate.lengths=[4]")


def test_probes_and_eval_mean_the_same_by_a_name():
    """Two sources of one task are both asked, one of weight 0 only by its name."""
    from megahybrid.evaluation.tasks import choose

    sources = [
        f"data.sources.{name}={{format: task, task: mqar, weight: {weight}, parameters: {{pairs: {pairs}}}}}"
        for name, weight, pairs in (("a", 1, 5), ("b", 1, 6), ("c", 0, 7))
    ]
    both, everything = [*sources, "data.sources.python.weight=1"], Vocabulary(8192, 0)
    for asked, expected in (
        ([], {"a": 5, "b": 6}),
        (["mqar", "c"], {"mqar": TASKS["mqar"].parameters().pairs, "c": 7}),
    ):
        config = load_config(QUICKSTART, [*both, f"evaluate.tasks=[{','.join(asked)}]"])
        found = questions(config, everything)
        assert {each.asked: each.parameters.pairs for each in found} == expected
        assert {each.name: each.parameters.pairs for each in choose(config, asked, [])} == expected


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return Tokenizer.train(["The grass is green. The sky is blue."], 300)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("evaluate.tasks=[mcar]", "evaluate.tasks is 'mcar', which is no task; did you mean mqar?"),
        ("evaluate.probes=[recal]", "choose one of position, gain, hits, recall, kept"),
        ("evaluate.lengths=[64,300]", "evaluate.lengths has 300, more tokens than a micro-batch"),
        ("evaluate.lengths=[20]", "mqar has room for 4 pairs in 20 tokens, not for 8"),
        ("evaluate.samples=0", "evaluate.samples is 0"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(key, said, recipe, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", str(recipe), *PROBING, key]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_dead_heads_are_those_that_keep_next_to_nothing(recipe, tmp_path, monkeypatch):
    """A buffer of 8 makes it 0.4: kept counts of two layers of four heads."""
    import torch

    from megahybrid.mixers.lte.controller import LambdaController

    kept = torch.tensor([[0.0, 0.39, 0.41, 8.0], [0.1, 0.4, 1.0, 64.0]])
    monkeypatch.setattr(LambdaController, "metrics", lambda self: {"kept": kept, "lambda": self.lambdas})
    assert main(["train", str(recipe), *PROBING, "train.steps=1", "evaluate.probes=[kept]"]) == 0
    assert probed(tmp_path / "run")[1]["probe_dead_heads"] == 3


def test_seconds_are_those_of_the_probes(recipe, tmp_path, monkeypatch):
    real = Probes._dead
    monkeypatch.setattr(Probes, "_dead", lambda self, engine: time.sleep(0.3) or real(self, engine))
    assert main(["train", str(recipe), *PROBING, "train.steps=1"]) == 0
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 0.3 < line["probe_seconds"] < 20


def test_wandb_gets_every_bin_by_its_name():
    line = {
        "step": 4,
        "probe_position_loss": [5.0, 4.0, 3.5, None, 2.0],
        "probe_hit_loss": [1.0, 2.0, None],
        "probe_gain": 0.25,
        "probe_accuracy_niah_512": [1.0, 0.5],
        "probe_given_niah_512": [0.25, 0.75],
        "probe_by_layer_niah_512": [None, 0.5],
    }
    assert tracking._flat(line, {}) == {
        "step": 4,
        "probe_position_loss/0": 5.0,
        "probe_position_loss/1": 4.0,
        "probe_position_loss/2": 3.5,
        "probe_position_loss/8": 2.0,
        "probe_hit_loss/w": 1.0,
        "probe_hit_loss/4w": 2.0,
        "probe_gain": 0.25,
        "probe_accuracy_niah_512/inside": 1.0,
        "probe_accuracy_niah_512/beyond": 0.5,
        "probe_given_niah_512/evicted": 0.25,
        "probe_given_niah_512/kept": 0.75,
        "probe_by_layer_niah_512/layer_1": 0.5,
    }
