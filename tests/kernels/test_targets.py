"""Which launches a GPU takes, and that they fit it: compiled for each kind of GPU, which need not be there."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megahybrid_kernels import backend, targets
from megahybrid_kernels.targets import AMPERE, CDNA3, HOPPER, fitting, table_of
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def see(properties):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: properties.name)

    yield see
    targets._of_device.cache_clear()


def test_a_gpu_takes_the_table_that_it_has_memory_for():
    tables = {capability: fitting(gpu(*capability)) for capability in SHARED}
    assert tables.pop((7, 0)) is tables.pop((7, 5)) is None
    assert {c for c, table in tables.items() if table is HOPPER} == {(9, 0), (10, 0), (10, 3)}
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
    assert "MEGAHYBRID_KERNELS_TABLE is 'volta': make it one of hopper, ampere, cdna3, or unset it" in done.stderr


def test_a_launch_caps_registers_only_where_it_says_so():
    assert Launch(64, 4, 2).options() == {"num_warps": 4, "num_stages": 2}
    assert Launch(64, 4, 2, 128).options() == {"num_warps": 4, "num_stages": 2, "maxnreg": 128}
