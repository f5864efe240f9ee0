"""Floating-point operations of a model, counted from what each part has to compute.

A multiplication and an addition are two. Counted are matrix products and convolutions; norms, activations, rotary
embedding, softmax and look-ups, together about 1 %, are not. What a kernel does beyond need (masked
halves of tiles, recomputation) is not counted either, so that a faster kernel shows as a higher utilisation (MFU).
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

from megahybrid.config.schema import Config
from megahybrid.mixers import KINDS
from megahybrid.model.settings import Settings

GDN_CHUNK = 64
"""Tokens a chunk of the gated delta rule as GPU kernels choose it."""


@dataclass(frozen=True)
class Flops:
    """FLOPs a token, averaged over the positions of a document of train.seq_length tokens.

    Attributes:
        parts: of the forward pass, by part of the model over all its layers.
    """

    parts: dict[str, float]

    @property
    def forward(self) -> float:
        """Of the forward pass."""
        return sum(self.parts.values())

    @property
    def training(self) -> float:
        """Of forward and backward pass: every product's backward is two products of its size, one for each factor."""
        return 3 * self.forward


def flops_per_token(config: Config) -> Flops:
    """FLOPs a token of the model that the configuration describes."""
    settings = Settings.of(config)
    hidden, length = config.model.hidden_size, config.train.seq_length
    parts: Counter[str] = Counter()
    for letter in settings.pattern.letters:
        parts.update(layer(settings, letter, length))
    parts["output layer"] = linear(hidden, config.model.vocab_size)
    return Flops(dict(parts))


def layer(settings: Settings, letter: str, length: int) -> dict[str, float]:
    """A layer of the pattern: its mixer's parts and its SwiGLU."""
    mixers = {"G": gdn, "L": lte, "S": sliding_window, "F": full_attention}
    parts = {f"{KINDS[letter].title}: {name}": count for name, count in mixers[letter](settings, length).items()}
    return parts | {"SwiGLU": linear(settings.model.hidden_size, 3 * settings.intermediate_size)}


def linear(inputs: int, outputs: int) -> float:
    """A projection: 2 a weight."""
    return 2 * inputs * outputs


def gdn(settings: Settings, length: int) -> dict[str, float]:
    """Gated DeltaNet: projections of q, k, v, gate, output and the two scalars a head; `taps` products a channel of
    q, k and v; and the delta rule."""
    config = settings.model.gdn
    key_dim, value_dim = config.head_dim, config.value_head_dim
    keys, values = config.num_heads * key_dim, config.num_heads * value_dim
    return {
        "projections": linear(settings.model.hidden_size, 2 * keys + 3 * values + 2 * config.num_heads),
        "short convolution": 2 * config.conv_size * (2 * keys + values),
        "delta rule": config.num_heads * delta_rule(key_dim, value_dim, min(GDN_CHUNK, length)),
    }


def delta_rule(key_dim: int, value_dim: int, chunk: int) -> float:
    """The gated delta rule of a token and head, in chunks of C tokens (Yang et al., arXiv 2412.06464, section 3.3).

    With the state S `[Dk, Dv]`, three products of 2 Dk Dv each: S^T k (what is stored under the key), S^T q, and the
    write k u^T. Inside the chunk the i-th of C tokens meets i - 1 before it, and itself as a query:
        k_i . k_j  and the forward substitution for u_i:  2 (i - 1) (Dk + Dv)
        q_i . k_j  and the sum over u_j:                  2 i (Dk + Dv)
    which is on average 2 C (Dk + Dv). In all
        6 Dk Dv + 2 C (Dk + Dv).
    C = 1 is the recurrence itself, 6 Dk Dv and a rest: at Dk = Dv = 128 chunks of 64 compute a third more than that, at
    256 a sixth, which is the price of matrix products.
    """
    return 6 * key_dim * value_dim + 2 * chunk * (key_dim + value_dim)


def full_attention(settings: Settings, length: int) -> dict[str, float]:
    """Causal attention to the whole document: the query at position i sees i + 1 keys."""
    return _projections(settings) | {"attention": attention(settings, mean_of_min(length, length))}


def sliding_window(settings: Settings, length: int) -> dict[str, float]:
    """Attention to a window of n keys: the query at position i sees min(i + 1, n)."""
    window = settings.model.attention.window_size
    return _projections(settings) | {"attention": attention(settings, mean_of_min(length, window))}


def lte(settings: Settings, length: int) -> dict[str, float]:
    """LTE: attention to the window and to what is kept beyond it, and the router's convolutions."""
    router = settings.kv_heads * retention_router(settings.model.attention.head_dim, settings.model.lte.conv_size)
    return _projections(settings) | {"attention": attention(settings, lte_keys(settings, length)), "router": router}


def lte_keys(settings: Settings, length: int) -> float:
    """Keys that an LTE query sees, averaged over the positions of a document.

    The query at position i sees min(i + 1, w + 1) keys in its window. Of the max(0, i - w) tokens that left it, it sees
    at most buffer_size, as in inference: in training, too, this is what the controller of lambda steers to. Before the
    controller has settled a model without train_cap sees more, up to all.
    """
    window, buffer = settings.model.lte.window_size, settings.model.lte.buffer_size
    left = max(0, length - 1 - window)
    return mean_of_min(length, window + 1) + (mean_of_min(left, buffer) * left / length if left else 0)


def retention_router(head_dim: int, taps: int) -> float:
    """The retention router of a token and KV head: three convolutions that halve the channels from 2 head_dim on, with
    2 taps c_in c_out each, and a projection to one logit."""
    channels = [2 * head_dim >> halvings for halvings in range(4)]
    return sum(2 * taps * fan_in * out for fan_in, out in itertools.pairwise(channels)) + 2 * channels[-1]


def attention(settings: Settings, keys: float) -> float:
    """Softmax attention to `keys` keys: products q . k and p v, of 2 head_dim each, a query head and key."""
    config = settings.model.attention
    return config.num_heads * 4 * config.head_dim * keys


def mean_of_min(count: int, cap: int) -> float:
    """Mean over j = 1 … count of min(j, cap): the keys that causal queries see through a window of `cap`."""
    cap = min(count, cap)
    return (cap * (cap + 1) / 2 + (count - cap) * cap) / count


def _projections(settings: Settings) -> dict[str, float]:
    """q and output are as wide as the query heads, k and v as the KV heads."""
    config = settings.model.attention
    width = 2 * (config.num_heads + settings.kv_heads) * config.head_dim
    return {"projections": linear(settings.model.hidden_size, width)}
