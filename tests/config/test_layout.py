from pathlib import Path

import pytest

from megahybrid.config import load_config
from megahybrid.config.validate import keepers
from megahybrid.errors import UserError

LALTE = Path(__file__).parents[2] / "recipes" / "lalte-1.4b.yaml"  # 24 layers, 8 Gated DeltaNet and 8 KV heads


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ("parallel.tensor=16", "does not divide model.gdn.num_heads (8)"),
        ("parallel.tensor=3", "does not divide model.vocab_size (32000)"),
        ("parallel.tensor=4 model.attention.num_kv_heads=2", "does not divide model.attention.num_kv_heads (2)"),
        ("parallel.tensor=4 model.pattern=GN model.nsa.num_heads=2", "does not divide model.nsa.num_heads (2)"),
        (
            "parallel.tensor=4 model.pattern=GN model.nsa.num_heads=36 model.nsa.num_kv_heads=6",
            "is neither a divisor nor a multiple of model.nsa.num_kv_heads (6)",
        ),
        ("parallel.tensor=8 parallel.sequence=true train.seq_length=4100", "does not come out even"),
        ("parallel.context=3 model.pattern=GF", "parallel.context is 3, which does not divide"),
        ("parallel.context=16 parallel.tensor=4 model.pattern=GF", "is 64, which does not divide model.attention.num"),
        ("parallel.context=16 model.pattern=GN model.nsa.num_heads=8", "num_heads (8); choose a divisor of it."),
        ("parallel.context=16 model.lte.gate=counterfactual", "parallel.context is 16, which does not divide"),
        (
            "parallel.context=16 model.lte.train_cap=true model.lte.gate=displacing",
            "parallel.context is 16, which does not divide",
        ),
        ("parallel.context=8 train.seq_length=4100", "parallel.context (8) ranks, which does not come out even"),
        ("parallel.pipeline=2 parallel.zero_stage=2", "set parallel.zero_stage to 1"),
        ("parallel.pipeline=2 parallel.zero_stage=3", "set parallel.zero_stage to 1"),
        ("parallel.virtual_pipeline=2", "without a pipeline"),
        ("parallel.pipeline=25", "every stage needs a layer"),
        ("parallel.pipeline=8 parallel.virtual_pipeline=4", "every stage needs a layer"),
        ("parallel.pipeline=2 model.pattern=GL|GL|GL", "make them equal"),
        ("parallel.zero_stage=0", "choose one of 1, 2, 3"),
        ("parallel.gradient_reduction=fp16", "choose one of fp32, bf16"),
        ("train.dtype=fp32 parallel.gradient_reduction=bf16", "set it to fp32"),
        ("train.recompute=F", "letters of model.pattern"),
        ("train.recompute=true", "letters of model.pattern"),
    ],
)
def test_impossible_layouts_are_refused_in_one_sentence(overrides, reason):
    with pytest.raises(UserError) as caught:
        load_config(LALTE, overrides.split())
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        "parallel.tensor=8 parallel.sequence=true parallel.zero_stage=3",
        "parallel.tensor=2 model.pattern=GN",  # of two KV heads
        "parallel.tensor=8 model.pattern=GN",
        "parallel.gradient_reduction=bf16 parallel.zero_stage=2",
        "parallel.context=4 parallel.tensor=2 parallel.sequence=true parallel.zero_stage=3",
        "parallel.context=8 model.pattern=GN",  # of two KV heads
        "parallel.context=64 model.pattern=GS",  # beyond all heads
        "parallel.context=4 parallel.tensor=4",
        "parallel.context=4 parallel.tensor=4 model.lte.train_cap=true",
        "parallel.pipeline=5",
        "parallel.pipeline=4 parallel.virtual_pipeline=3 parallel.tensor=2",
        "model.pattern=GL|GL|GL",
        "train.recompute=GL",
    ],
)
def test_possible_layouts_are_taken(overrides):
    load_config(LALTE, overrides.split())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("train.seq_length=4096", ""),  # a rank has 1,024 tokens; maps are as large as what 1,025 would exchange
        ("train.seq_length=4112", "G"),
        ("train.seq_length=4096 model.pattern=G model.gdn.num_heads=6", "G"),
        ("train.seq_length=5300", "G"),  # likewise 1,325 or 6 for window and room for what all retain
        ("train.seq_length=5304", "GL"),
        ("train.seq_length=3064 model.lte.train_cap=true", ""),  # likewise 766 or 7 for window and all buffers
        ("train.seq_length=3068 model.lte.train_cap=true", "L"),
        ("train.seq_length=65536 model.lte.train_cap=true", "GL"),
        ("train.seq_length=65536", "GL"),
        ("train.seq_length=768 parallel.tensor=4", "GL"),  # heads are too few
        ("train.seq_length=65536 model.lte.train_cap=true model.lte.gate=counterfactual", "G"),  # all of it matters
        ("train.seq_length=65536 model.lte.train_cap=true model.lte.gate=displacing", "G"),
        ("train.seq_length=65536 model.pattern=GSFN", "GS"),
        ("train.seq_length=65536 parallel.context=1", ""),
    ],
)
def test_context_parallel_ranks_keep_tokens_where_fewer_bytes_travel_so(overrides, expected):
    config = load_config(LALTE, ["parallel.context=4", "train.micro_batch_size=1", *overrides.split()])
    assert keepers(config) == expected
