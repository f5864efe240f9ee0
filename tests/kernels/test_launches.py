"""What holds of every launch of every op, at sizes that need hundreds of GB; see `launches`. And the device guard."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ttir_ranges import Ranges

from megahybrid_kernels import Sequences, backend, launch, sequences

# CUDA's limits.
WIDEST, HIGHEST = 2**31 - 1, 2**16 - 1


@pytest.fixture(scope="module")
def launches() -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("launches.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_was_launched(launches):
    found = {name for case in launches["launches"].values() for name, *_ in case}
    assert found == set(launches["kernels"])


def test_no_grid_passes_the_limits(launches):
    """CUDA has 2^31 - 1 programs in the first dimension and 65,535 in the others."""
    for case, each in launches["launches"].items():
        for name, grid, _ in each:
            first, *others = grid
            assert 0 < first <= WIDEST and all(x <= HIGHEST for x in others), f"{case}: {name}, {grid}"


def test_no_address_passes_32_bits(launches):
    faults = [f"{case}: {name}: {x}" for case, each in launches["launches"].items() for name, _, xs in each for x in xs]
    assert not faults, "\n".join(faults)


ROWS = """
module {{
  tt.func public @rows(%x: !tt.ptr<f32>, %stride: i32) attributes {{noinline = false}} {{
    %c64_i32 = arith.constant 64 : i32
    %0 = tt.get_program_id x : i32
    %1 = arith.muli %0, %c64_i32 : i32
    {wide}
    %4 = tt.addptr %x, %3 : !tt.ptr<f32>, {kind}
    %5 = tt.load %4 : !tt.ptr<f32>
    tt.return
  }}
}}
"""
NARROW = {"wide": "%3 = arith.muli %1, %stride : i32", "kind": "i32"}
TOO_LATE = {"wide": "%2 = arith.muli %1, %stride : i32\n    %3 = arith.extsi %2 : i32 to i64", "kind": "i64"}
WIDE = {
    "wide": "%2 = arith.extsi %1 : i32 to i64\n    %s = arith.extsi %stride : i32 to i64\n"
    "    %3 = arith.muli %2, %s : i64",
    "kind": "i64",
}


@pytest.mark.parametrize("lines, programs, wrong", [
    (NARROW, 2**14, False), (NARROW, 2**15, True), (TOO_LATE, 2**15, True), (WIDE, 2**24, False),
])  # fmt: skip
def test_the_ranges_find_a_product_that_leaves_32_bits(lines, programs, wrong):
    faults = Ranges(ROWS.format(**lines), {1: 2048}, (programs,), 2**20).faults
    assert bool(faults) == wrong
    assert all("arith.muli %1, %stride" in x for x in faults)


LOOP = """
module {
  tt.func public @loop(%x: !tt.ptr<f32>, %rows: !tt.ptr<i32>, %stride: i32) attributes {noinline = false} {
    %c0_i32 = arith.constant 0 : i32
    %c1_i32 = arith.constant 1 : i32
    %0 = tt.load %rows : !tt.ptr<i32>
    %1 = scf.for %i = %c0_i32 to %0 step %c1_i32 iter_args(%count = %c0_i32) -> (i32)  : i32 {
      %2 = arith.muli %count, %stride : i32
      %3 = tt.addptr %x, %2 : !tt.ptr<f32>, i32
      %4 = arith.addi %count, %c1_i32 : i32
      scf.yield %4 : i32
    }
    tt.return
  }
}
"""


@pytest.mark.parametrize("stride, wrong", [(2**10, False), (2**12, True)])
def test_the_ranges_hold_over_all_turns_of_a_loop(stride, wrong):
    assert bool(Ranges(LOOP, {2: stride}, (1,), 2**20).faults) == wrong


def test_rows_too_far_apart_for_32_bits_within_a_tile_are_copied():
    near, far = (torch.empty_strided((3, 2), (stride, 1), device="meta") for stride in (2**25 - 1, 2**25))
    assert backend.dense_rows(near) is near
    assert backend.dense_rows(far).stride() == (2, 1)


def test_more_tokens_than_rows_have_numbers_are_refused(monkeypatch):
    monkeypatch.setattr(sequences, "MOST_TOKENS", 10)
    assert Sequences.of([4, 6]).tokens == 10
    with pytest.raises(ValueError, match="at most 10 tokens can be packed together, not 11"):
        Sequences.of([4, 7])
    with pytest.raises(ValueError, match="at most 10 tokens can be packed together, not 11"):
        Sequences.of([3]).behind(8)


class Guarded:
    """A kernel that notes the current device; in place of CUDA's devices two numbers."""

    def __init__(self, monkeypatch):
        self.current, self.seen = 0, []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.device)

    def device(self, device: torch.device) -> Guarded:
        self.wanted = device.index
        return self

    def __enter__(self) -> None:
        self.before, self.current = self.current, self.wanted

    def __exit__(self, *_) -> None:
        self.current = self.before

    def __getitem__(self, grid: tuple[int]):
        return lambda *_, **options: self.seen.append((grid, self.current, options))


def test_a_kernel_runs_on_its_first_arguments_device(monkeypatch):
    guarded = Guarded(monkeypatch)
    kernel = launch.Kernel(guarded, "guarded")
    monkeypatch.setattr(launch, "_watched", lambda: True)  # so that Triton itself is asked
    for name in ("cuda:1", "cuda:0", "cpu"):
        kernel[7](SimpleNamespace(device=torch.device(name)), 3, num_warps=4)
    assert guarded.seen == [((7,), device, {"num_warps": 4}) for device in (1, 0, 0)]
    assert guarded.current == 0


def test_inputs_on_different_devices_are_refused():
    def fake(device: str) -> SimpleNamespace:
        return SimpleNamespace(device=torch.device(device), dtype=torch.float32, is_cuda=device != "cpu")

    assert backend.takes_triton(fake("cuda:1"), fake("cuda:1"), None)
    assert not backend.takes_triton(fake("cpu"), fake("cuda:0"))
    for other in ("cuda:0", "cpu"):
        with pytest.raises(ValueError, match=f"an op's inputs are on cuda:1 and {other}: move them to one device"):
            backend.takes_triton(fake("cuda:1"), fake("cuda:1"), fake(other))
