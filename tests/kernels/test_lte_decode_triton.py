"""Decoding with the Triton kernels: on a GPU where there is one, else on Triton's interpreter."""

import pytest
import torch
from cases import interpreted
from oracles_lte import FLOAT32_TOLERANCE, dense_lte_attention, leaf, streaming_buffer
from test_exit_positions import tied_scores

from megahybrid_kernels import Sequences, targets
from megahybrid_kernels.lte_attention import LTECache, lte_attention_with_cache, triton_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


SIZES, GROUPS = [(6, 4, 5, 6), (9, 0, 3, 6), (0, 1, 2, 0), (40, 2, 8, 6)], [(2, 1), (6, 24), (6, 1), (2, 24)]


@pytest.mark.parametrize(
    "window_size, sink_size, buffer_size, delay, query_heads, programs",
    interpreted(
        [(*sizes, *group) for sizes, group in zip(SIZES, GROUPS, strict=True)],
        [(*sizes, *group) for sizes in SIZES for group in GROUPS],
    ),
)
def test_steps_equal_the_whole(window_size, sink_size, buffer_size, delay, query_heads, programs, monkeypatch):
    monkeypatch.setattr(triton_decode, "_SLOTS", 16)
    monkeypatch.setattr(triton_decode, "_PROGRAMS", programs)
    heads, head_dim, total, count = 2, 16, 32, 2
    lengths = (total,) * count
    q, k, v = (
        leaf(total * count, h, head_dim, seed=i, dtype=torch.float32)[0].detach()
        for i, h in enumerate((query_heads, heads, heads))
    )
    score = tied_scores(total * count, heads, seed=5, levels=5)
    expected = dense_lte_attention(
        q.double(), k.double(), v.double(), score.double(), lengths, window_size, sink_size, buffer_size
    )
    rows = torch.arange(total * count).view(count, total)
    # A score comes `delay` tokens late; before the first one there is nothing to be read.
    late = torch.full((count, total, heads), torch.nan)
    late[:, delay:] = score.view(count, total, heads)[:, : total - delay]
    cache = LTECache.empty(count, heads, head_dim, window_size, buffer_size, dtype=torch.float32)
    prefill = torch.tensor([7, 11])
    parts = [rows[n, : prefill[n]] for n in range(count)]
    first = torch.cat(parts)
    sequences = Sequences.of(prefill.tolist(), starts=torch.zeros(count, dtype=torch.int64))
    late_rows = late.flatten(0, 1)
    _, cache = lte_attention_with_cache(
        q[first], k[first], v[first], late_rows[first], cache, sequences, window_size, sink_size, buffer_size, delay
    )
    cache = LTECache(*(x.clone().to(DEVICE) for x in vars(cache).values()))
    for step in range(total - int(prefill.max())):
        positions = prefill + step
        new = rows.gather(1, positions[:, None])[:, 0]
        own_q, own_k, own_v, own_score = (x[new].to(DEVICE) for x in (q, k, v, late_rows))
        own_v = torch.cat([own_k, own_v], 1)[:, heads:]  # as a part of a product with others
        o = triton_decode.lte_attention_step(
            own_q, own_k, own_v, own_score, cache, positions.to(DEVICE), sink_size, delay
        )
        torch.testing.assert_close(o.cpu().double(), expected[new], rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
    for n in range(count):
        for head in range(heads):
            values = score.view(count, total, heads)[n, :, head].tolist()
            held, _ = streaming_buffer(values, window_size, sink_size, buffer_size)
            found = cache.buffer_positions[n, head].cpu()
            assert sorted(found[found >= 0].tolist()) == held[int(positions[n]) + 1]


def test_steps_by_a_table_whose_compiler_chooses_no_pointers(monkeypatch):
    monkeypatch.setattr(targets, "FORCED", "cdna3")
    test_steps_equal_the_whole(6, 4, 5, 6, 2, 1, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_cache_can_be_written_in_place(dtype):
    """Contiguous, and no tensor of it in another's memory."""
    parts = vars(LTECache.empty(2, 3, 16, 6, 5, dtype=dtype)).values()
    assert all(part.is_contiguous() for part in parts)
    assert len({part.untyped_storage().data_ptr() for part in parts}) == len(parts)
