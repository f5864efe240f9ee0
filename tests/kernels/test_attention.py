import itertools
from importlib import import_module

import pytest
import torch
from oracles_lte import (
    BFLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    assert_same_gradients,
    causal_mask,
    cut,
    dense_attention,
    documents,
    leaf,
    random_pieces,
)

from megahybrid_kernels import Sequences
from megahybrid_kernels.attention import GrowingCache, KeyValueCache, attention, attention_with_cache
from megahybrid_kernels.attention.reference import query_blocks

attention_module = import_module("megahybrid_kernels.attention")
TOLERANCES = {
    torch.float64: FLOAT64_TOLERANCE,
    torch.float32: FLOAT32_TOLERANCE,
    torch.bfloat16: BFLOAT16_TOLERANCE,
}


def oracle(q, k, v, lengths, window_size):
    return torch.cat(
        [
            dense_attention(
                q[r], k[r], v[r], causal_mask(r.stop - r.start, window_size)[None].expand(k.shape[1], -1, -1)
            )
            for r in documents(lengths)
        ]
    )


@pytest.mark.parametrize("window_size", [None, 1, 10, 64])
@pytest.mark.parametrize("lengths", [(1,), (3, 1, 2, 40, 9), (131, 1, 300, 128), (129,)])
@pytest.mark.parametrize(
    "query_heads, heads, dtype",
    [(2, 2, torch.float64), (6, 2, torch.float64), (6, 2, torch.float32), (4, 1, torch.bfloat16)],
)
def test_outputs_and_gradients(lengths, window_size, query_heads, heads, dtype):
    tokens = sum(lengths)
    q, k, v = (leaf(tokens, h, 8, seed=i, dtype=dtype) for i, h in enumerate((query_heads, heads, heads)))
    o = attention(q[0], k[0], v[0], Sequences.of(lengths), window_size)
    assert o.dtype == dtype
    expected = oracle(q[1], k[1], v[1], lengths, window_size)
    assert_same_gradients(o, expected, {"q": q, "k": k, "v": v}, TOLERANCES[dtype])
    with torch.no_grad():
        torch.testing.assert_close(attention(q[0], k[0], v[0], Sequences.of(lengths), window_size), o)


def empty_cache(count, window_size):
    if window_size is None:
        return GrowingCache.empty(count, 2, 8, dtype=torch.float64)
    return KeyValueCache.empty(count, 2, 8, window_size, dtype=torch.float64)


@pytest.mark.parametrize("window_size", [None, 1, 10, 64])
def test_pieces_with_a_cache_equal_one_pass(window_size):
    pieces = random_pieces(count=3, rounds=14, seed=1)
    lengths = tuple(map(sum, zip(*pieces, strict=True)))
    q, k, v = (leaf(sum(lengths), h, 8, seed=i)[1].detach() for i, h in enumerate((4, 2, 2)))
    expected = oracle(q, k, v, lengths, window_size)
    cache = empty_cache(3, window_size)
    for sequences, rows in cut(pieces):
        outputs = []
        for use in (rows, rows.flip(0), rows):  # what a cache is asked for must not change what it answers next
            o, new = attention_with_cache(q[use], k[use], v[use], cache, sequences, window_size)
            outputs.append(o)
        torch.testing.assert_close(o, expected[rows], rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)
        assert torch.equal(outputs[0], outputs[2])
        cache = new


def test_growing_cache_copies_only_when_it_is_full_or_forked():
    k = torch.randn(200, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cache, rooms = GrowingCache.empty(1, 2, 8, dtype=torch.float64), []
    for position in range(200):
        row = k[position : position + 1]
        older, cache = cache, cache.append(row, row, Sequences.of([1], starts=torch.tensor([position])))
        if not rooms or cache.room is not rooms[-1]:
            rooms.append(cache.room)
    assert [room.k.shape[2] for room in rooms] == [64, 128, 256]
    assert torch.equal(cache.k[0].transpose(0, 1), k)
    fork = older.append(-k[:1], k[:1], Sequences.of([1], starts=torch.tensor([199])))
    assert torch.equal(fork.k[0, :, 199], -k[0]) and torch.equal(cache.k[0, :, 199], k[199])


def test_growing_cache_selects_and_joins_sequences():
    k = torch.randn(100, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = GrowingCache.empty(2, 2, 8, dtype=torch.float64).append(k, -k, Sequences.of([3, 97]))
    short, long = both.select([0]), both.select([1])
    joined = long.join(short).join(GrowingCache.empty(1, 2, 8, dtype=torch.float64))
    assert joined.lengths == (97, 3, 0)
    assert torch.equal(joined.k[0].transpose(0, 1), k[3:]) and torch.equal(joined.v[1, :, :3].transpose(0, 1), -k[:3])
    more = joined.append(k[:3], k[:3], Sequences.of([1, 1, 1], starts=torch.tensor([97, 3, 0])))
    assert torch.equal(more.k[1, :, 3], k[1]) and torch.equal(more.k[2, :, 0], k[2])


@pytest.mark.parametrize(("first", "second"), [(100, 10), (97, 3), (100, 70), (3, 5)])
def test_growing_caches_that_began_apart_are_joined(first, second):
    k = torch.randn(first + second, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    empty = GrowingCache.empty(1, 2, 8, dtype=torch.float64)
    one = empty.append(k[:first], -k[:first], Sequences.of([first]))
    other = empty.append(k[first:], -k[first:], Sequences.of([second]))
    joined = one.join(other)
    assert joined.lengths == (first, second) and joined.capacity == max(one.capacity, other.capacity)
    assert torch.equal(joined.packed(joined.room.k), k) and torch.equal(joined.packed(joined.room.v), -k)


def test_a_sequence_that_begins_in_memory_keeps_it():
    k = torch.randn(180, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    room = GrowingCache.empty(1, 2, 8, dtype=torch.float64).with_room(4096)
    assert room.append(k[:100], k[:100], Sequences.of([100])).capacity == 4096
    both = GrowingCache.empty(2, 2, 8, dtype=torch.float64).with_room(100)
    begun, waiting = both.select([0]), both.select([1])
    begun = begun.append(k[:100], k[:100], Sequences.of([100]))
    joined = begun.join(waiting.append(k[100:], k[100:], Sequences.of([80])))
    assert joined.lengths == (100, 80) and torch.equal(joined.packed(joined.room.k), k)


@pytest.mark.parametrize("window_size", [None, 10])
def test_gradients_through_the_cache(window_size):
    lengths = (40, 3, 300)
    pairs = {name: leaf(343, h, 8, seed=i) for i, (name, h) in enumerate({"q": 4, "k": 2, "v": 2}.items())}
    cache = empty_cache(3, window_size)
    o, _ = attention_with_cache(*(p[0] for p in pairs.values()), cache, Sequences.of(lengths), window_size)
    expected = oracle(*(p[1] for p in pairs.values()), lengths, window_size)
    assert_same_gradients(o, expected, pairs, FLOAT64_TOLERANCE)


def test_query_blocks_cover_every_row_once_with_all_its_keys():
    lengths = (5, 300, 1, 1, 100, 60, 128, 129, 2)
    documents_of = documents(lengths)
    blocks = query_blocks(lengths, 128)
    assert [b[0] for b in blocks] + [sum(lengths)] == [0] + [b[1] for b in blocks]
    for first, end, first_key in blocks:
        assert end - first <= 128
        assert first_key == next(d.start for d in documents_of if d.start <= first < d.stop)
    assert len(query_blocks((3,) * 1000, 128)) == 24


def test_refuses_what_does_not_fit():
    q, k = torch.zeros(5, 4, 8), torch.zeros(5, 2, 8)
    with pytest.raises(ValueError, match="at least 1"):
        attention(q, k, k, Sequences.of([5]), 0)
    with pytest.raises(ValueError, match="5 tokens"):
        attention(q, k, k, Sequences.of([6]))
    with pytest.raises(ValueError, match="fit together"):
        attention(q[:, :3], k, k, Sequences.of([5]))
    with pytest.raises(ValueError, match="slots"):
        attention_with_cache(q, k, k, KeyValueCache.empty(1, 2, 8, 4, dtype=q.dtype), Sequences.of([5]), 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window_size", [None, 10])
@pytest.mark.parametrize("heads", [6, 2])
def test_flash_attention_on_a_gpu(heads, window_size):
    lengths = (131, 1, 300)
    pairs = {name: leaf(432, h, 64, seed=i, dtype=torch.bfloat16) for i, (name, h) in
             enumerate({"q": 6, "k": heads, "v": heads}.items())}  # fmt: skip
    on_gpu = [pair[0].cuda() for pair in pairs.values()]
    o = attention(*on_gpu, Sequences.of(lengths, "cuda"), window_size)
    expected = oracle(*(pair[1] for pair in pairs.values()), lengths, window_size)
    assert_same_gradients(o.cpu(), expected, pairs, BFLOAT16_TOLERANCE)


def packed_oracle(q, k, v, queries, keys, window_size):
    """Each sequence's last query sees its last key; a sequence may have keys only."""
    found = torch.full_like(q, torch.nan)
    borders = zip(*(x.cu_seqlens.tolist() for x in (queries, keys)), strict=True)
    for (first, begin), (last, end) in itertools.pairwise(borders):
        if last > first:
            padded = torch.cat([torch.zeros(end - begin - (last - first), *q.shape[1:], dtype=q.dtype), q[first:last]])
            mask = causal_mask(end - begin, window_size)[None].expand(k.shape[1], -1, -1)
            found[first:last] = dense_attention(padded, k[begin:end], v[begin:end], mask)[first - last :]
    return found


@pytest.mark.parametrize("window_size", [None, 1, 10, 64])
def test_pieces_through_packed_attention(window_size, monkeypatch):
    """The way of a GPU, with the definition in the place of flash attention."""
    monkeypatch.setattr(attention_module, "_takes_varlen", lambda q: True)
    monkeypatch.setattr(attention_module, "_varlen", packed_oracle)
    pieces = [(1, 12, 3), *random_pieces(count=3, rounds=14, seed=1)]
    lengths = tuple(map(sum, zip(*pieces, strict=True)))
    q, k, v = (leaf(sum(lengths), h, 8, seed=i)[1].detach() for i, h in enumerate((4, 2, 2)))
    expected = oracle(q, k, v, lengths, window_size)
    cache = slow = empty_cache(3, window_size)
    for number, (sequences, rows) in enumerate(cut(pieces)):
        first = sequences if number else Sequences.of(sequences.lengths)
        with torch.no_grad():
            o, cache = attention_with_cache(q[rows], k[rows], v[rows], cache, first, window_size)
        torch.testing.assert_close(o, expected[rows], rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)
        if window_size is not None:
            _, slow = attention_with_cache(q[rows], k[rows], v[rows], slow, sequences, window_size)
            for one, other in zip(vars(cache).values(), vars(slow).values(), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("window_size, most, calls", [(None, 4, 6), (None, 7, 3), (10, 4, 8), (10, 7, 5)])
def test_more_sequences_than_flash_attention_takes(window_size, most, calls, monkeypatch):
    """They go in parts, also where each has the blanks of a ring beside it."""
    counts = []

    def flash(q, k, v, query_borders, key_borders, longest_query, longest_key, window_size):
        counts.append(len(query_borders) - 1)
        assert query_borders[0] == key_borders[0] == 0
        assert query_borders[-1] == len(q) and key_borders[-1] == len(k)
        borders = (Sequences(x, ()) for x in (query_borders, key_borders))
        return packed_oracle(q, k, v, *borders, None if window_size[0] < 0 else window_size[0] + 1)

    monkeypatch.setattr(attention_module, "_takes_varlen", lambda q: True)
    monkeypatch.setattr(attention_module, "_MOST_SEQUENCES", most)
    monkeypatch.setattr(attention_module, "varlen_attn", flash)
    pieces = [(1, 12, 3, 2, 5, 7, 4), (3, 1, 9, 2, 2, 6, 1)]
    lengths = tuple(map(sum, zip(*pieces, strict=True)))
    q, k, v = (leaf(sum(lengths), h, 8, seed=i)[1].detach() for i, h in enumerate((4, 2, 2)))
    expected = oracle(q, k, v, lengths, window_size)
    whole = attention_module.attention(q, k, v, Sequences.of(lengths), window_size)
    torch.testing.assert_close(whole, expected, rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)
    cache = empty_cache(len(lengths), window_size)
    for number, (sequences, rows) in enumerate(cut(pieces)):
        first = sequences if number else Sequences.of(sequences.lengths)
        with torch.no_grad():
            o, cache = attention_with_cache(q[rows], k[rows], v[rows], cache, first, window_size)
        torch.testing.assert_close(o, expected[rows], rtol=FLOAT64_TOLERANCE, atol=FLOAT64_TOLERANCE)
    assert max(counts) <= most and len(counts) == calls


@pytest.mark.gpu
def test_long_prompts_of_one_length(monkeypatch):
    """By scaled_dot_product_attention, on a GPU in bf16 cuDNN's."""
    monkeypatch.setattr(attention_module, "_LONG", 1)
    monkeypatch.setattr(attention_module, "_takes_varlen", lambda q: True)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float64)
    q, k, v = (leaf(3 * 150, h, 64, seed=i)[1].detach().to(dtype) for i, h in enumerate((4, 2, 2)))
    expected = oracle(q.double(), k.double(), v.double(), (150,) * 3, None)
    cache, sequences = GrowingCache.empty(3, 2, 64, dtype=dtype, device=device), Sequences.of((150,) * 3, device)
    with torch.no_grad():
        o, cache = attention_with_cache(*(x.to(device) for x in (q, k, v)), cache, sequences)
    torch.testing.assert_close(o.cpu().double(), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert torch.equal(cache.packed(cache.v).cpu(), v)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window_size", [None, 10, 64])
def test_pieces_on_a_gpu(window_size):
    pieces = [(1, 12, 3), *random_pieces(count=3, rounds=14, seed=1)]
    lengths = tuple(map(sum, zip(*pieces, strict=True)))
    q, k, v = (leaf(sum(lengths), h, 64, seed=i)[1].detach() for i, h in enumerate((4, 2, 2)))
    q, k, v = (x.bfloat16() for x in (q, k, v))
    expected = oracle(q.double(), k.double(), v.double(), lengths, window_size)
    kind, sizes = (GrowingCache, ()) if window_size is None else (KeyValueCache, (window_size,))
    cache = kind.empty(3, 2, 64, *sizes, dtype=q.dtype, device="cuda")
    for number, (sequences, rows) in enumerate(cut(pieces)):
        starts = sequences.starts.cuda() if number else None
        with torch.no_grad():
            o, cache = attention_with_cache(
                *(x[rows].cuda() for x in (q, k, v)),
                cache,
                Sequences.of(sequences.lengths, "cuda", starts),
                window_size,
            )
        torch.testing.assert_close(o.cpu().double(), expected[rows], rtol=BFLOAT16_TOLERANCE, atol=BFLOAT16_TOLERANCE)
