"""What a layout is expected to take, beside what layouts took (docs/performance/layouts.md) and beside closed forms."""

from dataclasses import fields
from pathlib import Path

import pytest

from megahybrid.config import load_config
from megahybrid.errors import UserError
from megahybrid.scaling.layouts import (
    CLUSTER,
    Layout,
    Seconds,
    crossing,
    exchanged,
    fitting,
    handed_on,
    seconds,
    volumes,
)
from megahybrid.scaling.memory import peak_bytes
from megahybrid.scaling.plan import recommend
from megahybrid.scaling.splitting import split_matrices

RECIPES = Path(__file__).parents[2] / "recipes"


def config_of(recipe, samples, micro, more=(), **parallel):
    keys = [f"parallel.{key}={value}" for key, value in parallel.items()]
    batch = [f"train.global_batch_size={samples}", f"train.micro_batch_size={micro}"]
    return load_config(RECIPES / f"{recipe}.yaml", [*batch, *keys, *more])


@pytest.mark.parametrize(
    ("recipe", "samples", "micro", "replicas", "share", "parallel"),
    [
        ("lalte-1.4b", 64, 4, 2, 0.99, {}),
        ("lalte-1.4b", 64, 8, 1, 0.83, {"tensor": 2, "sequence": "true"}),
        ("lalte-1.4b", 64, 4, 1, 0.88, {"pipeline": 2}),
        ("lalte-1.4b", 32, 4, 1, 0.82, {"pipeline": 2}),
        ("lalte-0.4b", 128, 8, 2, 0.98, {}),
        ("lalte-0.4b", 128, 8, 1, 0.88, {"pipeline": 2}),
        ("lalte-0.4b", 128, 16, 1, 0.77, {"tensor": 2, "sequence": "true"}),
    ],
)
def test_two_gpus_have_the_measured_share(recipe, samples, micro, replicas, share, parallel):
    found = seconds(config_of(recipe, samples, micro, **parallel), replicas)
    assert share - 0.005 < found.share < share + 0.05  # ranks also wait for each other
    assert found.step == pytest.approx(sum(getattr(found, each.name) for each in fields(Seconds)))


def test_replicas_expose_what_lasts_longer_than_the_backward_pass():
    """On 64 GPUs, eight a host: a ring over hosts takes all that a host's eight give, but no more than NVLink."""
    config = config_of("lalte-1.4b", 256, 4)
    found, parameters = seconds(config, 64), 1.343e9
    link = min(8 * 40e9, 300e9)
    assert found.weights == pytest.approx(2 * parameters * 63 / 64 / link, rel=0.01)
    assert found.gradients == pytest.approx(4 * 4e7 * 63 / 64 / link, rel=0.01)  # the last bucket
    split = sum(split_matrices(config_of("lalte-1.4b", 256, 4, zero_stage=3), 64).values())
    by_three = seconds(config_of("lalte-1.4b", 256, 4, zero_stage=3), 64)
    passes = 0.54 * 2 * 2 * split * 63 / 64 / link  # forward and backward
    assert by_three.weights == pytest.approx(2 * (parameters - split) * 63 / 64 / link + passes, rel=0.01)
    by_one = seconds(
        config_of("lalte-1.4b", 512, 8, tensor=8, sequence="true"), 64
    )  # a GPU a host for each of 8 groups
    assert by_one.weights == pytest.approx(2 * parameters / 8 * 63 / 64 / 40e9, rel=0.02)
    hidden = by_one.kernels * 1.06**3 * 2 / 3
    reduced = 4 * parameters / 8 * 63 / 64 / 40e9
    assert by_one.gradients == pytest.approx(max(reduced - hidden, 4 * 4e7 * 63 / 64 / 40e9), rel=0.1)


def test_context_parallel_ranks_exchange_and_hand_on_their_own_tokens():
    whole, parts = (config_of("lalte-1.4b", 64, 4, tensor=2, pipeline=2, context=ranks) for ranks in (1, 2))
    assert exchanged(parts) == exchanged(whole) / 2 and handed_on(parts) == handed_on(whole) / 2
    # Of full attention q, k, v and o of 16 heads of 64 channels, of Gated DeltaNet every other rank's maps and three
    # rows, of LTE without a cap rows for the router, the window and retained tokens, for which there is twice room.
    exchanging, keeping = 4 * 1024 * 8192 / 2, 8 * (128 * 256 * 2 + 3 * 384)
    config = config_of("lalte-0.4b", 64, 4, context=2)
    retained = 16 * ((6 + 768 + 1024 + 6) * 256 + 1024 * (256 + 8))
    assert crossing(config, "GF") == 2 * 2 * (exchanging + keeping) and crossing(config, "L") == 2 * retained
    assert seconds(config, 2).context == pytest.approx(8 * crossing(config, "GL" * 12) / 300e9)
    found = recommend(config, 4)
    assert "4 GPUs: tensor × context × pipeline × data" in found and "\n1 × 2 × 1 × 2, ZeRO 1 " in found


def test_the_host_bounds_a_short_sample_over_context_ranks():
    """Of four H100s (docs/performance/context.md)."""
    for tokens, measured, bound in ((65536, 0.399, True), (262144, 0.474, False)):
        keys = [f"train.seq_length={tokens}", "train.recompute=none", "model.lte.train_cap=true"]
        found = seconds(config_of("lalte-0.4b", 1, 1, more=keys, context=4), 1)
        assert found.step == pytest.approx(measured, rel=0.12) and (found.smaller > 0.1) == bound


def test_a_pipeline_waits_for_its_first_and_last_micro_batches():
    plain, interleaved = (
        seconds(config_of("gdn-1.4b", 64, 4, pipeline=4, virtual_pipeline=chunks), 1) for chunks in (1, 2)
    )
    assert plain.bubble == pytest.approx((plain.kernels + plain.smaller) * 3 / 16)
    assert interleaved.bubble == pytest.approx((interleaved.kernels + interleaved.smaller) * 3 / 32)
    assert plain.transfers == pytest.approx(2 * 16 * 4 * 4096 * 2048 * 2 / 300e9) and not interleaved.transfers


def test_what_is_sent_is_what_the_parts_have():
    config = config_of("lalte-1.4b", 64, 8, tensor=2, sequence="true")
    found = {each.part: each for each in volumes(Layout(config, 4, seconds(config, 4)))}
    assert sum(each.gradients for each in found.values()) == pytest.approx(1.343e9 / 2 * 4 * 3 / 4, rel=0.01)
    assert found["embedding and output"].activations == 0
    whole = 8 * 4096 * 2048 * 2
    assert found["LTE layers"].activations == 12 * 2 * 8 * whole / 2  # layers, micro-batches, exchanges
    assert found["LTE layers"].gradients < found["Gated DeltaNet layers"].gradients


@pytest.mark.parametrize("gpus", [4])
def test_layouts_that_are_recommended_fit_and_use_all_gpus(gpus):
    config = config_of("lalte-1.4b", 256, 4)
    found = fitting(config, gpus)
    assert len(found) == 5 and len({repr(each.config.parallel) for each in found}) == 5
    assert [each.seconds.step for each in found] == sorted(each.seconds.step for each in found)
    for each in found:
        parallel = each.config.parallel
        assert parallel.tensor * parallel.pipeline * each.replicas == gpus
        assert max(peak_bytes(each.config, each.replicas)) <= CLUSTER.memory
    assert (found[0].config.parallel.tensor, found[0].config.parallel.zero_stage) == (1, 1)
    assert "Recommended: the recipe as it is\n" in recommend(config, gpus)
    other = config_of("lalte-1.4b", 256, 8, zero_stage=3)
    assert found[0].changes(other) == "parallel.zero_stage=1 train.micro_batch_size=4"


@pytest.mark.parametrize(("gpus", "samples"), [(64, 256), (512, 2048)])
def test_the_page_has_what_the_plan_says(gpus, samples):
    page = (RECIPES.parent / "docs" / "parallelism.md").read_text()
    assert recommend(config_of("lalte-1.4b", samples, 4), gpus) in page


def test_a_model_that_is_too_large_for_plain_replicas_is_split():
    large = config_of("lalte-1.4b", 256, 4)
    large.model.hidden_size, large.model.intermediate_size, large.model.pattern = 4096, 11008, "(GL)*20"
    for each in fitting(large, 4):
        parallel = each.config.parallel
        assert parallel.tensor * parallel.pipeline > 1 or parallel.zero_stage > 1
    large.model.hidden_size = 2**15
    with pytest.raises(UserError, match="No layout of 8 GPUs fits this recipe into"):
        recommend(large, 8)


def test_a_number_of_gpus_that_divides_nothing_is_not_said_to_lack_memory():
    with pytest.raises(UserError, match=r"No layout of 7 GPUs divides this recipe, .* is 256;"):
        recommend(config_of("lalte-1.4b", 256, 4), 7)
