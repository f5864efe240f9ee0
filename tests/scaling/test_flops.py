"""FLOPs against torch's own counter on what the model runs, and against loops over what each query sees."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megahybrid.key import derived
from megahybrid.mixers import KINDS
from megahybrid.mixers.gdn import delta_rule
from megahybrid.model.context import Context
from megahybrid.model.stack import build
from megahybrid.scaling import flops
from megahybrid_kernels import Sequences
from megahybrid_kernels.causal_conv1d import causal_conv1d
from megahybrid_kernels.retention_router import retention_logits
from tests.model import tiny


def counted(function):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        function()
    return {op.__name__.split(".")[0]: count for op, count in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("pattern", ["G", "L", "S", "F", "N", "GLSFN"])
@pytest.mark.parametrize("tied", [True, False])
def test_projections_swiglu_and_output_layer_are_the_models_matrix_products(pattern, tied):
    config = tiny.config(pattern, tie_embeddings=tied)
    model, tokens, context = build(config, "cpu"), tiny.tokens((64,))[:-1], Context(Sequences.of((64,)))
    # F.linear is `mm`; the mixers' inner products are batched.
    products = counted(lambda: model.logits(model(tokens, context).hidden))["mm"]
    parts = flops.flops_per_token(config).parts
    expected = sum(
        count for name, count in parts.items() if name.endswith("projections") or name in ("SwiGLU", "output layer")
    )
    assert products == 64 * expected


def test_the_router_is_its_matrix_products():
    config = tiny.config("L")
    router = build(config, "cpu").layers["0"].mixer.router
    k = torch.randn(64, 2, 8)
    products = counted(lambda: retention_logits(k, k, router.parameters_for_op(), Sequences.of((64,))))
    assert products == {"bmm": 64 * KINDS["L"].flops(derived(config.model), 64)["router"]}


def test_the_short_convolution_is_its_convolutions():
    model = derived(tiny.config("G").model)
    widths = [2 * 4, 2 * 4, 2 * 6]
    expected = sum(
        sum(counted(lambda n=n: causal_conv1d(torch.randn(64, n), torch.randn(n, 4), Sequences.of((64,)))).values())
        for n in widths
    )
    assert 64 * KINDS["G"].flops(model, 64)["short convolution"] == expected


def chunked_delta_rule(q, k, v, chunk):
    """The delta rule without gates, in chunks, row by row, with no product that is not needed."""
    state, outputs = q.new_zeros(k.shape[1], v.shape[1]), []
    for begin in range(0, len(q), chunk):
        qs, ks, vs = (x[begin : begin + chunk] for x in (q, k, v))
        written = ks.new_zeros(0, v.shape[1])
        for i in range(len(qs)):
            u = vs[i : i + 1] - ks[i : i + 1] @ state - (ks[i : i + 1] @ ks[:i].T) @ written
            written = torch.cat([written, u])
            outputs.append(qs[i : i + 1] @ state + (qs[i : i + 1] @ ks[: i + 1].T) @ written)
        state = state + ks.T @ written
    return torch.cat(outputs)


@pytest.mark.parametrize("chunk", [1, 8, 32])
def test_the_delta_rule_is_counted_from_an_algorithm_that_computes_it(chunk):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(32, width, generator=generator, dtype=torch.float64) for width in (6, 6, 10))
    k = k / k.norm(dim=1, keepdim=True)
    state, recurrent = torch.zeros(6, 10, dtype=torch.float64), []
    for t in range(32):
        state = state + torch.outer(k[t], v[t] - state.T @ k[t])
        recurrent.append(state.T @ q[t])
    torch.testing.assert_close(chunked_delta_rule(q, k, v, chunk), torch.stack(recurrent))
    products = sum(counted(lambda: chunked_delta_rule(q, k, v, chunk)).values())
    assert products == 32 * delta_rule(6, 10, chunk)


@pytest.mark.parametrize("length", [1, 5, 8, 9, 13, 14, 64])
def test_attention_is_averaged_over_what_each_query_sees(length):
    model = derived(tiny.config("LSF").model)  # window 7; LTE: w 7, b 5
    full = sum(len([j for j in range(length) if j <= i]) for i in range(length))
    window = sum(len([j for j in range(length) if 0 <= i - j < 7]) for i in range(length))
    lte = sum(
        len([j for j in range(length) if 0 <= i - j <= 7]) + min(5, len([j for j in range(length) if i - j > 7]))
        for i in range(length)
    )
    a_key = 4 * 8 * 4  # heads of 8 channels, 2 products, 2 operations each
    assert length * KINDS["F"].flops(model, length)["attention"] == pytest.approx(a_key * full)
    assert length * KINDS["S"].flops(model, length)["attention"] == pytest.approx(a_key * window)
    assert length * KINDS["L"].flops(model, length)["attention"] == pytest.approx(a_key * lte)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 80, 150])
def test_sparse_attention_is_averaged_over_its_branches(length):
    model, seen = derived(tiny.config("N").model), 0  # blocks of 16, of which four are selected; window 21
    for i in range(length):
        blocks = [range(begin, min(begin + 16, length)) for begin in range(0, i + 1, 16)]
        pooled = [block for block in blocks if len(block) == 16 and block[-1] <= i]
        # Which ones does not matter, but for its own.
        selected = blocks if len(blocks) <= 4 else [*blocks[:3], blocks[-1]]
        window = [j for j in range(length) if 0 <= i - j < 21]
        seen += len(pooled) + sum(j <= i for block in selected for j in block) + len(window)
    assert length * KINDS["N"].flops(model, length)["attention"] == pytest.approx(4 * 8 * 4 * seen)


def test_training_is_three_times_the_forward_pass():
    """Torch's counter on forward and backward: every product of the model has two in its backward pass."""
    config = tiny.config("F")
    model, tokens, context = build(config, "cpu"), tiny.tokens((64,)), Context(Sequences.of((64,)))

    def added(total, a, b, *_, **__):  # to an input's gradient, which the counter does not know
        return 2 * a[0] * a[1] * b[1]

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added})
    with counter:
        model(tokens[:-1], context, tokens[1:]).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts[each] for each in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_))
    parts = flops.flops_per_token(config).parts
    assert products == 3 * 64 * sum(count for name, count in parts.items() if name != "full attention: attention")
    assert flops.flops_per_token(config).training == pytest.approx(3 * sum(parts.values()))


@pytest.mark.parametrize("pattern", ["F", "L", "GLSFN"])
def test_documents_of_several_lengths_count_by_their_tokens(pattern):
    """Each alone, summed token by token."""
    config, lengths = tiny.config(pattern), [64, 13, 13, 38]
    alone = [flops.layer(derived(config.model), letter, length) for length in lengths for letter in pattern]
    expected = sum(
        sum(each.values()) * length for each, length in zip(alone, [n for n in lengths for _ in pattern], strict=True)
    )
    found = flops.flops_per_token(config, {64: 64 / 128, 13: 26 / 128, 38: 38 / 128})
    assert found.forward - found.parts["output layer"] == pytest.approx(expected / 128)
    assert found.parts.keys() == flops.flops_per_token(config).parts.keys()
