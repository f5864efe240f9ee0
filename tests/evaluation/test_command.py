"""The verb on a run, a checkpoint and an exported model; what it refuses; what W&B gets."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from megahybrid.cli import main
from megahybrid.parallel import groups
from tests.training.conftest import RECIPE, prepared, recipe, reference, text  # noqa: F401

STEP = "step_00000020"
FEW = [
    "--task",
    "selective_mqar",
    "copy",
    "--set",
    "pairs=3",
    "--lengths",
    "64,0k".replace(",0k", ""),
    "--samples",
    "4",
]


@pytest.fixture(autouse=True)
def process_group():
    yield
    groups.shut_down()


def read(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def test_a_run_its_checkpoint_and_its_export_give_the_same(reference, tmp_path, capsys):  # noqa: F811
    assert main(["eval", str(reference), *FEW, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "selective_mqar  forced  learned      64" in said and "recency null" in said
    groups.shut_down()
    shutil.copytree(reference / "checkpoints" / STEP, tmp_path / "bare")
    assert main(["eval", str(tmp_path / "bare"), *FEW]) == 0
    groups.shut_down()
    assert main(["export", str(reference), str(tmp_path / "exported"), "--dtype", "fp32", "--no-verify"]) == 0
    before = sorted(path.name for path in (tmp_path / "exported").iterdir())
    groups.shut_down()
    assert main(["eval", str(tmp_path / "exported"), *FEW, "--out", str(tmp_path / "from_exported")]) == 0
    assert sorted(path.name for path in (tmp_path / "exported").iterdir()) == before
    expected = read(tmp_path / "run")
    assert set(expected) == {"selective_mqar.jsonl", "copy.jsonl"}
    assert read(tmp_path / "evaluations" / STEP) == expected  # beside the checkpoint, not among its files
    assert not (tmp_path / "bare" / "evaluations").exists()
    assert read(tmp_path / "from_exported") == expected
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["tasks"]["selective_mqar"]["pairs"] == 3


def test_a_conversion_leaves_nothing_behind(reference, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert main(["export", str(reference), str(tmp_path / "exported"), "--no-verify"]) == 0
    groups.shut_down()
    assert main(["eval", str(tmp_path / "exported"), *FEW]) == 0
    assert list((tmp_path / "temporary").iterdir()) == []
    assert (tmp_path / "exported" / "evaluations" / "step_00000000" / "results.json").exists()
    groups.shut_down()
    with monkeypatch.context() as patch:  # a job's end
        patch.setattr("megahybrid.evaluation.subject._load", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        assert main(["eval", str(tmp_path / "exported"), *FEW]) == 130
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and list((tmp_path / "temporary").iterdir()) == []
    groups.shut_down()
    (tmp_path / "exported" / "model.safetensors").write_bytes(b"damaged")
    assert main(["eval", str(tmp_path / "exported"), *FEW]) == 2
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "nosuch"], "'nosuch', which is no task"),
        (["--task", "mqar", "--policy", "nosuch"], "'nosuch'; choose among learned"),
        (["--task", "mqar", "--set", "nosuch=3"], "--set nosuch is no parameter"),
        (["--task", "copy", "--set", "nosuch=3"], "they have none."),
        (["--task", "mqar", "--set", "length=64"], "--set length is for training; leave it out and give --lengths."),
        (["--task", "mqar", "--set", "context_weight=1"], "--set context_weight is for training; leave it out."),
        (["--task", "mqar", "--set", "pairs=-1"], "pairs is -1"),
        (["--task", "mqar", "--set", "pairs=[3"], "not valid YAML"),
        (["--task", "mqar", "--set", "nonsense"], "--set has 'nonsense'; write KEY=VALUE"),
        (["--task", "mqar", "--lengths", "4q"], "--lengths has '4q'"),
        (["--task", "mqar", "--lengths", "0"], "--lengths has '0'"),
        (["--task", "mqar", "--lengths", "16", "--set", "pairs=30"], "room for 3 pairs"),
        (["--task", "mqar", "--samples", "0"], "--samples is 0"),
        (["--task", "mqar", "--batch-size", "0"], "--batch-size is 0"),
        ([], "has no tasks"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(reference, tmp_path, capsys, arguments, said):  # noqa: F811
    assert main(["eval", str(reference), *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [["--policy", "nosuch"], ["--task", "nosuch"], ["--set", "nonsense"]])
def test_what_needs_no_model_is_told_before_weights_are_read(reference, tmp_path, monkeypatch, wrong):  # noqa: F811
    monkeypatch.setattr("megahybrid.evaluation.subject.load", lambda *_: pytest.fail("it loads the model"))
    assert main(["eval", str(reference), "--task", "mqar", *wrong, "--out", str(tmp_path / "out")]) == 2


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert main(["eval", str(tmp_path), "--task", "mqar"]) == 2
    assert "no checkpoint and no exported model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_one_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("megahybrid.evaluation.subject.recipe", interrupted)
    assert main(["eval", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip() == "megahybrid: interrupted; the same command goes on."


def test_wandb_gets_a_table_and_pictures_in_the_summary_of_the_run(recipe, tmp_path, capsys):  # noqa: F811
    assert main(["train", str(recipe), "tracking.wandb=offline", "train.steps=2"]) == 0
    groups.shut_down()
    run = tmp_path / "run"
    parts = set((run / "wandb").glob("offline-run-*"))
    assert main(["eval", str(run), *FEW]) == 0
    assert (run / "evaluations" / "step_00000002" / "results.json").exists()
    (new,) = set((run / "wandb").glob("offline-run-*")) - parts
    assert new.name.rpartition("-")[2] in next(iter(parts)).name  # of the same run
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(next(new.glob("*.wandb")))]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "evaluation/step_2/results" in found and "evaluation/step_2/lengths" in found
    assert '"type":"history"' not in found
    assert len(list(new.rglob("*.png"))) == 3
    groups.shut_down()
    parts = set((run / "wandb").glob("offline-run-*"))
    assert main(["eval", str(run), *FEW]) == 0  # nothing new
    groups.shut_down()
    shutil.copytree(run / "checkpoints", tmp_path / "copied" / "checkpoints")
    assert main(["eval", str(tmp_path / "copied"), *FEW]) == 0
    assert set((run / "wandb").glob("offline-run-*")) == parts and not list(tmp_path.rglob("copied/**/wandb"))
    assert (tmp_path / "copied" / "checkpoints" / "evaluations" / "step_00000002" / "results.json").exists()


def test_needles_in_text_are_put_and_found(reference, tmp_path):  # noqa: F811
    command = ["eval", str(reference), "--task", "niah_single_1", "niah_single_2", "--lengths", "1k", "--depths", "3"]
    (tmp_path / "prose.txt").write_text("It is a truth. Or is it? " * 50)
    command += ["--samples", "2", "--set", f"haystack={tmp_path / 'prose.txt'}", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    groups.shut_down()
    assert main([*command, "--mode", "generate"]) == 0
    for task, haystack in (("niah_single_1", "noise"), ("niah_single_2", "prose.txt")):
        lines = [json.loads(line) for line in (tmp_path / "out" / f"{task}.jsonl").read_text().splitlines()]
        assert [(line["mode"], line["depth"], line["index"]) for line in lines] == [
            (mode, depth, index) for mode in ("forced", "generate") for depth in (0, 0.5, 1) for index in (0, 1)
        ]
        for line in lines:
            assert line["haystack"] == haystack and 1024 - 128 - 40 < line["real_length"] < 1024 - 100
            assert line["place"][0] == pytest.approx(0.15 + 0.7 * line["depth"], abs=0.15)
            assert line["in_window"] == [0] and (line["nll"][0] is None) == (line["mode"] == "generate")
        assert all(line["right"] == [0] for line in lines)  # 20 steps of training


def test_a_run_of_tasks_alone_is_asked_what_its_last_stage_asked(tmp_path, capsys):
    stages = "[{until: 4, length: 32, pairs: 2}, {length: 64, pairs: 5}]"
    source = f"{{recall: {{format: task, task: selective_mqar, weight: 1, stages: {stages}}}}}"
    (tmp_path / "recipe.yaml").write_text(
        RECIPE.format(run=tmp_path / "run", data=tmp_path / "data", text=tmp_path).partition("  validation_fraction")[0]
        + f"  sources: {source}\ntracking: {{wandb: disabled}}\n"
    )
    assert main(["train", str(tmp_path / "recipe.yaml"), "train.steps=1"]) == 0
    groups.shut_down()
    command = ["eval", str(tmp_path / "run"), "--lengths", "64", "--samples", "2"]
    assert main(command) == 0
    groups.shut_down()
    folder = tmp_path / "run" / "evaluations" / "step_00000001"
    lines = [json.loads(line) for line in (folder / "recall.jsonl").read_text().splitlines()]
    assert [len(line["right"]) for line in lines] == [5, 5]
    assert all(int(token) < 384 for line in lines for token in line["text"])
    assert main([*command, "--task", "selective_mqar"]) == 0  # the only source of that task
    groups.shut_down()
    assert (folder / "selective_mqar.jsonl").read_text() == (folder / "recall.jsonl").read_text()
    capsys.readouterr()
    assert main([*command, "--task", "niah_single_1"]) == 2
    assert "niah_single_1 is a task of text, and there is no tokenizer" in capsys.readouterr().err
