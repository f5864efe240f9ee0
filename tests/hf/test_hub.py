"""What an export has for the hub, read by the hub's own library; and what is told to be missing."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from megahybrid.cli import main
from megahybrid.errors import UserError
from megahybrid.hf import hub
from megahybrid.hf.export import is_exported
from megahybrid.training.tensor_files import facts_of

REPOSITORY = "somebody/tiny.lalte"
READY = ["--push-ready", REPOSITORY, "--license", "apache-2.0", "--no-verify"]


@pytest.fixture(scope="module")
def ready(reference, tmp_path_factory):
    """A run that was evaluated, and its export."""
    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(reference, folder / "run")
    task = ["--task", "selective_mqar", "--set", "pairs=3", "--samples", "4", "--policy", "learned", "recency"]
    assert main(["eval", str(folder / "run"), *task, "--lengths", "64,128"]) == 0
    (file,) = (folder / "run" / "evaluations").glob("*/results.json")
    found = json.loads(file.read_text())
    for number, each in enumerate(found["results"], start=1):  # such a model recalls nothing
        each.update(accuracy=number / 8, interval=[number / 9, number / 7])
        each["beyond"]["accuracy"] = number / 16
    file.write_text(json.dumps(found))
    assert main(["export", str(folder / "run"), str(folder / "model"), *READY, "--shard-size", "100KB"]) == 0
    return folder


def test_the_hub_reads_the_card(ready):
    card = ModelCard.load(ready / "model" / "README.md")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        *("apache-2.0", "transformers", "text-generation"),
    )
    assert is_exported(ready / "model", license_="apache-2.0")
    assert not any(is_exported(ready / "model", **other) for other in ({"dtype": "fp32"}, {"license_": "mit"}))
    assert f'from_pretrained("{REPOSITORY}", trust_remote_code=True)' in card.text
    (results,) = (ready / "run" / "evaluations").glob("*/results.json")
    entries = [each for each in json.loads(results.read_text())["results"] if each["policy"] == "learned"]
    assert len(entries) == 2
    found = [(each.dataset_name, each.metric_type, each.metric_value) for each in card.data.eval_results]
    assert found == [(f"selective_mqar, {each['length']} tokens", "accuracy", each["accuracy"]) for each in entries]
    for each in entries:
        low, high = (f"{100 * value:.1f}" for value in each["interval"])
        accuracy, beyond = (f"{100 * value:.1f}" for value in (each["accuracy"], each["beyond"]["accuracy"]))
        row = f"| selective_mqar (forced) | {each['length']} | 12 | {accuracy} | {low} to {high} | {beyond} | 0.0 |\n"
        assert row in card.text


def test_a_card_without_results_and_licence_is_read_too(reference, tmp_path):
    assert main(["export", str(reference), str(tmp_path / "model"), "--no-verify"]) == 0
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license is None and card.data.eval_results is None and card.data.tags == ["megahybrid"]
    assert 'from_pretrained("FOLDER"' in card.text and "| recall |" not in card.text


def test_a_card_has_no_results_of_other_weights(ready, tmp_path, capsys):
    """Two checkpoints of the same step in one folder: the evaluation of either lies at the same place."""
    (other,) = (ready / "run" / "checkpoints").glob("step_*20")
    shutil.copytree(other, tmp_path / "other")
    shutil.copytree(ready / "run" / "evaluations", tmp_path / "evaluations")
    assert main(["export", str(tmp_path / "other"), str(tmp_path / "same"), *READY]) == 0
    assert ModelCard.load(tmp_path / "same" / "README.md").data.eval_results
    weights = load_file(tmp_path / "other" / "weights-00000.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, tmp_path / "other" / "weights-00000.safetensors")
    file = tmp_path / "other" / "checkpoint.json"
    facts = json.loads(file.read_text())
    facts["files"]["weights-00000.safetensors"] = facts_of(tmp_path / "other" / "weights-00000.safetensors")
    file.write_text(json.dumps(facts))
    capsys.readouterr()
    assert main(["export", str(tmp_path / "other"), str(tmp_path / "model"), *READY]) == 0
    (results,) = (tmp_path / "evaluations").glob("*/results.json")
    assert f"The model card leaves out '{results}', which is of other weights.\n" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.eval_results is None and "| recall |" not in card.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--push-ready", REPOSITORY], "give --license"),
        (
            ["--push-ready", "tiny", "--license", "mit"],
            "--push-ready is 'tiny'; give the repository's name as USER/NAME",
        ),
        (["--push-ready", "a/b/c", "--license", "mit"], "--push-ready is 'a/b/c'"),
        (["--license", "Apache 2"], "--license is 'Apache 2'; give the hub's identifier"),
    ],
)
def test_wishes_that_the_hub_would_not_take(reference, tmp_path, capsys, arguments, said):
    assert main(["export", str(reference), str(tmp_path / "model"), *arguments]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1 and not any(tmp_path.iterdir())


def cut(name, text):
    def cut(folder):
        file = folder / name
        assert text in file.read_text()
        file.write_text(file.read_text().replace(text, ""))

    return cut


@pytest.mark.parametrize(
    ("damage", "lacks"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "gdn_megahybrid.py").unlink(), "gdn_megahybrid.py"),
        (lambda folder: next(folder.glob("model-00002-*")).unlink(), "model-00002-of-"),
        (lambda folder: (folder / "README.md").unlink(), "'library_name' in README.md"),
        (cut("README.md", "license: apache-2.0\n"), "'license' in README.md"),
        (cut("README.md", "```python"), f"an example in README.md that loads {REPOSITORY}"),
        (cut("README.md", "model-index:"), "'model-index' in README.md"),
    ],
)
def test_what_is_missing_is_named(ready, tmp_path, damage, lacks):
    shutil.copytree(ready / "model", tmp_path / "model")
    hub.require_ready(tmp_path / "model", REPOSITORY, evaluated=True)
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=r"^The folder is not ready for the hub, it lacks ") as refusal:
        hub.require_ready(tmp_path / "model", REPOSITORY, evaluated=True)
    assert lacks in str(refusal.value)
