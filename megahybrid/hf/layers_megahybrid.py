"""What all MegaHybrid language models are built from: a mixer's rules, norm and SwiGLU."""

import functools
import os

import torch
import torch.nn.functional as F
from torch import nn

try:
    import megahybrid_kernels as kernels
except ImportError:
    kernels = None
if os.environ.get("MEGAHYBRID_KERNELS") == "0":
    kernels = None


def takes_kernels(x):
    """Whether the ops of megahybrid_kernels run on `x`: where it is installed, on a GPU."""
    return kernels is not None and x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_compiling()


class Mixer(nn.Module):
    """What mixes the tokens of a layer: `mixer(x, positions, state) → (output, next state)`.

    Shapes: B sequences, T new tokens, H heads, D channels a head; x and the output `[B, T, hidden]`, positions int64
    `[B, T]`. A state is a dictionary of tensors `[B, ...]`, `empty_state(x)` the one before the first token. Sequences
    may be padded on the left: padding has position -1, and leaves every state as it was.

    In training a state may have `loss` `[B]` beside: what the layer adds to the loss, summed over the new tokens.

    It is made from the model's configuration; its parameters have the names and shapes that they have in training.
    `reset_parameters()`, of it or of a module inside it, gives new values to those that are no linear layer's.

    A mixer that `packs` has a second form, by megahybrid_kernels: `mixer(x, sequences, state)` with x and the output
    `[tokens, hidden]`, the tokens of all sequences end to end, and `sequences` their `megahybrid_kernels.Sequences`.
    Its state may be of another form, see inference_megahybrid, and is updated in place; without one (None) the
    sequences are whole, and there is no next state, but in training there may be `loss`, a scalar.
    `packed_state(count, dtype, device)` is that of `count` sequences before their first token, for projections in
    `dtype`.
    """

    packs = False
    keep_in_fp32 = ()  # names of parameters that would lose too much in bf16


def real_tokens(x, attention_mask):
    """bool `[B, T]`: what is no padding."""
    return attention_mask[:, -x.shape[1] :].to(x.device).bool()


def at_least_fp32(x):
    """`x` in float32, or as it is when it already is float32 or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def last(x, dim, count):
    """The last `count` of x along a dimension; in memory of their own where they would keep much more in use."""
    part = x.narrow(dim, x.shape[dim] - count, count)
    return part.clone() if x.shape[dim] > 2 * count else part


def as_computed(x):
    """`x` in the type that linear layers have under autocast, or as it is without."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def in_own_precision(function):
    """A function of tensors that keeps the types of what it is given under autocast."""

    @functools.wraps(function)
    def precise(first, *others, **options):
        device = next(x for x in (first, *others) if isinstance(x, torch.Tensor)).device.type
        if not torch.is_autocast_enabled(device):
            return function(first, *others, **options)
        with torch.autocast(device, enabled=False):
            return function(first, *others, **options)

    return precise


class RMSNorm(nn.Module):
    """x / sqrt(mean x² + eps) times a weight, `[..., size]`; computed in fp32 at least."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def reset_parameters(self):
        self.weight.fill_(1)

    def forward(self, x):
        if takes_kernels(x):
            return kernels.rms_norm(x, self.weight, self.eps)
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # in float32, too, but in one launch
        return scaled_to_unit(x, self.weight, self.eps).to(x.dtype)

    def of_sum(self, x, y):
        """(The norm of x + y, x + y)."""
        if takes_kernels(x):
            return kernels.add_rms_norm(y.to(x.dtype), x, self.weight, self.eps)
        x = x + y
        return self(x), x


def scaled_to_unit(x, weight, eps):
    """x divided by its root mean square over the last dimension, times `weight`; in at least float32."""
    x = at_least_fp32(x)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def linear(in_features, out_features):
    """A projection without a bias."""
    return nn.Linear(in_features, out_features, bias=False)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), `[..., hidden_size]`."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if takes_kernels(gate):
            return self.down_proj(kernels.swiglu(gate, up))
        return self.down_proj((F.silu(at_least_fp32(gate)) * up).to(x.dtype))
