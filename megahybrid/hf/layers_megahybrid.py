"""What all MegaHybrid language models are built from: a mixer's rules, norm and SwiGLU."""

import functools

import torch
import torch.nn.functional as F
from torch import nn


class Mixer(nn.Module):
    """What mixes the tokens of a layer: `mixer(x, positions, state) → (output, next state)`.

    Shapes: B sequences, T new tokens, H heads, D channels a head; x and the output `[B, T, hidden]`, positions int64
    `[B, T]`. A state is a dictionary of tensors `[B, ...]`, `empty_state(x)` the one before the first token. Sequences
    may be padded on the left: padding has position -1, and leaves every state as it was.

    In training a state may have `loss` `[B]` beside: what the layer adds to the loss, summed over the new tokens.

    It is made from the model's configuration; its parameters have the names and shapes that they have in training.
    `reset_parameters()`, of it or of a module inside it, gives new values to those that are no linear layer's.
    """

    keep_in_fp32 = ()  # names of parameters that would lose too much in bf16


def at_least_fp32(x):
    """`x` in float32, or as it is when it already is float32 or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_computed(x):
    """`x` in the type that linear layers have under autocast, or as it is without."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def in_own_precision(function):
    """A function of tensors that keeps the types of what it is given under autocast."""

    @functools.wraps(function)
    def precise(first, *others, **options):
        device = next(x for x in (first, *others) if isinstance(x, torch.Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return function(first, *others, **options)

    return precise


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def reset_parameters(self):
        self.weight.fill_(1)

    def forward(self, x):
        return scaled_to_unit(x, self.weight, self.eps).to(x.dtype)


def scaled_to_unit(x, weight, eps):
    """x divided by its root mean square over the last dimension, times `weight`; in at least float32."""
    x = at_least_fp32(x)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)


def linear(in_features, out_features):
    return nn.Linear(in_features, out_features, bias=False)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        gate, up = at_least_fp32(self.gate_proj(x)), at_least_fp32(self.up_proj(x))
        return self.down_proj((F.silu(gate) * up).to(x.dtype))
