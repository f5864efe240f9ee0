"""A report goes to W&B, with a page for every run that has one."""

import json
from types import SimpleNamespace

import pytest

from megahybrid.cli import main
from megahybrid.config import Config
from megahybrid.study import pictures, publish, run_pictures
from megahybrid.study.results import read_results
from megahybrid.training import checkpoint_folder
from tests.study import made_up
from tests.study.test_report import written  # noqa: F401


@pytest.fixture
def study_file(tmp_path, monkeypatch):
    """A study in a folder of its own, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pictures, "PICTURES", {"cost.png": run_pictures.cost_figure})
    (tmp_path / "base.yaml").write_text(
        "run: {dir: unused}\nmodel: {pattern: F, hidden_size: 32, vocab_size: 384}\ndata: {path: unused}\n"
        "train: {seq_length: 32, micro_batch_size: 1, global_batch_size: 1, steps: 1}\ntracking: {wandb: offline}\n"
    )
    (tmp_path / "study.yaml").write_text(
        "study: hybrids-1\nbase: base.yaml\nkinds: {gdn: G}\nsizes: [{width: 32, layers: 1}]\n"
        "budgets: {flops: [1.0e15]}\n"
    )
    made_up.write(tmp_path / "studies" / "hybrids-1")
    return tmp_path / "study.yaml"


def test_the_verb_reports_and_tells_wandb_what_is_new(study_file, tmp_path, capsys):
    folder = tmp_path / "studies" / "hybrids-1"
    for _ in range(2):
        assert main(["study", "report", str(study_file)]) == 0
    assert capsys.readouterr().out.split() == ["studies/hybrids-1/report.md", "studies/hybrids-1/cost.png"] * 2
    (run,) = (folder / "wandb").glob("offline-run-*-report-hybrids-1")
    assert [each.name.partition("_")[0] for each in run.glob("files/media/images/*.png")] == ["cost"]
    (table,) = run.glob("files/media/table/runs*.json")
    made, runs = json.loads(table.read_text()), read_results(folder).runs
    assert len(made["data"]) == len(runs)
    row = dict(zip(made["columns"], made["data"][0], strict=True))
    assert row["cell"] == runs[0].cell and row["loss"] == runs[0].loss and row["link"] == ""


def test_runs_are_linked_where_there_is_a_server(written, monkeypatch, tmp_path):  # noqa: F811
    folder, paths = written
    monkeypatch.setattr(publish, "RUNS", tmp_path / "shared")
    tracked = read_results(folder).runs[1].run
    step = tmp_path / "shared" / tracked / "checkpoints" / checkpoint_folder.name(7)
    step.mkdir(parents=True)
    facts = {"position": {"step": 7, "consumed": 56, "data": "x", "tracking_id": "abc123"}, "regulators": {}}
    (step / "checkpoint.json").write_text(json.dumps(facts))
    (step.parent / "latest").write_text(step.name)
    run = SimpleNamespace(url="https://wandb.ai/we/us/runs/report", settings=SimpleNamespace(_offline=False))
    wandb = SimpleNamespace(run=run, Table=lambda columns, data: data, Image=str)

    def add(config, where, run_id, make):
        assert (config.tracking.group, config.tracking.name) == ("hybrids-1", "hybrids-1 report")
        assert (where, run_id) == (folder, "report-hybrids-1")
        added.update(make(wandb))

    added, results = {}, read_results(folder)
    monkeypatch.setattr(publish, "add_to_summary", add)
    publish.publish(results, folder, Config(), paths[1:])
    pages = ["https://wandb.ai/we/us/runs/abc123" if each.run == tracked else "" for each in results.runs]
    assert [row[-1] for row in added["runs"]] == pages and any(pages)
    assert added["isoflop"] == str(folder / "isoflop.png") and len(added) == len(paths)


def test_without_tracking_nothing_is_tracked(study_file, tmp_path):
    (tmp_path / "base.yaml").write_text((tmp_path / "base.yaml").read_text().replace("offline", "disabled"))
    assert main(["study", "report", str(study_file)]) == 0
    assert not (tmp_path / "studies" / "hybrids-1" / "wandb").exists()
