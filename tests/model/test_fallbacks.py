"""What a model says, before it runs, of ops that have no kernel for its head dims."""

import pytest
import torch

from megahybrid.errors import UserError
from megahybrid.model.fallbacks import kernel_notes
from tests.model import tiny

GPU, BF16, FP32 = torch.device("cuda"), torch.bfloat16, torch.float32


def config_of(pattern, head_dim=64, gdn=64, value=None, sparse=64):
    config = tiny.config(pattern)
    config.model.attention.head_dim, config.model.nsa.head_dim = head_dim, sparse
    config.model.gdn.head_dim, config.model.gdn.value_head_dim = gdn, value
    return config


@pytest.mark.parametrize(
    ("dtype", "model", "ops"),
    [
        (BF16, {"pattern": "GLSF", "head_dim": 256, "gdn": 256}, []),
        (BF16, {"pattern": "GSG", "gdn": 264}, ["gated_delta_rule … up to 256, not 264 (model.gdn.head_dim)"]),
        (BF16, {"pattern": "G", "value": 300}, ["gated_delta_rule … up to 256, not 300 (model.gdn.value_head_dim)"]),
        (BF16, {"pattern": "S", "head_dim": 100}, ["attention … multiples of 8, not 100 (model.attention.head_dim)"]),
        (FP32, {"pattern": "SF"}, ["attention … take bfloat16 and float16, not float32 (train.dtype)"]),
        (BF16, {"pattern": "N", "sparse": 264}, ["native_sparse_attention … up to 256, not 264 (model.nsa.head_dim)"]),
        (FP32, {"pattern": "L", "head_dim": 160}, ["retention_router … up to 128 in float32, not 160"]),
    ],
)
def test_ops_without_kernels_are_named(dtype, model, ops):
    for training in (True, False):
        notes = kernel_notes(config_of(**model), GPU, dtype, training)
        assert len(notes) == len(ops)
        for note, (op, reason) in zip(notes, (each.split(" … ") for each in ops), strict=True):
            assert note.startswith(f"{op} runs in PyTorch here") and reason in note


@pytest.mark.parametrize(("pattern", "op", "head_dim"), [("GL", "lte_attention", 264), ("F", "attention", 36)])
def test_training_in_quadratic_memory_is_refused_on_a_gpu(pattern, op, head_dim):
    config = config_of(pattern, head_dim)
    with pytest.raises(UserError, match=rf"^model.attention.head_dim: {op}'s kernels .* not {head_dim}, and without"):
        kernel_notes(config, GPU, BF16, training=True)
    assert any(note.startswith(op) for note in kernel_notes(config, GPU, BF16, training=False))
    assert kernel_notes(config, torch.device("cpu"), BF16, training=True) == []
