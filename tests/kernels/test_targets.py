"""Which launches a GPU takes, and that they fit it: compiled for each kind of GPU, which need not be there."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from megahybrid_kernels import backend, targets
from megahybrid_kernels.launch import kernel
from megahybrid_kernels.rows import load_either
from megahybrid_kernels.targets import AMPERE, BLACKWELL, CDNA3, HOPPER, fitting, table_of
from megahybrid_kernels.tuning import Launch

# Bytes of shared memory that a program can have, by NVIDIA's compute capability (CUDA's programming guide); AMD's LDS.
SHARED = {
    (7, 0): 96, (7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (10, 3): 227,
    (12, 0): 99, (12, 1): 99,
}  # fmt: skip


def gpu(major: int, minor: int) -> SimpleNamespace:
    shared = 1024 * SHARED[major, minor]
    return SimpleNamespace(name="GPU", major=major, minor=minor, shared_memory_per_block_optin=shared)


@pytest.fixture
def on_gpu(monkeypatch):
    """Makes table_of see a GPU of these properties."""
    targets._of_device.cache_clear()
    monkeypatch.setattr(targets, "FORCED", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def see(properties):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: properties.name)

    yield see
    targets._of_device.cache_clear()


def test_a_gpu_takes_the_table_that_it_has_memory_for():
    tables = {capability: fitting(gpu(*capability)) for capability in SHARED}
    assert tables.pop((7, 0)) is tables.pop((7, 5)) is None
    assert {c for c, table in tables.items() if table is HOPPER} == {(9, 0)}
    assert {c for c, table in tables.items() if table is BLACKWELL} == {(10, 0), (10, 3)}
    assert all(table.shared <= 1024 * SHARED[c] for c, table in tables.items())


def test_of_amd_the_compiled_architectures_alone(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    amd = [SimpleNamespace(gcnArchName=name) for name in ("gfx942:sramecc+:xnack-", "gfx1100", "gfx90a")]
    assert [fitting(each) for each in amd] == [CDNA3, None, None]


def test_what_no_table_fits_runs_in_pytorch_and_is_said_once(on_gpu, caplog):
    on_gpu(gpu(7, 5))
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, is_cuda=True)
    with caplog.at_level(logging.WARNING, "megahybrid_kernels"):
        assert not backend.takes_triton(x) and not backend.takes_triton(x)
    assert [r.getMessage() for r in caplog.records] == [
        "GPU: the kernels have no launches for such a GPU, its ops run in PyTorch."
    ]
    assert backend.unsupported_head_dims(torch.float32, 64) == "have no launches for this GPU, GPU"
    on_gpu(gpu(8, 9))
    targets._of_device.cache_clear()
    assert backend.takes_triton(x) and backend.unsupported_head_dims(torch.float32, 64) is None


def test_a_table_can_be_forced(on_gpu, monkeypatch):
    on_gpu(gpu(9, 0))
    device = torch.device("cuda", 0)
    assert table_of(device) is HOPPER
    monkeypatch.setattr(targets, "FORCED", "ampere")
    assert table_of(device) is AMPERE
    environment = os.environ | {"MEGAHYBRID_KERNELS_TABLE": "volta"}
    program = [sys.executable, "-c", "import megahybrid_kernels"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    tables = "hopper, blackwell, ampere, cdna3"
    assert f"MEGAHYBRID_KERNELS_TABLE is 'volta': make it one of {tables}, or unset it" in done.stderr


def test_the_router_takes_the_head_dims_that_a_table_has_room_for(monkeypatch):
    router = import_module("megahybrid_kernels.retention_router")
    bf16, fp32 = torch.bfloat16, torch.float32
    for table, taken in {
        "hopper": [(bf16, 256), (fp32, 128)],
        "blackwell": [(bf16, 128), (fp32, 64)],
        "ampere": [(bf16, 128), (fp32, 64)],
        "cdna3": [],
    }.items():
        monkeypatch.setattr(targets, "FORCED", table)
        cases = [(dtype, head_dim) for dtype in (bf16, fp32) for head_dim in (64, 128, 256)]
        widest = {dtype: max([d for t, d in taken if t is dtype], default=0) for dtype in (bf16, fp32)}
        assert [router.unsupported(*case) is None for case in cases] == [d <= widest[dtype] for dtype, d in cases]


def test_a_launch_caps_registers_only_where_it_says_so():
    assert Launch(64, 4, 2).options() == {"num_warps": 4, "num_stages": 2}
    assert Launch(64, 4, 2, 128).options() == {"num_warps": 4, "num_stages": 2, "maxnreg": 128}


@kernel
def either_kernel(first, second, of_first, out, COUNT: tl.constexpr, CHOOSES: tl.constexpr):
    lane = tl.arange(0, 16)
    x = load_either(first, second, tl.load(of_first + lane) > 0, lane, lane < COUNT, CHOOSES)
    tl.store(out + lane, x)


@pytest.mark.parametrize("chooses", [True, False])
def test_of_two_arrays_each_place_is_read_in_its_own(chooses):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lane = torch.arange(16, device=device)
    of_first, expected = lane % 3 % 2, torch.where(lane < 13, 1.0 + lane, 0)
    first, second = (torch.where(of_first == own, 1.0 + lane, torch.nan) for own in (1, 0))
    out = torch.empty_like(first)
    either_kernel[1](first, second, of_first, out, COUNT=13, CHOOSES=chooses)
    assert torch.equal(out, expected)


# Bytes that a thread keeps in memory for want of registers, at most. A scan of Hopper's holds all of a state's columns
# and spills a little; all other tables are made to spill less. fp32 is for comparisons, where products of three take
# what registers there are.
SPILLS = {"hopper": 512, "blackwell": 256, "ampere": 160, "cdna3": 160}
# What spills more with no better launch, by kernel and size, then by table: what was found, in bytes, of all its
# architectures.
EXCEPTIONS = {
    # It holds a layer's products; its gradients a whole layer's weights or their sums.
    ("retention_router_forward_layer_kernel", "wide"): {"ampere": 1248},
    ("retention_router_forward_layer_kernel", "widest"): {"hopper": 2360},
    ("retention_router_backward_input_kernel", "wide"): {"ampere": 420},
    ("retention_router_backward_input_kernel", "widest"): {"hopper": 2108},
    ("retention_router_backward_weight_kernel", "widest"): {"hopper": 2908},
    # The sums of keys and values, and of two branches. Eight warps, by which the other tables spill at most 148, were
    # not measured on Hopper.
    ("native_sparse_attention_key_gradient_kernel", "wide"): {"hopper": 624},
    ("native_sparse_attention_attend_kernel", "widest"): {"hopper": 624},
    # Segments that join, which is seldom: a state in three parts.
    ("gated_delta_rule_join_kernel", "wide"): {"ampere": 444},
    # On sm_80 alone. Two stages spill 156, but load one chunk less ahead.
    ("gated_delta_rule_gradient_kernel", "narrow"): {"ampere": 164},
}
MORE_BY_3_8 = {("native_sparse_attention_key_gradient_kernel", "narrow"): {"ampere": 1096}}  # by 3.6 at most 40
MADE_FOR = triton.__version__.startswith("3.6.")  # 3.8 spills more


def compiled(architecture: str, *arguments: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, Path(__file__).with_name("compiled.py"), architecture, *arguments]
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def bound(kernel: str, size: str, table: str) -> int:
    """Bytes that it may spill."""
    excepted = EXCEPTIONS.get((kernel, size), {}).get(table)
    if MADE_FOR:
        return excepted or SPILLS[table]
    return 4096 if excepted else MORE_BY_3_8.get((kernel, size), {}).get(table, 768)


def faults(architecture: str, lines: list[dict], size: str, spills: bool = True) -> list[str]:
    """What is wrong with each of `compiled`'s lines of this size."""
    (table,) = [table for table in targets.TABLES.values() if architecture in table.architectures]
    found = []
    for line in lines:
        most = bound(line["kernel"], size, table.name)
        if "raised" in line:
            found.append(f"{line['kernel']}: {line['raised']}")
        elif line["shared"] > table.shared or line["tensor"] > 512 or (spills and line["spills"] > most):
            found.append(str(line))
    return found


def test_the_delta_rules_scans_fit_where_hoppers_do_not():
    lines = compiled("sm_89", "--op", "gated_delta_rule", "--only", "scan", "--most", "2")
    assert len(lines) == 2 and not faults("sm_89", lines, "narrow")


def test_what_does_not_fit_is_found():
    most, spilling = (SPILLS["ampere"], 444) if MADE_FOR else (768, 4096)
    fits = {"kernel": "gated_delta_rule_scan_kernel", "shared": 99 * 1024, "spills": most, "tensor": 0}
    excepted = fits | {"kernel": "gated_delta_rule_join_kernel", "spills": spilling}
    changes = {"shared": 99 * 1024 + 1}, {"spills": most + 1}, {"tensor": 513}, {"raised": "KeyError: maxnreg"}
    wrong = [*(fits | change for change in changes), excepted | {"spills": spilling + 1}]
    assert not faults("sm_89", [fits, excepted], "wide") and len(faults("sm_89", wrong, "wide")) == len(wrong)
    assert len(faults("sm_89", [fits, excepted], "small")) == 1
    assert not faults("sm_90", wrong[:1], "wide")


@pytest.mark.slow
@pytest.mark.parametrize("size", ["narrow", "small", "wide", "widest"])
@pytest.mark.parametrize("architecture", [name for table in targets.TABLES.values() for name in table.architectures])
def test_every_launch_fits(architecture, size):
    lines = compiled(architecture, "--size", size)
    assert len(lines) > 20 and not faults(architecture, lines, size)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_89", "sm_90", "gfx942"])
def test_every_launch_in_fp32_fits(architecture):
    lines = compiled(architecture, "--dtype", "fp32")
    assert len(lines) > 20 and not faults(architecture, lines, "narrow", spills=False)
