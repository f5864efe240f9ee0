import pytest
import torch
from oracles_lte import (
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    assert_same_gradients,
    conv_router,
    cut,
    documents,
    leaf,
    random_pieces,
)

from megahybrid_kernels import Sequences
from megahybrid_kernels.counter_dropout import fold, keep_mask
from megahybrid_kernels.retention_router import (
    Dropout,
    RouterParameters,
    RouterState,
    margin,
    retention_logits,
    retention_scores_streamed,
)

TOLERANCES = {torch.float64: FLOAT64_TOLERANCE, torch.float32: FLOAT32_TOLERANCE}


def random_router(heads: int, head_dim: int, seed: int, kernel_size: int = 3) -> RouterParameters:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    channels = [2 * head_dim, head_dim, head_dim // 2, head_dim // 4]
    weights = tuple(normal(heads * o, i, kernel_size, scale=(1 / i) ** 0.5) for i, o in zip(channels, channels[1:]))  # noqa: B905, RUF007
    biases = tuple(normal(heads * o) for o in channels[1:])
    return RouterParameters(weights, biases, normal(heads, channels[3], scale=2.0), normal(heads, scale=0.1))


def leaves(parameters: RouterParameters, dtype: torch.dtype) -> RouterParameters:
    def leaf_of(x):
        return x.detach().to(dtype).clone().requires_grad_()

    return RouterParameters(
        tuple(map(leaf_of, parameters.weights)),
        tuple(map(leaf_of, parameters.biases)),
        leaf_of(parameters.projection),
        leaf_of(parameters.projection_bias),
    )


def named(parameters: RouterParameters) -> dict[str, torch.Tensor]:
    pairs = {f"weight{i}": x for i, x in enumerate(parameters.weights)}
    pairs |= {f"bias{i}": x for i, x in enumerate(parameters.biases)}
    return pairs | {"projection": parameters.projection, "projection_bias": parameters.projection_bias}


def integer_hash(key: int, layer: int, channel: int) -> int:
    x = key ^ fold(layer, channel)
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize("lengths", [(1,), (3, 1, 2, 40, 9), (57, 64)])
@pytest.mark.parametrize("kernel_size, dilation", [(3, 2), (5, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_outputs_and_gradients(lengths, kernel_size, dilation, dtype):
    heads, head_dim = 3, 8
    k, v = (leaf(sum(lengths), heads, head_dim, seed=i, dtype=dtype) for i in range(2))
    actual = leaves(random_router(heads, head_dim, 1, kernel_size), dtype)
    expected = leaves(actual, torch.float64)
    logits = retention_logits(k[0], v[0], actual, Sequences.of(lengths), dilation=dilation)
    assert logits.dtype == dtype
    pairs = {"k": k, "v": v} | {name: (x, named(expected)[name]) for name, x in named(actual).items()}
    assert_same_gradients(logits, conv_router(k[1], v[1], expected, lengths, dilation), pairs, TOLERANCES[dtype])


def test_bfloat16_is_computed_in_float32():
    k, v = (leaf(40, 2, 8, seed=i, dtype=torch.bfloat16) for i in range(2))
    parameters = leaves(random_router(2, 8, 1), torch.bfloat16)
    logits = retention_logits(k[0], v[0], parameters, Sequences.of([40]))
    assert logits.dtype == torch.float32
    expected = conv_router(k[1], v[1], leaves(parameters, torch.float64), (40,), 2)
    torch.testing.assert_close(logits.double(), expected, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


def test_dropout_is_the_hash_and_does_not_depend_on_the_layout():
    lengths, heads, head_dim, probability = (5, 31, 1, 20), 4, 8, 0.3
    k, v = (leaf(57, heads, head_dim, seed=i) for i in range(2))
    parameters = random_router(heads, head_dim, 1)
    keys = fold(1234, 7, Sequences.of(lengths).index, Sequences.of(lengths).positions)
    keep = [
        torch.tensor([[integer_hash(key, layer, c) >= probability * 2**32 for c in range(heads * w.shape[1])]
                      for key in keys.tolist()])
        for layer, w in enumerate(parameters.weights)
    ]  # fmt: skip
    logits = retention_logits(k[0], v[0], parameters, Sequences.of(lengths), Dropout(probability, keys))
    expected = conv_router(k[1], v[1], parameters, lengths, 2, keep, probability)
    assert_same_gradients(logits, expected, {"k": k, "v": v}, FLOAT64_TOLERANCE)

    order = [2, 0, 3, 1]
    rows = torch.cat([torch.arange(57)[documents(lengths)[n]] for n in order])
    moved = retention_logits(
        k[0][rows], v[0][rows], parameters, Sequences.of([lengths[n] for n in order]), Dropout(probability, keys[rows])
    )
    torch.testing.assert_close(moved, logits[rows], rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)

    second = RouterParameters(
        tuple(x.chunk(2)[1] for x in parameters.weights),
        tuple(x.chunk(2)[1] for x in parameters.biases),
        parameters.projection[2:],
        parameters.projection_bias[2:],
    )
    dropout = Dropout(probability, keys, channel_offset=2 * 2 * head_dim)
    sharded = retention_logits(k[0][:, 2:], v[0][:, 2:], second, Sequences.of(lengths), dropout)
    torch.testing.assert_close(sharded, logits[:, 2:], rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_masks_are_uniform_and_uncorrelated(probability):
    keys = fold(42, 3, torch.arange(1024))
    masks = torch.stack([keep_mask(keys[:, None], layer, torch.arange(256), probability) for layer in range(2)])
    dropped = (~masks).double()
    error = (probability * (1 - probability) / dropped.numel()) ** 0.5
    assert abs(dropped.mean() - probability) <= 5 * error
    if probability == 0:
        return
    for count, means in ((1024, dropped[0].mean(0)), (256, dropped[0].mean(1))):
        spread = means.std() / (probability * (1 - probability) / count) ** 0.5
        assert 0.8 < spread < 1.2
    centred = (dropped - probability) / (probability * (1 - probability)) ** 0.5
    limit = 5 / dropped[0].numel() ** 0.5
    assert (centred[0] * centred[1]).mean().abs() < limit
    assert (centred[0][:, 1:] * centred[0][:, :-1]).mean().abs() < limit
    assert (centred[0][1:] * centred[0][:-1]).mean().abs() < limit


def test_fold():
    counters = torch.arange(1 << 17)
    keys = fold(1, counters)
    assert keys.min() >= 0 and keys.max() < 2**32
    assert keys[77] == fold(1, 77)
    assert fold(torch.tensor(-5), 2**40 + 3) == fold(-5, torch.tensor(2**40 + 3))
    assert keys.unique().numel() > counters.numel() - 10
    assert len({fold(1, 2), fold(2, 1), fold(1, 2, 0), fold(2), fold(0, 1, 2), fold(2**32 + 1, 2)}) == 6
    bits = (keys[:, None] >> torch.arange(32)) & 1
    assert (bits.double().mean(0) - 0.5).abs().max() < 5 * 0.5 / counters.numel() ** 0.5


def test_pieces_equal_one_pass_save_for_the_margin():
    heads, head_dim = 3, 8
    for kernel_size, dilation in ((3, 2), (5, 1)):
        delay = margin(kernel_size, dilation)
        assert delay == 6
        parameters = random_router(heads, head_dim, 1, kernel_size)
        pieces = random_pieces(count=4, rounds=12, seed=3)
        lengths = tuple(map(sum, zip(*pieces, strict=True)))
        k, v = (leaf(sum(lengths), heads, head_dim, seed=i)[1].detach() for i in range(2))
        expected = torch.sigmoid(conv_router(k, v, parameters, lengths, dilation)) - 0.5
        streamed = torch.full_like(expected, torch.nan)
        state = RouterState.empty(4, parameters, dilation)
        for sequences, rows in cut(pieces):
            score, state = retention_scores_streamed(k[rows], v[rows], parameters, sequences, state, dilation)
            streamed[rows] = score
        for rows in documents(lengths):
            torch.testing.assert_close(
                streamed[rows][delay:], expected[rows][:-delay], rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE
            )


def test_refuses_what_does_not_fit():
    k = torch.zeros(5, 2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="odd"):
        retention_logits(k, k, random_router(2, 8, 1, kernel_size=4), Sequences.of([5]))
    with pytest.raises(ValueError, match="channels"):
        retention_logits(k, k, random_router(2, 16, 1), Sequences.of([5]))
    with pytest.raises(ValueError, match="probability"):
        dropout = Dropout(1.0, torch.zeros(5, dtype=torch.int64))
        retention_logits(k, k, random_router(2, 8, 1), Sequences.of([5]), dropout)


def test_sequences_that_begin_need_no_state():
    k, v = torch.randn(2, 12, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters, sequences = random_router(2, 8, 1), Sequences.of([12])
    scores, state = retention_scores_streamed(k, v, parameters, sequences, None)
    expected, after = retention_scores_streamed(k, v, parameters, sequences, RouterState.empty(1, parameters))
    assert all(map(torch.equal, (scores, *state.rows), (expected, *after.rows)))
    later = Sequences.of([12], starts=torch.tensor([3]))
    with pytest.raises(ValueError, match="no state of their earlier tokens"):
        retention_scores_streamed(k, v, parameters, later, None)
