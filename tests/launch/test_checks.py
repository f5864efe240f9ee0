"""What `submit` finds that a job would find hours later: in the data, and in the checkpoint that it goes on from."""

import json
import shutil

import pytest

from megahybrid.cli import main
from megahybrid.config import load_config, save_config
from megahybrid.data.prepared import find_prepared
from megahybrid.files import write_json


def refused(recipe, capsys, *overrides: str) -> str:
    """What `submit --dry-run` says when it refuses."""
    assert main(["submit", str(recipe), "--gpus-per-node", "2", "--dry-run", *overrides]) == 2
    return capsys.readouterr().err


def taken(recipe, *overrides: str) -> bool:
    return main(["submit", str(recipe), "--gpus-per-node", "2", "--dry-run", *overrides]) == 0


@pytest.fixture
def data(prepared, tmp_path):
    """A copy of the prepared data, which the recipe's overrides name."""
    shutil.copytree(prepared, tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("python/train/shard.*.mds", "is missing"),
        ("python/validation/shard.*.mds", "is missing"),
        ("python/train/index.json", "is missing or unreadable"),
        ("dataset.json", "holds no prepared data"),
        ("tokenizer/tokenizer.json", "is missing or not the tokenizer"),
    ],
)
def test_data_that_is_not_whole(lost, said, data, recipe, capsys):
    assert taken(recipe, f"data.path={data}")
    next(data.glob(lost)).unlink()
    assert said in refused(recipe, capsys, f"data.path={data}")


def test_a_recipe_that_was_changed_after_prepare(recipe, prepared, capsys):
    assert f"'{prepared}' was prepared with another data.sources.python.include (['*.py'], now ['*.txt']); set it " in (
        refused(recipe, capsys, "data.sources.python.include=['*.txt']")
    )
    assert "validation_fraction (0.2, now 0.1); set it back" in refused(recipe, capsys, "data.validation_fraction=0.1")
    assert taken(recipe, "data.validation_fraction=0.2", "data.sources.python.path=elsewhere")


def test_head_dims_that_no_kernel_takes(recipe, capsys):
    said = refused(recipe, capsys, "model.attention.head_dim=264")
    assert "model.attention.head_dim: lte_attention's kernels" in said


def test_of_remote_data_nothing_is_read(recipe, tmp_path):
    assert taken(recipe, "data.path=/nowhere", "data.remote=s3://nowhere/data", f"data.cache={tmp_path / 'cache'}")
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def checkpoint(recipe, prepared, tmp_path):
    """Writes what a checkpoint says of itself, of a run with these overrides."""

    def write(step: int, *overrides: str, data: str = "") -> None:
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        save_config(load_config(recipe, overrides), folder / "config.yaml")
        position = {"step": step, "consumed": 8 * step, "data": data or find_prepared(prepared).identity}
        (folder / "weights-00000.safetensors").write_text("some")
        files = {"weights-00000.safetensors": {"bytes": 4}}
        facts = {"position": position, "regulators": {}, "parameters": {}, "files": files}
        write_json(folder / "checkpoint.json", facts)

    return write


def test_a_checkpoint_of_another_configuration(checkpoint, recipe, capsys):
    checkpoint(2, "train.seed=1")
    checkpoint(4)
    assert taken(recipe)
    assert taken(recipe, "train.watch.step_seconds=9", "optimizer.learning_rate=1e-3")
    assert "step_00000004' was trained with train.seed = 42, not 7" in refused(recipe, capsys, "train.seed=7")
    assert "step_00000002' was trained with train.seed = 1, not 42" in refused(recipe, capsys, "train.resume_from=2")
    assert taken(recipe, "train.resume_from=2", "train.seed=1")
    assert "has no checkpoint of that step; it has 2, 4" in refused(recipe, capsys, "train.resume_from=3")


def test_a_run_that_has_done_its_steps(checkpoint, recipe, capsys):
    checkpoint(4)
    assert "is at step 4 of train.steps = 4: there is nothing left to do" in refused(recipe, capsys, "train.steps=4")
    assert taken(recipe, "train.steps=5")


def test_a_checkpoint_of_other_data_or_of_weights_only(checkpoint, recipe, capsys):
    checkpoint(2, data="other")
    assert "was trained on other data" in refused(recipe, capsys)
    checkpoint(4)
    assert taken(recipe)
    facts = json.loads((recipe.parent / "run/checkpoints/step_00000004/checkpoint.json").read_text())
    del facts["regulators"]
    write_json(recipe.parent / "run/checkpoints/step_00000004/checkpoint.json", facts)
    assert "holds weights only" in refused(recipe, capsys)


def test_a_checkpoint_that_lacks_a_file(checkpoint, recipe, tmp_path, capsys):
    checkpoint(2)
    checkpoint(4)
    file = tmp_path / "run/checkpoints/step_00000004/weights-00000.safetensors"
    for damage in (lambda: file.write_text("other"), file.unlink):
        damage()
        said = refused(recipe, capsys)
        assert f"'{file}' is missing or not what was saved; train.resume_from=2 goes on from an older one" in said
    assert taken(recipe, "train.resume_from=2")


def test_init_from_another_model(checkpoint, recipe, tmp_path, capsys):
    checkpoint(4)
    start = f"train.init_from={tmp_path / 'run'}"
    said = refused(recipe, capsys, start, f"run.dir={tmp_path / 'new'}")
    assert "holds another model: embedding.weight should be [384, 32], it has none" in said
    assert taken(recipe, start)  # which goes on from its own checkpoint


def test_a_trunk_may_come_but_has_to_fit(checkpoint, recipe, tmp_path, capsys):
    branch = [f"train.branch_from={tmp_path / 'run'}@4", f"run.dir={tmp_path / 'branch'}"]
    assert taken(recipe, *branch)
    checkpoint(2)
    assert taken(recipe, *branch)
    checkpoint(4, "train.seed=1")
    assert "step_00000004' was trained with train.seed = 1, not 42" in refused(recipe, capsys, *branch)
    assert taken(recipe, *branch, "train.seed=1")


def test_a_branch_with_data_of_its_own(checkpoint, data, recipe, tmp_path, capsys):
    """Other keys of data.* and other data are taken, of the trunk's tokenizer only; the trunk may be still to come."""
    own = [
        *(f"train.branch_from={tmp_path / 'run'}@4", f"run.dir={tmp_path / 'branch'}", "data.document_masking=false"),
        "train.branch_data=own",
    ]
    assert taken(recipe, *own)
    checkpoint(4, data="other")
    file = tmp_path / "run/checkpoints/step_00000004/tokenizer.json"
    assert f"'{file}' is missing or not readable; put it back" in refused(recipe, capsys, *own)
    shutil.copy(data / "tokenizer/tokenizer.json", file)
    assert taken(recipe, *own)
    assert "other data takes train.branch_data=own" in refused(recipe, capsys, *own[:-1])
    assert "train.seed = 42, not 7; set it back" in refused(recipe, capsys, *own, "train.seed=7")
    file.write_text(file.read_text().replace("<|endoftext|>", "<|start|>"))
    said = refused(recipe, capsys, *own)
    assert "was trained with another tokenizer than" in said and f"prepare with data.tokenizer='{file}'" in said
