"""The gated delta rule of rows that follow each other, in Triton, against the recurrence over all of their tokens."""

from __future__ import annotations

import pytest
import torch
from test_gated_delta_rule import NAMES, change, make_inputs, oracle
from test_gated_delta_rule_triton import CUT, DEVICE, WHOLE, in_dtype

from megahybrid_kernels import Sequences
from megahybrid_kernels.gated_delta_rule import Border
from megahybrid_kernels.gated_delta_rule import triton as gdn

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TOKENS, ROWS = 70, 3
# Documents that end one token before, at and after a border, end in a row that they began in, and span all rows.
PACKINGS = {"one": (210,), "around": (69, 1, 71, 69), "begun": (30, 150, 30)}


def in_turn(inputs, lengths, do, tune):
    """Row by row, twice, since of rows behind maps are read, too, and then backward the other way round."""
    whole, given = Sequences.of(lengths, DEVICE), {}

    def forward(row):
        part, calls = slice(row * TOKENS, (row + 1) * TOKENS), iter(("maps", "gradients"))

        def gather(x):
            rows = given.setdefault(next(calls), [torch.full_like(x, torch.nan)] * ROWS)
            rows[row] = x.clone()
            return torch.stack(rows)

        ends = torch.tensor(whole.borders[1:])
        one, other = torch.searchsorted(ends, torch.tensor([part.start, part.stop - 1]), right=True).tolist()
        border = Border(row, whole.borders[one] // TOKENS, (whole.borders[other + 1] - 1) // TOKENS, gather)
        leaves = [x[part].to(DEVICE).requires_grad_() for x in inputs[:5]]
        leaves += [x.to(DEVICE).requires_grad_() for x in inputs[5:7]]
        o, _ = gdn.gated_delta_rule(
            *leaves, whole.part(part.start, part.stop), output_final_state=False, border=border, tune=tune
        )
        return o, leaves, do[part].to(DEVICE)

    _, rows = [[forward(row) for row in range(ROWS)] for _ in range(2)]
    grads = [torch.autograd.grad(o, leaves, grad) for o, leaves, grad in reversed(rows)][::-1]
    *parts, A_log, dt_bias = ([x.cpu() for x in each] for each in zip(*grads, strict=True))
    return torch.cat([o.detach().cpu() for o, _, _ in rows]), *map(torch.cat, parts), sum(A_log), sum(dt_bias)


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_that_follow_each_other_equal_one(packing):
    lengths, heads = PACKINGS[packing], 2 if packing == "begun" else 1  # of values, for one of keys
    inputs = change(make_inputs(lengths, 2, 1, heads, 16, 24), "repeated keys" if packing == "begun" else "plain")
    inputs = in_dtype(inputs[:7], torch.float32)
    do = torch.randn(sum(lengths), heads, 24, generator=torch.Generator().manual_seed(3))
    exact = [x.double().requires_grad_() for x in inputs]
    expected, _ = oracle(*exact, torch.zeros(len(lengths), heads, 16, 24), lengths)
    truth = [expected.detach(), *torch.autograd.grad(expected, exact, do.double())]
    found = in_turn(inputs, lengths, do, WHOLE if packing == "around" else CUT)
    for name, x, y in zip(("o", *NAMES[:-1]), found, truth, strict=True):
        assert torch.isfinite(x).all(), name
        assert (x.double() - y).abs().max() <= 5e-5 * max(y.abs().max().item(), 0.1), name
