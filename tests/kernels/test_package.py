"""The package as somebody else uses it."""

import subprocess
import sys
from types import ModuleType

import torch

import megahybrid_kernels
from megahybrid_kernels.judging.shapes import GatedDeltaRule
from megahybrid_kernels.judging.verdicts import judge

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it raises ImportError
from megahybrid_kernels import Sequences, attention, rms_norm, rotary
import torch
x, sequences = torch.ones(5, 2, 8), Sequences.of([2, 3])
y = attention(rotary(x, sequences.positions, 1e4), x, x, sequences)
assert torch.allclose(rms_norm(y, torch.ones(8), 0.0), x)
"""


def test_public_names_are_ops_and_not_their_folders():
    public = {name: getattr(megahybrid_kernels, name) for name in megahybrid_kernels.__all__}
    assert not [name for name, value in public.items() if isinstance(value, ModuleType)]


def test_ops_run_where_there_is_no_triton():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


def test_one_shape_is_judged_alone(monkeypatch):
    (case,) = GatedDeltaRule(2, 16, 8).cases((5, 60))
    verdict = judge(case, torch.device("cpu"), "fp32")
    assert verdict.right and 0 < verdict.error < 1e-5 and "PyTorch fp32" in verdict.said
    rule = case.public()
    monkeypatch.setattr(case.load(), "gated_delta_rule", lambda *x, **options: (rule(*x, **options)[0] * 1.01, None))
    assert "is off by 1.0e-02, more than 1.0e-04" in judge(case, torch.device("cpu"), "fp32").said
