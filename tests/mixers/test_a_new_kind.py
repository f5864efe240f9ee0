"""A kind of mixer in one folder, brought by an installed package, does with no other change what the package's own do.

What a package installs is a folder on the path that says what its entry points are.
"""

import contextlib
import io
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megahybrid.config import load_config
from megahybrid.errors import UserError
from tests.training.conftest import RECIPE, metrics, prepared, text  # noqa: F401
from tools.workers import Workers

POINTS = """
[megahybrid.mixers]
gated_mean = tests.mixers.gated_mean:GatedMeanKind
"""

# Runs a script as where megahybrid is not installed.
ALONE = """
import runpy, sys
sys.modules |= dict.fromkeys(["megahybrid", "megahybrid_kernels"])
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments):
    """In a worker: a command line's exit code and what it printed."""
    from megahybrid.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = main(arguments)
    return code, out.getvalue()


def logits_of_pieces(path, cuts):
    """In a worker: of a run's model, a pass over two documents at once, and the same in pieces from its states."""
    from megahybrid.inference.loading import load_generator
    from megahybrid.model.context import Context
    from megahybrid_kernels import Sequences

    model, generator = load_generator(path).model.double(), torch.Generator().manual_seed(0)
    documents = torch.randint(0, 300, (2, cuts[-1]), generator=generator)
    with torch.inference_mode():
        whole = model.logits(model(documents.flatten(), Context(Sequences.of([cuts[-1]] * 2))).hidden)
        states, parts = model.initial_states(2), []
        for begin, end in zip([0, *cuts], cuts, strict=False):
            piece = Sequences.of([end - begin] * 2, starts=torch.full((2,), begin) if begin else None)
            out = model(documents[:, begin:end].flatten(), Context(piece), states=states)
            states = out.states
            parts.append(model.logits(out.hidden).unflatten(0, (2, -1)))
    return float((torch.cat(parts, 1).flatten(0, 1) - whole).abs().max()), float(whole.std())


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """Two processes that were started where the package is installed."""
    installed = tmp_path_factory.mktemp("installed")
    facts = installed / "gated_mean-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: gated-mean\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(POINTS)
    pool = Workers()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MEGAHYBRID_FORKS", raising=False)  # its processes know the kinds that there were at its start
        patch.syspath_prepend(installed)
        yield pool
    pool.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, text, prepared):  # noqa: F811
    folder = tmp_path_factory.mktemp("new_kind")
    path = folder / "recipe.yaml"
    content = RECIPE.format(run=folder / "run", data=prepared, text=text)
    content = content.replace("GLSFL", "TGTT").replace("  gdn:", "  mean: {num_heads: 2}\n  gdn:")
    path.write_text(content.replace("steps: 20", "steps: 6").replace("every: 5", "every: 3"))
    return path


@pytest.fixture(scope="module")
def command(workers):
    """A command line on so many processes; what the first printed."""

    def command(world, *arguments):
        answers = workers.run(world, "tests.mixers.test_a_new_kind:run", *map(str, arguments))
        assert [code for code, _ in answers] == [0] * world, answers
        return answers[0][1]

    return command


@pytest.fixture(scope="module")
def trained(recipe, command):
    command(1, "train", recipe)
    return recipe.parent / "run"


def assert_same(found, expected):
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["gate_loss"] == pytest.approx(theirs["gate_loss"], rel=1e-5)
        assert (ours["open"], ours["gate_weight"]) == (theirs["open"], theirs["gate_weight"])


def test_without_the_package_it_is_unknown(recipe):
    with pytest.raises(UserError, match=r"Unknown configuration key 'model\.mean'"):
        load_config(recipe)


def test_it_is_planned(recipe, command):
    rows = [line.split() for line in command(1, "plan", recipe).splitlines()]
    parameters = 3 * (3 * 32 * 32 + 32)  # 3 layers: 3 projections, and a bias a channel
    assert ["gated", "mean:", "mixer", f"{parameters:,}"] in [row[:4] for row in rows]
    assert ["gated", "mean:", "projections"] in [row[:3] for row in rows]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.mean.num_heads=3", "does not divide model.mean.num_heads (3)"),
        ("model.mean.head_dim=5", "must be even"),
        ("model.mean.heads=5", "did you mean model.mean.num_heads?"),
    ],
)
def test_its_configuration_is_checked(override, said, recipe, workers):
    arguments = ("plan", str(recipe), "parallel.tensor=2", override)
    ((code, out),) = workers.run(1, "tests.mixers.test_a_new_kind:run", *arguments)
    assert code == 2 and said in " ".join(out.split())


@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor=2", "parallel.sequence=true"],
        pytest.param(["parallel.context=2"], marks=pytest.mark.slow),
        ["parallel.pipeline=2"],
        ["parallel.zero_stage=3"],
    ],
    ids=["tensor", "context", "pipeline", "zero"],
)
def test_it_trains_alike_on_two_processes(layout, trained, recipe, command, tmp_path):
    command(2, "train", recipe, f"run.dir={tmp_path}", *layout, "train.recompute=T")
    assert_same(metrics(tmp_path), metrics(trained))
    assert metrics(trained)[-1]["loss"] < metrics(trained)[0]["loss"] - 0.05


def test_its_gates_are_regulated(trained, command):
    lines = metrics(trained)
    assert lines[0]["gate_loss"] == 0 and all(line["gate_loss"] != 0 for line in lines[1:])
    weights = [torch.tensor(line["gate_weight"]) for line in lines]
    moves = {move for before, after in itertools.pairwise(weights) for move in (after - before).flatten().tolist()}
    assert weights[0].shape == (3, 2) and moves == {0.25, -0.125}  # layers, heads
    assert "gate-heads.png" in command(1, "plot", trained)


def test_it_resumes_in_another_layout(trained, recipe, command, tmp_path):
    command(2, "train", recipe, f"run.dir={tmp_path}", "parallel.tensor=2")
    command(2, "train", recipe, f"run.dir={tmp_path}", "parallel.pipeline=2", "train.resume_from=3")
    assert_same(metrics(tmp_path), metrics(trained))


def test_its_state_continues_a_pass(trained, workers):
    ((error, size),) = workers.run(1, "tests.mixers.test_a_new_kind:logits_of_pieces", trained, [5, 6, 7, 20])
    assert error < 1e-10 * size


def test_it_generates_the_same_on_one_and_two_processes(trained, command):
    texts = {
        command(world, "generate", trained, "--prompt", "def f", "--tokens", 12, "--temperature", 0) for world in (1, 2)
    }
    (written,) = texts
    assert written.startswith("def f")


def test_it_is_exported_and_read_back(trained, command, tmp_path):
    """Both conversions compare logits; and transformers loads it where this package is not installed."""
    folder, imported, given, found = (tmp_path / name for name in ("exported", "imported", "given", "found"))
    for verb, source, target in (("export", trained, folder), ("import", folder, imported)):
        options = ["--dtype", "fp32"] if verb == "export" else []
        assert "worst difference" in command(1, verb, source, target, "--verify", *options)
    kinds, always = {"gated_mean", "gdn"}, {"cache", "configuration", "inference", "layers", "modeling", "packing"}
    code = {f"{name}_megahybrid.py" for name in kinds | always}
    assert {file.name for file in folder.glob("*.py")} == code
    checkpoint = trained / "checkpoints" / (trained / "checkpoints" / "latest").read_text().strip()
    saved, read = (load_file(each / "weights-00000.safetensors") for each in (checkpoint, imported))
    assert saved.keys() == read.keys() and all(torch.equal(read[name], weight) for name, weight in saved.items())

    rows = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(30) >= torch.tensor([0, 17])[:, None]).long()
    save_file({"rows": rows, "mask": mask}, given)
    script = Path(__file__).parents[1] / "hf" / "other_transformers.py"
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command_line = [sys.executable, "-c", ALONE, *map(str, (script, folder, given, found))]
    subprocess.run(command_line, check=True, cwd=tmp_path, env=environment)
    logits, real = load_file(found), mask.bool()
    assert torch.allclose(logits["steps"][real], logits["whole"][real], rtol=0, atol=1e-9)
