"""What the schema says of its keys: which may change when a run goes on, which values fit, what is derived."""

import math

import pytest

from megahybrid.config import load_config
from megahybrid.errors import UserError
from megahybrid.key import derived, keys
from megahybrid.training.resume import check_resume
from tests.config.test_load import QUICKSTART

MAY_CHANGE = """
run.dir
model.init_std model.lte.dropout model.lte.train_cap model.lte.gate model.lte.routing_grad
model.lte.loss.update_interval model.lte.loss.initial model.lte.loss.maximum
model.lte.loss.increase model.lte.loss.decrease model.lte.loss.tolerance
parallel.tensor parallel.pipeline parallel.virtual_pipeline parallel.sequence
parallel.context parallel.zero_stage parallel.gradient_reduction
train.micro_batch_size train.steps train.dtype train.recompute train.cuda_graph train.z_loss
train.init_from train.branch_from train.branch_data train.resume_from
train.skip.spikes train.skip.sigma train.skip.window train.skip.most_in_a_row
train.watch.start_seconds train.watch.step_seconds train.watch.join_seconds train.watch.restarts
train.trace.steps train.trace.ranks
train.validate_every train.validation_samples train.log_every
optimizer.learning_rate optimizer.warmup_steps optimizer.schedule optimizer.decay_fraction optimizer.min_ratio
optimizer.betas optimizer.eps optimizer.weight_decay optimizer.clip_grad_norm
data.path data.sources.python.path data.tokenizer data.workers data.validation_fraction
data.sources.python.format data.sources.python.dtype data.sources.python.eos_token_id
data.sources.python.include data.sources.python.exclude data.sources.python.field
data.remote data.cache data.cache_limit data.identity
evaluate.every evaluate.probes evaluate.samples evaluate.tasks evaluate.lengths evaluate.window
checkpoint.every checkpoint.keep checkpoint.milestone_every checkpoint.milestones
tracking.wandb tracking.project tracking.name tracking.group tracking.tags
"""
MAY_NOT = """
model.pattern model.hidden_size model.vocab_size model.intermediate_size model.tie_embeddings model.norm_eps
model.gdn.num_heads model.gdn.head_dim model.gdn.value_head_dim model.gdn.conv_size
model.attention.num_heads model.attention.num_kv_heads model.attention.head_dim model.attention.window_size
model.attention.rope_theta model.attention.qk_norm
model.lte.window_size model.lte.buffer_size model.lte.sink_size model.lte.conv_size model.lte.conv_dilation
model.nsa.num_heads model.nsa.num_kv_heads model.nsa.head_dim model.nsa.block_size model.nsa.num_blocks
model.nsa.window_size model.nsa.rope_theta model.nsa.qk_norm
train.seq_length train.global_batch_size train.seed
data.sources.python.weight data.sources.python.task data.sources.python.parameters data.sources.python.stages
data.document_masking data.shuffle_block_size
"""


def test_what_may_change_is_decided_for_every_key():
    found = {name: rules.may_change for name, _, rules in keys(load_config(QUICKSTART))}
    assert found == dict.fromkeys(MAY_CHANGE.split(), True) | dict.fromkeys(MAY_NOT.split(), False)


def fault(before: list[str], after: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        check_resume(load_config(QUICKSTART, before), load_config(QUICKSTART, after), "ckpt")
    return str(caught.value)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("model.attention.num_kv_heads=null", "model.attention.num_kv_heads=4"),
        ("model.gdn.value_head_dim=null", "model.gdn.value_head_dim=32"),
        ("model.intermediate_size=null", "model.intermediate_size=512"),
        ("model.pattern=(GL)*3", "model.pattern=GLG LGL"),
        ("model.pattern=(GL)*3", "model.pattern=GL|GLGL"),
        ("model.attention.rope_theta=10000", "model.attention.rope_theta=1e4"),
        ("data.sources.python.format=jsonl", "data.sources.python.format=parquet"),
        ("data.sources.python.weight=1", "data.sources.python.weight=2.5"),
        ("train.watch.step_seconds=480", "train.watch.step_seconds=900"),
        ("data.sources.python.path=a", "data.sources.python.path=b"),
    ],
)
def test_equal_settings_in_another_spelling_are_equal(before, after):
    base = ["model.attention.num_heads=4", "model.gdn.head_dim=32", "model.hidden_size=192"]
    check_resume(load_config(QUICKSTART, [*base, before]), load_config(QUICKSTART, [*base, after]), "ckpt")


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ("model.attention.num_kv_heads=2", "model.attention.num_kv_heads = 4, not 2"),
        ("model.intermediate_size=768", "model.intermediate_size = 512, not 768"),
        ("model.pattern=(LG)*3", "model.pattern = (GL)*3, not (LG)*3"),
        ("data.document_masking=false", "data.document_masking = True, not False"),
    ],
)
def test_what_means_something_else_is_refused(after, said):
    base = ["model.attention.num_heads=4", "model.hidden_size=192", "model.intermediate_size=null"]
    assert said in fault(base, [*base, after])


def test_weights_are_compared_as_parts_of_all():
    two = ["data.sources.more.path=more"]
    weights = [*two, "data.sources.python.weight=1", "data.sources.more.weight=3"]
    same = [*two, "data.sources.python.weight=0.5", "data.sources.more.weight=1.5"]
    check_resume(load_config(QUICKSTART, weights), load_config(QUICKSTART, same), "ckpt")
    assert "data.sources.more.weight = 0.75 of all, not 0.6667 of all; " in fault(
        weights, [*weights, "data.sources.more.weight=2"]
    )
    assert "data.sources.more.weight = 0.75 of all, not None; " in fault(weights, two)
    third = [*weights, "data.sources.third.path=x", "data.sources.third.weight=1"]
    assert "data.sources.third.weight = None, not 0.2 of all; " in fault(weights, third)


def test_what_is_derived_stands_in_the_place_of_what_is_left_out():
    sizes = ["model.hidden_size=2048", "model.intermediate_size=null", "model.gdn.head_dim=96"]
    model = derived(load_config(QUICKSTART, sizes)).model
    assert model.intermediate_size == 256 * math.ceil(8 * 2048 / 3 / 256) == 5632
    assert (model.gdn.value_head_dim, model.attention.num_kv_heads) == (96, model.attention.num_heads)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_takes_what_is_not_finite(value):
    numbers = [(name, rules) for name, given, rules in keys(load_config(QUICKSTART)) if type(given) in (int, float)]
    assert len(numbers) > 50
    for name, rules in numbers:
        assert rules.choices or rules.fault(float(value)) == "it must be a finite number", name
    for name in ("optimizer.learning_rate", "optimizer.betas", "data.cache_limit", "data.sources.python.weight"):
        given = f"[0.9,.{value}]" if name == "optimizer.betas" else f".{value}".replace(".-", "-.")
        with pytest.raises(UserError, match=f"^{name} is .*; it must be a finite number"):
            load_config(QUICKSTART, [f"{name}={given.replace('.-', '-.')}"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.min_ratio=1.5", "optimizer.min_ratio is 1.5; it must be at least 0 and at most 1."),
        ("optimizer.decay_fraction=0", "it must be greater than 0 and at most 1."),
        ("model.lte.dropout=1", "it must be at least 0 and below 1."),
        ("model.lte.loss.increase=1", "it must be greater than 1."),
        ("model.lte.loss.tolerance=1", "it must be greater than 0 and below 1."),
        ("data.validation_fraction=1", "it must be at least 0 and below 1."),
        ("data.sources.python.weight=-1", "data.sources.python.weight is -1.0; it must be at least 0."),
        ("data.sources.python.format=csv", "data.sources.python.format is 'csv'; choose one of text, jsonl"),
        ("model.nsa.block_size=48", "model.nsa.block_size is 48; choose one of 16, 32, 64."),
        ("model.nsa.num_blocks=2", "it must be at least 3 and at most 64."),
        ("model.nsa.window_size=0", "it must be greater than 0."),
        ("model.nsa.num_kv_heads=3 model.pattern=N", "model.nsa.num_heads (32) must be a multiple of"),
        ("model.nsa.head_dim=63 model.pattern=N", "model.nsa.head_dim must be even"),
        ("tracking.wandb=on", "choose one of offline, online, disabled."),
        ("parallel.tensor=5", "does not divide model.intermediate_size (256)"),
    ],
)
def test_ranges_and_choices_are_told(override, said):
    base = ["model.vocab_size=8000", "model.hidden_size=60", "model.intermediate_size=null"]
    with pytest.raises(UserError) as caught:
        load_config(QUICKSTART, [*base, *override.split()])
    assert said in str(caught.value)


def test_bounds_that_a_range_includes_are_taken():
    load_config(QUICKSTART, ["optimizer.min_ratio=1", "optimizer.betas=[0,0.5]", "train.watch.restarts=0"])
