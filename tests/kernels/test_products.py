"""Products added to sums, against float64."""

import pytest
import torch

from megahybrid_kernels.products import add_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("dtype", "total_dtype", "tolerance"),
    [
        (torch.bfloat16, torch.float32, 1e-6),  # a thousandth of what a rounding to bf16 costs
        (torch.bfloat16, torch.bfloat16, 4e-3),
        (torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, 4e-3),
        (torch.float64, torch.float64, 1e-14),
    ],
)
@pytest.mark.parametrize("begun", [True, False])
def test_products_are_added_in_the_sums_precision(dtype, total_dtype, tolerance, begun):
    generator = torch.Generator().manual_seed(0)
    dy, x, before = (torch.randn(n, m, generator=generator) for n, m in ((96, 24), (96, 40), (24, 40)))
    dy, x, before = dy.to(DEVICE, dtype), x.to(DEVICE, dtype), before.to(DEVICE, total_dtype)
    total = before.clone() if begun else torch.full_like(before, torch.nan)
    add_product(total, dy.T, x, begun)
    expected = dy.double().T @ x.double() + begun * before.double()
    assert ((total.double() - expected).norm() / expected.norm()).item() < tolerance
