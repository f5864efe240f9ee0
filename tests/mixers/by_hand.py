"""Parts of attention in plain float64, apart from the ops."""

import torch


def rotated(x, lengths):
    """Rotary embedding of x `[tokens, heads, head_dim]` with base 10,000, its halves as real and imaginary parts."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    half = x.shape[2] // 2
    angles = positions[:, None].double() * 10000.0 ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)[:, None]
    return torch.cat([turned.real, turned.imag], -1)
