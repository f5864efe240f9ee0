"""Memory a GPU needs in training, in bytes: what ZeRO keeps, and what the layers save for the backward pass.

Activations are counted tensor by tensor as the ops in PyTorch save them, per token, rows as wide as a projection and
wider only: what is smaller (norms' factors, indices, dropout keys) and the allocator's slack add a few per cent.
Letters in the formulas: h hidden size, w bytes of an activation (2 in bf16, 4 in fp32), K and V widths of keys and
values over all heads, Q of queries, I of the SwiGLU. What an op widens to fp32 takes 4 in either case.
"""

from __future__ import annotations

from dataclasses import dataclass

from megahybrid.config.schema import Config
from megahybrid.model.settings import Settings
from megahybrid.scaling.flops import mean_of_min
from megahybrid_kernels.attention.reference import QUERY_BLOCK
from megahybrid_kernels.gated_delta_rule.reference import CHUNK

ZERO_STAGES = (1, 2, 3)


def states(config: Config, parameters: int, zero_stage: int, replicas: int) -> float:
    """Bytes a GPU of weights, gradients and optimizer (Rajbhandari et al., "ZeRO", arXiv 1910.02054, section 5).

    A parameter takes: its working copy, w; its gradient, accumulated in fp32 in either precision, 4; and 12 in the
    optimizer, master weight and two moments in fp32 (DeepSpeed keeps the master also of fp32 weights). Of these every
    stage splits the optimizer's over the replicas, stage 2 also the gradients, stage 3 also the working copies; what
    stage 3 gathers for the layer at work is not counted.
    """
    weights = _width(config) / (replicas if zero_stage >= 3 else 1)
    gradients = 4 / (replicas if zero_stage >= 2 else 1)
    return parameters * (weights + gradients + 12 / replicas)


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch holds at the peak, between forward and backward pass.

    Attributes:
        kept: all layers' saved tensors.
        recomputed: the same with train.recompute: every layer's input, and one layer's saved tensors at a time.
        output: final norm, logits and loss.
    """

    kept: float
    recomputed: float
    output: float

    def peak(self, recompute: bool) -> float:
        """Bytes in all."""
        return (self.recomputed if recompute else self.kept) + self.output


def activations(config: Config) -> Activations:
    """Activation memory of the recipe's micro-batch."""
    settings, width = Settings.of(config), _width(config)
    tokens = config.train.micro_batch_size * config.train.seq_length
    mixers = {
        "G": gdn(config, settings),
        "L": lte(config, settings),
        "S": attention(config, settings, settings.model.attention.window_size),
        "F": attention(config, settings, None),
    }
    rest = 2 * norm(settings) + swiglu(settings, width)
    layers = [mixers[letter] + rest for letter in settings.pattern.letters]
    inputs = len(layers) * width * settings.model.hidden_size
    output = norm(settings) + logits(settings, width)
    return Activations(tokens * sum(layers), tokens * (inputs + max(layers)), tokens * output)


def norm(settings: Settings) -> float:
    """RMSNorm: its input in fp32 and the normalised input, 8 h; its output is counted where it enters."""
    return 8 * settings.model.hidden_size


def swiglu(settings: Settings, width: int) -> float:
    """Input w h; gate, silu(gate) and up in fp32, 12 I; their product, w I."""
    return width * settings.model.hidden_size + (12 + width) * settings.intermediate_size


def gdn(config: Config, settings: Settings) -> float:
    """Gated DeltaNet as `gated_delta_rule.reference` computes it, with chunks of C tokens.

    - input w h;
    - short convolution: its input as it came, and its and SiLU's input in fp32: (8 + w) (2 K + V);
    - q: raw, normalised, times the decay since the chunk's start: 12 K; k: raw, normalised, times beta and decay, times
      the decay until its end: 16 K; v and the writes u: 8 V;
    - six matrices `[C, C]` a head and chunk (decays, k k^T, their product, the system, q k^T, attention): 24 C a head;
    - the state before each chunk, 4 Dk Dv a head and C tokens: 4 K Dv / C;
    - gated norm: o, o normalised, that times the weight, gate and silu(gate), 20 V; its output, w V.
    """
    model, width = settings.model.gdn, _width(config)
    value_dim = model.value_head_dim or model.head_dim
    keys, values = model.num_heads * model.head_dim, model.num_heads * value_dim
    chunk = min(CHUNK, config.train.seq_length)
    wide = (8 + width) * (2 * keys + values) + 28 * keys + 8 * values + 20 * values
    within_chunks = 24 * chunk * model.num_heads + 4 * keys * value_dim / chunk
    return width * (settings.model.hidden_size + values) + wide + within_chunks


def attention(config: Config, settings: Settings, window_size: int | None) -> float:
    """Full and sliding window attention.

    Input w h; of torch's flash attention q, k and v, repeated for every query head, and output, 4 w Q; sines and
    cosines of q and k, 8 head_dim. fp32 goes block by block as LTE does, with one mask for all KV heads.
    """
    heads = settings.model.attention
    if _width(config) == 4:
        return _blocked(config, settings, window_size, mask_heads=heads.num_heads // settings.kv_heads)
    return 2 * (settings.model.hidden_size + 4 * heads.num_heads * heads.head_dim) + 8 * heads.head_dim


def lte(config: Config, settings: Settings) -> float:
    """LTE: blocked attention with a mask a query head, and the router.

    The router's l-th convolution has U / 2^l input channels, U = 2 K, all in fp32: its input, SiLU's input with half
    the channels, and with dropout a byte a channel of the mask: 6 or 7 a channel, 7/4 U channels in all. SiLU's last
    output takes 4 U / 8.
    """
    channels = 2 * settings.kv_heads * settings.model.attention.head_dim
    router = ((7 if settings.model.lte.dropout else 6) * 7 / 4 + 1 / 2) * channels
    return router + _blocked(config, settings, None, mask_heads=settings.model.attention.num_heads)


def _blocked(config: Config, settings: Settings, reach: int | None, mask_heads: int) -> float:
    """`attention.reference` on a GPU, for a document as long as the sample, the most that there can be.

    Input w h; q, output before and after it is joined, w Q each, and with grouped queries two copies more; k and v,
    2 w K; sines and cosines of q and k, 8 head_dim; and the mask, as SDPA adds it to the logits: w a head and column,
    where a block of queries has the columns that its last query reaches.
    """
    heads, width, length = settings.model.attention, _width(config), config.train.seq_length
    queries, keys = heads.num_heads * heads.head_dim, settings.kv_heads * heads.head_dim
    copies = 3 if heads.num_heads == settings.kv_heads else 5
    columns = mean_of_min(length, reach or length) + min(QUERY_BLOCK, length) / 2
    own = settings.model.hidden_size + copies * queries + 2 * keys + mask_heads * columns
    return width * own + 8 * heads.head_dim


def logits(settings: Settings, width: int) -> float:
    """The final norm's output, w h; and two tensors in fp32 as wide as the vocabulary, in the forward pass as in the
    backward pass, with the logits or their gradient beside them in bf16: 8 or 10 a word."""
    return width * settings.model.hidden_size + (10 if width == 2 else 8) * settings.model.vocab_size


def _width(config: Config) -> int:
    return 2 if config.train.dtype == "bf16" else 4
