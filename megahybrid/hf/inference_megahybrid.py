"""Inference of MegaHybrid language models by megahybrid_kernels: batches without padding, and decoding as a CUDA graph.

The ops take the tokens of all sequences laid end to end, and each chooses its way for the device, dtype and sizes.
A state is a dictionary whose parts have the sequences in front: tensors, and caches that grow.
"""

import torch
from torch import Tensor
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.utils import logging

from megahybrid.hf.layers_megahybrid import kernels, real_tokens, takes_kernels

logger = logging.get_logger(__name__)


def packs(model, x):
    """Whether the model takes x `[B, T, hidden]` in its packed form: not where a mixer has none, nor where the layers
    are on several devices."""
    return (
        takes_kernels(x)
        and all(block.mixer.packs for block in model.layers)
        and all(weight.device == x.device for weight in weights_of(modules_below(model)))
    )


class Packing:
    """New tokens of a batch `[B, T]`, laid end to end without padding.

    Attributes:
        lengths: how many tokens each sequence has, on the host.
    """

    def __init__(self, shape, lengths, places=None):
        """`places`: int64 `[tokens]`, where they stand in the flattened batch, if there is padding."""
        self.shape, self.lengths, self._places = shape, lengths, places

    @classmethod
    def of(cls, x, attention_mask):
        """A sequence a row; x `[B, T, hidden]`."""
        shape = x.shape[:2]
        if attention_mask is not None:
            real = real_tokens(x, attention_mask)
            lengths = real.sum(1).tolist()
            if min(lengths) < shape[1]:
                return cls(shape, lengths, real.flatten().nonzero()[:, 0])
        return cls(shape, [shape[1]] * shape[0])

    def packed(self, x):
        """`[B, T, hidden]` → `[tokens, hidden]`."""
        x = x.flatten(0, 1)
        return x if self._places is None else x[self._places]

    def padded(self, x):
        """Back again, with zeros for padding."""
        if self._places is not None:
            x = x.new_zeros(self.shape[0] * self.shape[1], x.shape[1]).index_copy(0, self._places, x)
        return x.unflatten(0, self.shape)


def one_token_each(lengths):
    """The next token of sequences of these lengths, int64 `[B]`."""
    borders = torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    return kernels.Sequences(borders, (1,) * len(lengths), lengths)


class Inference:
    """What a cache has beside its states and lengths, if its sequences are continued here.

    Attributes:
        counts: tokens of each sequence, on the host.
        steps: calls with one token of each of these sequences since the last other one.
        graph: such a call as it was recorded.
        refused: whether it could not be recorded.
    """

    def __init__(self):
        self.counts, self.steps, self.graph, self.refused = [], 0, None, False

    def __getstate__(self):
        """For copies, whose states have other addresses."""
        return {**self.__dict__, "graph": None}

    def forward(self, model, x, attention_mask, cache, output_hidden_states):
        """The model's layers and last norm on new tokens, x `[B, T, hidden]`, which the cache gets: (hidden states, all
        of them or None)."""
        count, length = x.shape[:2]
        if cache.seen == 0:
            cache.states, self.counts = [{} for _ in model.layers], [0] * count
        elif cache.lengths.is_inference() and not torch.is_inference_mode_enabled():
            self.graph = None
            self.select(cache, list(range(count)))  # into tensors that may be overwritten
        step = length == 1 and all(self.counts) and not torch.is_grad_enabled()
        if step and not output_hidden_states and (y := self._replayed(model, x[:, 0], cache)) is not None:
            return y[:, None], None
        self.graph, self.steps = None, self.steps + 1 if step else 0
        # Padding is on the left: none follows a token, and a look at the mask would wait for the GPU at every step.
        packing = Packing.of(x, None if step else attention_mask)
        rows = [row for row, tokens in enumerate(packing.lengths) if tokens]
        if cache.seen == 0 and len(rows) < count:
            cache.states = initial_states(model, x)
        states = cache.states if len(rows) == count else selected(cache.states, rows)
        if not rows:
            y = torch.zeros_like(x)
            hidden_states = (y,) * (len(model.layers) + 1) if output_hidden_states else None
        else:
            sequences = self._sequences(cache, packing, rows)
            y, hidden_states, _ = through_layers(model, packing.packed(x), sequences, states, output_hidden_states)
            y, hidden_states = packing.padded(y), hidden_states and tuple(map(packing.padded, hidden_states))
        if states is not cache.states:
            cache.states = replaced(cache.states, rows, states)
        added = length if min(packing.lengths) == length else torch.tensor(packing.lengths, device=x.device)
        cache.lengths, cache.seen = cache.lengths + added, cache.seen + length
        self.counts = [old + new for old, new in zip(self.counts, packing.lengths, strict=True)]
        return y, hidden_states

    def _sequences(self, cache, packing, rows):
        if cache.seen and set(packing.lengths) == {1}:
            return one_token_each(cache.lengths)
        starts = cache.lengths if len(rows) == len(packing.lengths) else cache.lengths[rows]
        # Without starts the ops know that all begin here, for which they have faster ways.
        starts = starts if cache.seen else None
        return kernels.Sequences.of([packing.lengths[row] for row in rows], cache.lengths.device, starts)

    def select(self, cache, rows):
        """Sequence n of the cache becomes its sequence `rows[n]`."""
        lengths, states = cache.lengths[rows], selected(cache.states, rows)
        if self.graph is not None and len(rows) == len(self.counts):
            overwrite(cache.states, states)
            cache.lengths.copy_(lengths)
        else:
            cache.lengths, cache.states, self.graph = lengths, states, None
            self.steps = self.steps if len(rows) == len(self.counts) else 0
        self.counts = [self.counts[row] for row in rows]

    def _replayed(self, model, x, cache):
        """The next token of every sequence, x `[B, hidden]`, by a graph; None where the step has to run as it is."""
        parts = parts_of(model) if takes_graph(x) and has_room(cache.states) else None
        if parts is None or (self.graph is not None and not self.graph.takes(x)):
            return None
        if self.graph is None or self.graph.parts != parts:
            # A step like it must have run before: recording can neither compile nor tune anything. Of modules that the
            # model was not made with, such as adapters, nothing is known.
            if self.steps == 0 or self.refused or list(map(type, modules_below(model))) != model.made_of:
                return None
            try:
                self.graph = DecodeGraph(model, x, cache, parts)
            except RuntimeError as error:
                logger.warning_once(f"MegaHybrid models decode without a CUDA graph here, which is slower: {error}")
                self.refused = True
                return None
        cache.seen, self.counts = cache.seen + 1, [count + 1 for count in self.counts]
        return self.graph.run(x, cache)


def through_layers(model, x, places, states, output_hidden_states=False, documents=None, keep=True):
    """x, and what more a Block takes → (the last hidden states; if they are asked for, those before each layer with
    them; what layers add to the loss). If `keep`, the next states take the places of `states`."""
    seen, losses = [], []
    for number, block in enumerate(model.layers):
        if output_hidden_states:
            seen.append(x)
        x, state, loss = block(x, places, states[number], documents)
        if keep:
            states[number] = state
        if loss is not None:
            losses.append(loss.sum())
    x = model.final_norm(x)
    return x, (*seen, x) if output_hidden_states else None, sum(losses) / len(losses) if losses else None


def initial_states(model, x):
    """All layers' states before the first token, for x `[B, T, hidden]`."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return [block.mixer.packed_state(len(x), dtype, x.device) for block in model.layers]


def selected(states, rows):
    """All layers' states of the sequences `rows` alone, a list; in memory of their own."""
    index = {}  # one a device, not one a tensor

    def pick(part):
        if not isinstance(part, Tensor):
            return part.select(rows)
        if part.device not in index:
            index[part.device] = torch.tensor(rows, dtype=torch.int64, device=part.device)
        return part.index_select(0, index[part.device])

    return [{name: pick(part) for name, part in state.items()} for state in states]


def replaced(states, rows, new):
    """All layers' states, those of the sequences `rows` being `new`."""

    def joined(one, other):
        return torch.cat([one, other]) if isinstance(one, Tensor) else one.join(other)

    both = [{name: joined(part, after[name]) for name, part in state.items()}
            for state, after in zip(states, new, strict=True)]  # fmt: skip
    count = next(len(part) if isinstance(part, Tensor) else part.count for part in states[0].values())
    order = list(range(count))
    for number, row in enumerate(rows):
        order[row] = count + number
    return selected(both, order)


def overwrite(states, new):
    """Put states of the same sizes into the memory of others."""
    pairs = []
    for state, after in zip(states, new, strict=True):
        for name, part in state.items():
            if isinstance(part, Tensor):
                pairs.append((part, after[name]))
            else:
                pairs += zip(part.room.rows, after[name].room.rows, strict=True)
                state[name] = type(part)(after[name].lengths, part.room, part.room.turn)
    moved = [(old, other) for old, other in pairs if old is not other]
    if moved:
        torch._foreach_copy_(*map(list, zip(*moved, strict=True)))  # a few launches for all of them


def growing(states):
    """(a layer's state, name) of every cache that grows."""
    return [(state, name) for state in states for name, part in state.items() if not isinstance(part, Tensor)]


def has_room(states):
    """Whether every sequence can get one more token where the states are."""
    return all(state[name].capacity > state[name].slots for state, name in growing(states))


def takes_graph(x):
    """Whether a step on x may be recorded now."""
    return x.is_cuda and not torch.is_autocast_enabled("cuda") and not torch.cuda.is_current_stream_capturing()


def modules_below(model):
    """All modules of a model but itself."""
    modules = list(model._modules.values())
    for module in modules:  # which grows; several times as fast as model.modules(), and made at every step
        modules += module._modules.values()
    return modules


def weights_of(modules):
    """Their own parameters, a list; some times as fast as model.parameters()."""
    return [weight for each in modules for weight in each._parameters.values() if weight is not None]


def parts_of(model):
    """What a graph of the model's layers holds for as long as it stays the same: modules and where the weights are.
    None where a module has hooks, or something in the place of its forward, which a graph would not repeat."""
    modules = modules_below(model)
    if _global_forward_hooks or _global_forward_pre_hooks:
        return None
    if any(each._forward_hooks or each._forward_pre_hooks or "forward" in each.__dict__ for each in modules):
        return None
    return [torch.is_inference_mode_enabled(), *modules, *[weight.data_ptr() for weight in weights_of(modules)]]


def recorded_step(model, x, cache):
    """A token of every sequence, x `[B, hidden]`, after which all states are where they were before."""
    states = [dict(state) for state in cache.states]
    y, *_ = through_layers(model, x, one_token_each(cache.lengths), states)
    overwrite([dict(state) for state in cache.states], states)
    cache.lengths += 1
    return y


class DecodeGraph:
    """One token of every sequence through all layers, recorded once as a CUDA graph and replayed.

    A step is some hundred small kernels, which take the host longer to launch than a GPU to run at small batches. A
    graph reads and writes the addresses that it was recorded with.
    """

    def __init__(self, model, x, cache, parts):
        self.parts, self._x = parts, x.clone()
        self._y, self._replay = self.record(model, cache)

    def record(self, model, cache):
        """(Where the hidden states of a step will be, what makes it)."""
        graph, device = torch.cuda.CUDAGraph(), self._x.device
        # Relaxed: a library may load code at its first use in the recording stream, and other threads use the device.
        with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="relaxed"):
            y = recorded_step(model, self._x, cache)
        return y, graph.replay

    def takes(self, x):
        """Whether x is as the one that was recorded; else it would be cast."""
        return x.dtype == self._x.dtype

    def run(self, x, cache):
        """Hidden states `[B, hidden]` of the next token's x, of a `cache` that is as the last step left it."""
        self._x.copy_(x)
        self._replay()
        for state, name in growing(cache.states):
            state[name] = state[name].after(1)
        return self._y.clone()
