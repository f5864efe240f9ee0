"""What all MegaHybrid language models are built from: a mixer's rules, norm and SwiGLU."""

import functools
import os
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

try:
    import megahybrid_kernels as kernels
except ImportError:
    kernels = None
if os.environ.get("MEGAHYBRID_KERNELS") == "0":
    kernels = None


# A context in which ops note nothing for autograd, which without gradients, too, is a tenth of the host's time for a
# step: inference mode's, but that tensors made there may be trained on.
below_autograd = getattr(torch._C, "_AutoDispatchBelowADInplaceOrView", nullcontext)


def takes_kernels(x):
    """Whether the ops of megahybrid_kernels run on `x`: where it is installed, on a GPU."""
    return kernels is not None and x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_compiling()


class Joining(nn.Module):
    """What may move its weights beside each other (`moved_beside`)."""

    def state_dict(self, *args, **kwargs):
        """The weights themselves, not beside each other: who saves or loads them may take those for tied ones."""
        move_apart(self.parameters())
        return super().state_dict(*args, **kwargs)


class Mixer(Joining):
    """What mixes the tokens of a layer: `mixer(x, positions, state) → (output, next state)`.

    Shapes: B sequences, T new tokens, H heads, D channels a head; x and the output `[B, T, hidden]`, positions int64
    `[B, T]`. A state is a dictionary of tensors `[B, ...]`, `empty_state(x)` the one before the first token. Sequences
    may be padded on the left: padding has position -1, and leaves every state as it was.

    In training a state may have `loss` `[B]` beside: what the layer adds to the loss, summed over the new tokens.

    It is made from the model's configuration; its parameters have the names and shapes that they have in training.
    `reset_parameters()`, of it or of a module inside it, gives new values to those that are no linear layer's.

    A mixer that `packs` has a second form, by megahybrid_kernels: `mixer(x, sequences, state)` with x and the output
    `[tokens, hidden]`, the tokens of all sequences end to end, and `sequences` their `megahybrid_kernels.Sequences`.
    Its state may be of another form, see inference_megahybrid, and is updated in place; an empty one ({}) is that of
    sequences that all begin here. Without one (None) they are whole, and there is no next state, but in training there
    may be `loss`, a scalar. `packed_state(count, dtype, device)` is that of `count` sequences before their first token,
    for projections in `dtype`, where others begin later.
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
        device = (first if isinstance(first, torch.Tensor) else others[0]).device.type  # a method's first is its module
        if not torch.is_autocast_enabled(device):
            return function(first, *others, **options)
        with torch.autocast(device, enabled=False):
            return function(first, *others, **options)

    return precise


def rms_norm(x, weight, eps):
    """x / sqrt(mean x² + eps) times a weight, `[..., size]`; computed in fp32 at least."""
    if takes_kernels(x):
        return kernels.rms_norm(x, weight, eps)
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)  # in float32, too, but in one launch
    return scaled_to_unit(x, weight, eps).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a weight of its own."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def reset_parameters(self):
        self.weight.fill_(1)

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)

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


def as_made(module, kind):
    """Whether a module is what `kind` says: nothing else stands in its place, and nobody watches it."""
    hooks = module._forward_hooks, module._forward_pre_hooks, _global_forward_hooks, _global_forward_pre_hooks
    return type(module) is kind and not any(hooks) and "forward" not in module.__dict__


def weights_alone(*layers):
    """The weights of layers that are the products with them alone, and not in training: there a forward without
    gradients may be the first of two that have to agree, as where reentrant checkpointing recomputes. None where one
    is not."""
    weights = []
    for layer in layers:
        own = layer._parameters  # half as long as by name, at every step
        weight = own.get("weight")
        alone = as_made(layer, nn.Linear) and own.get("bias") is None and type(weight) is nn.Parameter
        if not alone or layer.training:
            return None
        weights.append(weight)
    return weights


def project(x, *layers):
    """Each layer's output of x `[..., in]`. Tokens laid end to end go through one product where no gradient is asked
    for, for which weights that have their memory to themselves move beside each other; not where autocast would cast
    the whole at every step, which it does only once to each."""
    if x.dim() == 2 and not torch.is_grad_enabled() and (weights := weights_alone(*layers)) is not None:
        x = as_computed(x)
        whole, sizes = kept_beside(layers[0], weights, ROWS) if x.dtype == weights[0].dtype else (None, None)
        if whole is not None:
            return F.linear(x, whole).split_with_sizes(sizes, 1)[: len(layers)]
    return [layer(x) for layer in layers]


ROWS = 64  # of which a product's are a multiple, so that those of its output begin at multiples of 128 bytes


def moved_beside(weights, multiple=1):
    """Parameters as one along their first dimension, see `beside`. They move into one memory if each has one of its
    own: what an optimizer or a wrapper has laid together stays where it is. None where they do not lie so.

    Our own engine does likewise, by megahybrid/parallel/joined.py, which an exported model's files cannot import.
    """
    whole = beside(weights, 0, multiple)
    if whole is None and all(may_move(each, weights[0]) for each in weights):
        rows, at = sum(map(len, weights)), 0
        with torch.inference_mode(False), torch.no_grad():
            memory = weights[0].new_zeros(-(-rows // multiple) * multiple, *weights[0].shape[1:])
            for each in weights:
                part = memory[at : at + len(each)]
                move(each, part.copy_(each))
                at += len(part)
        whole = beside(weights, 0, multiple)
    return whole


def kept_beside(keeper, weights, multiple=1):
    """(`moved_beside`, the rows of each and of what follows them), or (None, None); the module `keeper` keeps where
    that is, since to look for it takes the host as long as a launch."""
    places, known = list(map(_place, weights)), keeper.__dict__.get("beside")
    if known is not None and known[:2] == (places, weights[0].untyped_storage().nbytes()):
        return weights[0].as_strided(*known[2]), known[3]
    keeper.beside = None
    if (whole := moved_beside(weights, multiple)) is None:
        return None, None
    sizes = [len(weight) for weight in weights]
    sizes.append(len(whole) - sum(sizes))
    places = list(map(_place, weights))
    keeper.beside = places, whole.untyped_storage().nbytes(), (whole.shape, whole.stride()), sizes
    return whole, sizes


def _place(weight):
    return weight.data_ptr(), weight.shape, weight.stride()


def move(weight, part):
    """Give a parameter the memory of `part`. Its old one may be in use on this stream still, not its own."""
    if weight.is_cuda:
        weight.record_stream(torch.cuda.current_stream(weight.device))
    weight.data = part


def holders(weight):
    """How many tensors have the memory of this one, itself included."""
    memory = weight.untyped_storage()  # which is counted, too
    return torch._C._storage_Use_Count(memory._cdata) - 1


def move_apart(weights):
    """Give parameters that `moved_beside` moved a memory of their own again: who saves and loads tensors takes those
    that share one for the same. What is held by others, too, stays where it is."""
    sharing = {}
    for weight in weights:
        if type(weight) is nn.Parameter:
            sharing.setdefault(weight.untyped_storage()._cdata, []).append(weight)
    with torch.inference_mode(False), torch.no_grad():
        for group in sharing.values():
            if 1 < len(group) == holders(group[0]):
                for each in group:
                    move(each, each.clone())


def may_move(weight, first):
    """Whether a parameter may get another memory, beside that of `first`: not where others see it in its present one,
    as FSDP does, and who took a state_dict."""
    alone = type(weight) is nn.Parameter and weight.untyped_storage().nbytes() == weight.nbytes and holders(weight) == 1
    alike = (weight.dtype, weight.device, weight.shape[1:]) == (first.dtype, first.device, first.shape[1:])
    recording = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    return alone and alike and weight.is_contiguous() and not weight.is_inference() and not recording


def beside(parts, dim, multiple=1):
    """Tensors that lie beside each other along a dimension of one memory, as one; with what follows there up to a
    multiple of that size, if anything does. None where they do not."""
    first, at = parts[0], parts[0].storage_offset()
    memory, strides = first.untyped_storage(), first.stride()
    for part in parts:
        if part.untyped_storage()._cdata != memory._cdata or part.storage_offset() != at or part.stride() != strides:
            return None
        at += part.shape[dim] * strides[dim]
    sizes, size = list(first.shape), sum(part.shape[dim] for part in parts)
    more = -size % multiple
    fits = (at + more * strides[dim]) * first.itemsize <= memory.nbytes()
    sizes[dim] = size + more if fits else size
    return first.as_strided(sizes, strides)


def joined(parts, dim):
    """`torch.cat`, for nothing where the parts lie beside each other."""
    whole = beside(parts, dim)
    return torch.cat(parts, dim) if whole is None else whole


class SwiGLU(Joining):
    """down(silu(gate(x)) · up(x)), `[..., hidden_size]`."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(self.inner(x))

    def inner(self, x):
        gate, up = project(x, self.gate_proj, self.up_proj)
        if takes_kernels(gate):
            return kernels.swiglu(gate, up)
        return (F.silu(at_least_fp32(gate)) * up).to(x.dtype)


def added(mlp, x, y):
    """y + mlp(x): of tokens laid end to end over y, in the last product's launch, where no gradient is asked for."""
    joins = y.dim() == 2 and not torch.is_grad_enabled() and as_made(mlp, SwiGLU)
    if not joins or (weights := weights_alone(mlp.down_proj)) is None:
        return y + mlp(x)
    inner, (weight,) = mlp.inner(x), weights
    if not inner.dtype == y.dtype == weight.dtype:
        return y + mlp.down_proj(inner)  # cast by autocast
    return y.addmm_(inner, weight.T)
