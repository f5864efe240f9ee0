"""`megahybrid doctor` on a CPU: what is right is said with its error, what is wrong is named and ends with 1."""

import inspect
import itertools
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megahybrid.cli import main
from megahybrid.config import load_config, save_config
from megahybrid.doctor import kernels, machine
from megahybrid.doctor.diagnosis import diagnose
from megahybrid.doctor.finding import Finding
from megahybrid.doctor.shapes import size_of
from megahybrid_kernels.judging import shapes
from megahybrid_kernels.judging.sizes import SIZES
from megahybrid_kernels.judging.verdicts import chosen_cases, judge_apart
from megahybrid_kernels.lte_attention import reference as lte_reference
from megahybrid_kernels.targets import AMPERE
from tests.training.conftest import prepared, recipe, text

__all__ = ["prepared", "recipe", "text"]

CPU = torch.device("cpu")
exits, lte = (import_module(f"megahybrid_kernels.{op}") for op in ("exit_positions", "lte_attention"))


def case(name, variant=""):
    return next(each for each in SIZES["check"].every_case() if each.op == name and each.variant == variant)


def test_all_is_right_here(recipe, capsys):
    assert main(["doctor", str(recipe)]) == 0
    said = capsys.readouterr().out
    for each in chosen_cases(size_of(load_config(recipe), CPU), CPU):
        (line,) = [line for line in said.splitlines() if line.split()[:1] == [each.op]]
        assert "PyTorch bf16" in line and "PyTorch fp32" in line
    assert f"torch {torch.__version__}" in said and "no GPU is seen" in said
    assert "train: " in said and "Nothing is wrong." in said and "WRONG" not in said


def test_without_a_recipe_every_op_is_right():
    findings = list(kernels.check(CPU))
    assert all(each.right for each in findings)
    said = {each.text.split()[0] for each in findings}
    assert said == {case.op for case in chosen_cases(SIZES["check"], CPU)} and "attention_full" in said


def test_a_recipe_asks_for_what_its_model_uses():
    config = load_config("recipes/quickstart.yaml", ["model.pattern=GS", "parallel.tensor=2"])
    used = size_of(config, torch.device("cuda")).shapes
    names = "GatedDeltaRule CausalConv1d GatedRMSNorm Attention Rotary DropoutKeys RMSNorm SwiGLU LinearCrossEntropy"
    names += " RowProducts GatedRowProduct"
    assert {type(shape).__name__ for shape in used} == set(names.split())
    (attention,) = [shape for shape in used if isinstance(shape, shapes.Attention)]
    assert attention == shapes.Attention(
        config.model.attention.num_heads // 2, config.model.attention.head_dim, 1, 1024
    )


def test_every_op_has_a_case():
    """An op that is added must be checked here as well."""
    import megahybrid_kernels as package

    folders = {path.parent.name for path in map(Path, package.__path__) for path in path.glob("*/reference.py")}
    assert folders == {each.module for each in SIZES["check"].every_case()}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda q, *others: lte_reference.lte_attention(q, *others) * 1.03, "is off by 3.0e-02"),
        (lambda q, *others: lte_reference.lte_attention(q, *others) * torch.nan, "is off by nan"),
        (lambda q, *others: lte_reference.lte_attention(q + 0.1 * (q - q.detach()), *others), "d q is off by"),
    ],
)
def test_a_wrong_kernel_is_named(wrong, said, monkeypatch):
    monkeypatch.setattr(lte, "lte_attention", wrong)
    (finding,) = kernels.check(CPU, chosen=[case("lte_attention_capped")])
    assert not finding.right and said in finding.text


def test_a_kernel_that_raises_does_not_hide_the_others(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(lte, "lte_attention", broken)
    wrong, right = kernels.check(CPU, chosen=[case("lte_attention_capped"), case("swiglu")])
    assert not wrong.right and "RuntimeError: no such instruction" in wrong.text
    assert right.right


def test_what_is_wrong_at_one_shape_alone_is_named(monkeypatch):
    real = exits.exit_positions

    def wrong(score, *others):
        return real(score, *others) + (len(score) > 4000)

    monkeypatch.setattr(exits, "exit_positions", wrong)
    chosen = [case("exit_positions"), case("exit_positions", "long"), case("rotary")]
    finding, other = kernels.check(CPU, chosen=chosen)
    assert not finding.right and finding.text.count("off by") == 2
    assert all(f"long, {dtype}: output is off by" in finding.text for dtype in ("bf16", "fp32"))
    assert finding.text.endswith(" · 2 shapes") and other.right and "shapes" not in other.text


@pytest.mark.slow
def test_judged_in_a_process_of_its_own_as_in_this_one():
    every = chosen_cases(SIZES["check"], CPU)
    number = next(n for n, each in enumerate(every) if each.op == "swiglu")
    (verdicts,) = judge_apart(SIZES["check"], CPU, [number])
    (finding,) = kernels.check(CPU, chosen=[every[number]])
    assert finding.text.endswith(" · ".join(each.said for each in verdicts)) and all(each.right for each in verdicts)


def test_steps_run_in_place_and_are_judged(monkeypatch):
    """A step that forgets its newest token, on the path that generation takes."""
    real, in_place = lte.lte_attention_with_cache, []

    def forgets(q, k, v, *others, **flags):
        in_place.append(flags.get("in_place"))
        return real(q, torch.zeros_like(k), v, *others, **flags)

    forgets.__signature__ = inspect.signature(real)
    monkeypatch.setattr(lte, "lte_attention_with_cache", forgets)
    (finding,) = kernels.check(CPU, chosen=[case("lte_attention_step")])
    assert not finding.right and "output is off by" in finding.text and all(in_place)


def test_a_sum_over_processes():
    (finding,) = machine.links(2)
    assert finding.right and "a sum over 2 processes by gloo is right" in finding.text
    assert list(machine.links(1)) == []


def test_processes_that_fail_are_told(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    (finding,) = machine.links(2)
    assert not finding.right and "fails on process 0: without a word" in finding.text


def test_too_small_a_disk_is_wrong(recipe, monkeypatch):
    config = load_config(recipe)
    (finding,) = machine.disk(config)
    assert finding.right and "2 checkpoints of " in finding.text
    config.checkpoint.milestones, config.checkpoint.milestone_every = [3, 10], 10
    (finding,) = machine.disk(config)
    assert "5 checkpoints of " in finding.text  # 2 and steps 3, 10, 20
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**5))
    (finding,) = machine.disk(config)
    assert not finding.right


def test_a_branch_needs_its_trunk(recipe, tmp_path):
    config = load_config(recipe, [f"train.branch_from={tmp_path / 'trunk'}@5"])
    (finding,) = machine.start(config)
    assert not finding.right and "there is no run" in finding.text
    folder = tmp_path / "trunk" / "checkpoints" / "step_00000005"
    folder.mkdir(parents=True)
    save_config(load_config(recipe), folder / "config.yaml")
    (folder / "checkpoint.json").write_text("{}")
    (finding,) = machine.start(config)
    assert finding.right and finding.text == f"a branch of {folder}"


def test_data_that_is_missing_or_damaged_is_wrong(recipe, prepared, tmp_path, capsys):
    assert main(["doctor", str(recipe), f"data.path={tmp_path / 'nowhere'}"]) == 1
    said = capsys.readouterr().out
    assert "WRONG data.path" in said and "1 thing is wrong." in said
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    shard = next(copy.rglob("train/shard*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    findings = list(machine.data(load_config(recipe, [f"data.path={copy}"])))
    assert not findings[-1].right and shard.name in findings[-1].text
    assert findings[0].right and re.fullmatch('data.identity is "[0-9a-f]{16}"', findings[0].text)


def test_a_recipe_that_was_changed_after_prepare_is_wrong(recipe):
    (finding,) = machine.data(load_config(recipe, ["data.sources.python.exclude=[old]"]))
    said = "was prepared with another data.sources.python.exclude ([], now ['old']); set it back"
    assert not finding.right and said in finding.text


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def breaks(device):
        raise OSError("odd")
        yield

    monkeypatch.setattr(machine, "devices", breaks)
    monkeypatch.setattr(kernels, "check", lambda *_: iter([Finding("x")]))
    lines = []
    wrong = diagnose(say=lines.append)
    assert [each.text for each in wrong] == ["OSError: odd"] and "  x" in lines


@pytest.mark.parametrize("table, said", [
    (AMPERE, "GPU 0 takes the launches of the table ampere"),
    (None, "GPU 0 has no launches made for it: every op runs its PyTorch path"),
])  # fmt: skip
def test_a_gpus_table_of_launches_is_named(table, said, monkeypatch):
    monkeypatch.setattr(machine, "table_of", lambda device: table)
    for name, value in {"device_count": 1, "mem_get_info": (2**34, 2**34), "get_device_name": "a GPU"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    free, launches = itertools.islice(machine.devices(torch.device("cuda", 0)), 2)
    assert free.right and launches.right and launches.text == said
