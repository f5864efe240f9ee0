"""`doctor` runs every kernel that a recipe's training, prefill and decode run, compiled for the same."""

from __future__ import annotations

import pytest
import torch

from megahybrid.config import load_config
from megahybrid.config.schema import Config, ParallelConfig
from megahybrid.doctor.shapes import size_of
from megahybrid.inference.batch import Batch
from megahybrid.model.context import Context
from megahybrid.model.stack import Stack, build, build_stages
from megahybrid.parallel import groups
from megahybrid.parallel.joined import join_weights
from megahybrid_kernels import Sequences, dropout_keys
from megahybrid_kernels.judging import measuring
from megahybrid_kernels.judging.verdicts import chosen_cases, prepared
from tests.doctor.launched import all_kernels, kernels_without_memory, kinds_by_key, launches

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# A layer of each letter, in samples that the delta rule's plan cuts.
SMALL = ["model.pattern=GLSFN", "train.seq_length=2048", "train.micro_batch_size=1"]
GROUPED = ["model.attention.num_kv_heads=2", "model.gdn.value_head_dim=64", "model.nsa={num_heads: 12, block_size: 32}"]
NORMED = ["model.attention.qk_norm=true", "model.nsa.qk_norm=true"]


@pytest.fixture(autouse=True)
def process_group():
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


def doctors(config: Config | None, dtypes: list[torch.dtype]) -> set[str]:
    """What `doctor` would launch on a GPU, found without memory and time for it."""
    meta, gpu = torch.device("meta"), torch.device("cuda")
    with launches(run=False) as found, kernels_without_memory():
        for case in chosen_cases(size_of(config, gpu), gpu):
            for dtype in dtypes:
                inputs, sequences, cotangent = prepared(case, meta, dtype)
                measuring.run(case, case.public(), inputs, sequences, cotangent)
    return found


def train_and_evaluate(model: Stack, config: Config, device: str) -> None:
    """A micro-batch of whole samples, and one of a long document and many short ones."""
    count = config.train.micro_batch_size * config.train.seq_length
    tokens = torch.zeros(count, dtype=torch.int64, device=device)
    keys = dropout_keys(tokens, torch.arange(count, device=device), 0, 0, len(model.layers))
    for lengths in ((config.train.seq_length,) * config.train.micro_batch_size, (count - 240, *(4,) * 60)):
        sequences = Sequences.of(lengths, device)
        model(tokens, Context(sequences, keys), labels=tokens).loss.backward()
        with torch.no_grad():
            model(tokens, Context(sequences), labels=tokens)


def read_and_decode(model: Stack, count: int, pieces: tuple[int, ...]) -> None:
    """Prompts in pieces and steps of decoding, for tensors without memory."""
    states, read = None, 0
    with torch.no_grad():
        for piece in (*pieces, 1, 1):
            starts = torch.full((count,), read, device="meta") if read else None
            sequences = Sequences.of((piece,) * count, "meta", starts)
            tokens = torch.zeros(count * piece, dtype=torch.int64, device="meta")
            states = model(tokens, Context(sequences, keep_states=True, in_place=True), states=states).states
            read += piece


def missing(config: Config, launched: set[str]) -> list[str]:
    return sorted(launched - doctors(config, [DTYPES[config.train.dtype]]))


@pytest.mark.parametrize("recipe, changes", [
    ("quickstart", SMALL + GROUPED + NORMED),
    ("quickstart", ["model.pattern=GL", *SMALL[1:]]),
    pytest.param("quickstart", [*SMALL, "model.lte.dropout=0"], marks=pytest.mark.slow),
    pytest.param("lalte-0.4b", SMALL, marks=pytest.mark.slow),
    pytest.param("lalte-1.4b", SMALL, marks=pytest.mark.slow),
    pytest.param("lalte-1.4b", SMALL + GROUPED, marks=pytest.mark.slow),
])  # fmt: skip
def test_doctor_runs_what_a_recipe_runs(recipe, changes):
    config = load_config(f"recipes/{recipe}.yaml", changes)
    (model,) = build_stages(config, [None], "meta", DTYPES[config.train.dtype])
    with launches(run=False) as launched, kernels_without_memory():
        train_and_evaluate(model, config, "meta")
        join_weights(model)
        read_and_decode(model, 2, (4500, 1500, 70))
        read_and_decode(model, 512, (3,))
    assert len(launched) > 60 and not missing(config, launched)


@pytest.mark.parametrize("recipe, changes", [
    ("recall", []), ("quickstart", ["model.pattern=GLSFN"]), pytest.param("lalte-0.4b", SMALL, marks=pytest.mark.slow),
])  # fmt: skip
def test_launches_of_one_key_are_of_one_kind(recipe, changes):
    """Of all shapes of a run in one process, whose kernels are found by what `Kernel` tells apart."""
    config = load_config(f"recipes/{recipe}.yaml", changes)
    (model,) = build_stages(config, [None], "meta", DTYPES[config.train.dtype])
    with kinds_by_key() as found, kernels_without_memory():
        train_and_evaluate(model, config, "meta")
        join_weights(model)
        read_and_decode(model, 2, (1500, 70))
        read_and_decode(model, 512, (3,))
    assert len(found) > 60 and [key for key, kinds in found.items() if len(kinds) > 1] == []


def test_without_a_recipe_doctor_runs_every_kernel():
    """But those of gradients through a convolution's states, which nothing here asks for."""
    unused = {"causal_conv1d.triton._backward_last_rows", "causal_conv1d.triton._backward_state"}
    assert {kind.split()[0] for kind in doctors(None, [torch.bfloat16])} == all_kernels() - unused


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", ["quickstart", "lalte-0.4b", "lalte-1.4b"])
def test_doctor_runs_what_a_gpu_runs(recipe):
    """Training and generation as they are, at a recipe's own shapes but for the number of layers."""
    config = load_config(f"recipes/{recipe}.yaml", ["model.pattern=GLSFN"])
    model = build(config, "cuda", DTYPES[config.train.dtype])
    with launches(run=True) as launched:
        train_and_evaluate(model, config, "cuda")
        join_weights(model)
        for prompts in ([4500], [70] * 20):
            batch = Batch(model, 3000)
            batch.add([[1] * length for length in prompts])
            for _ in range(6):
                for row in batch.step()[0]:
                    batch.extend(row, 1)
    assert len(launched) > 60 and not missing(config, launched)
