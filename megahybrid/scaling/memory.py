"""Memory a GPU needs in training, in bytes: what ZeRO keeps, and what the layers save for the backward pass.

Activations are counted tensor by tensor as the ops in PyTorch save them, per token, rows as wide as a projection and
wider only: what is smaller (norms' factors, indices, dropout keys) and the allocator's slack add a few per cent.
Letters in the formulas: h hidden size, w bytes of an activation (2 in bf16, 4 in fp32), K and V widths of keys and
values over all heads, Q of queries, I of the SwiGLU. What an op widens to fp32 takes 4 in either case.

With t tensor parallel ranks K, V, Q, I, the number of heads and the vocabulary are a rank's own, so 1 / t. The residual
stream is whole on every rank, or with sequence parallelism 1 / t of the tokens; s is that divisor, 1 or t. What
projections read was gathered once and is kept whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from megahybrid.config.schema import Config
from megahybrid.model.settings import Settings
from megahybrid.scaling.flops import mean_of_min
from megahybrid.scaling.parameters import parameters_by_rank
from megahybrid.scaling.schedule import in_flight, micro_batches
from megahybrid.scaling.stages import stage_layers
from megahybrid_kernels.attention.reference import QUERY_BLOCK
from megahybrid_kernels.gated_delta_rule.reference import CHUNK
from megahybrid_kernels.linear_cross_entropy.chunks import chunk_length

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


def peak_bytes(config: Config, replicas: int) -> list[float]:
    """Most bytes that a GPU holds in a step, by pipeline rank, with `replicas` data parallel ones.

    Beside its states that is the activations, or what the update takes when they are gone.
    """
    stage = config.parallel.zero_stage
    return [
        states(config, count, stage, replicas) + max(activations(config, replicas, rank), update(count, replicas))
        for rank, count in enumerate(parameters_by_rank(config))
    ]


def update(parameters: int, replicas: int) -> float:
    """AdamW's temporary, the root of the second moment, 4 a parameter that the optimizer of this replica has."""
    return 4 * parameters / replicas


def activations(config: Config, replicas: int, rank: int) -> float:
    """Most bytes of activations that a GPU of pipeline rank `rank` holds: those of all micro-batches in flight, and
    what the backward pass of the chunk at work adds."""
    chunks = _chunks(config)[rank :: config.parallel.pipeline]
    moments = set(in_flight(config.parallel, rank, micro_batches(config, replicas)))
    return max(
        sum(count * chunk.held for count, chunk in zip(held, chunks, strict=True)) + chunks[at].backward
        for at, held in moments
    )


@dataclass(frozen=True)
class Chunk:
    """Bytes of one micro-batch in one model chunk.

    Attributes:
        held: what is kept from its forward to its backward pass.
        backward: what the backward pass has beyond that at its peak.
    """

    held: float
    backward: float


def _chunks(config: Config) -> list[Chunk]:
    """All model chunks, in the order in which a token passes them.

    Between chunks goes a tensor of w h / s, which the one that receives it and the one that sends it both keep.
    """
    settings, every = Settings.of(config), stage_layers(config)
    tokens = config.train.micro_batch_size * config.train.seq_length
    chunks = []
    for number, layers in enumerate(every):
        first, last = number == 0, number == len(every) - 1
        sent = ((not first) + (not last)) * residual(config, settings)
        output = norm(config, settings) + loss(config, settings, tokens) if last else 0
        chunk = _chunk(config, settings, settings.pattern.letters[layers.start : layers.stop], output)
        chunks.append(Chunk(tokens * (sent + chunk.held), tokens * chunk.backward))
    return chunks


def _chunk(config: Config, settings: Settings, letters: str, output: float) -> Chunk:
    """Bytes a token of consecutive layers; `output` is what comes after them and is gone before their backward pass.

    A layer that recomputes keeps its input alone, w h / s, and in its backward pass has all its saved tensors. By then
    the layers behind it have none left. On top of its saved tensors a layer's backward pass has at most 12 I, the fp32
    gradients of the SwiGLU's product and both factors, with which it begins.
    """
    held, peak = 0.0, 0.0
    for letter in letters:
        saved, again = layer(config, settings, letter), letter in settings.recompute
        held += residual(config, settings) if again else saved
        peak = max(peak, held + saved * again + 12 * settings.intermediate_size / config.parallel.tensor)
    return Chunk(held, max(peak, held + output) - held)


def layer(config: Config, settings: Settings, letter: str) -> float:
    """All that a layer saves: mixer, SwiGLU and the norms before them."""
    mixers = {
        "G": lambda: gdn(config, settings),
        "L": lambda: lte(config, settings),
        "S": lambda: attention(config, settings, settings.model.attention.window_size),
        "F": lambda: attention(config, settings, None),
    }
    return mixers[letter]() + 2 * norm(config, settings) + swiglu(config, settings)


def residual(config: Config, settings: Settings) -> float:
    """The residual stream at one place, w h / s."""
    return _width(config) * settings.model.hidden_size / _stream_ranks(config)


def norm(config: Config, settings: Settings) -> float:
    """RMSNorm: its input in fp32 and the normalised input, 8 h / s; its output is counted where it enters."""
    return 8 * settings.model.hidden_size / _stream_ranks(config)


def swiglu(config: Config, settings: Settings) -> float:
    """Input w h; gate, silu(gate) and up in fp32, 12 I; their product, w I."""
    inner = settings.intermediate_size / config.parallel.tensor
    return _width(config) * settings.model.hidden_size + (12 + _width(config)) * inner


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
    heads = model.num_heads / config.parallel.tensor
    keys, values = heads * model.head_dim, heads * value_dim
    chunk = min(CHUNK, config.train.seq_length)
    wide = (8 + width) * (2 * keys + values) + 28 * keys + 8 * values + 20 * values
    within_chunks = 24 * chunk * heads + 4 * keys * value_dim / chunk
    return width * (settings.model.hidden_size + values) + wide + within_chunks


def attention(config: Config, settings: Settings, window_size: int | None) -> float:
    """Full and sliding window attention.

    Input w h; of torch's flash attention q, k and v, repeated for every query head, and output, 4 w Q; sines and
    cosines of q and k, 8 head_dim. fp32 goes block by block as LTE does, with one mask for all KV heads.
    """
    heads = settings.model.attention
    if _width(config) == 4:
        return _blocked(config, settings, window_size, mask_heads=heads.num_heads // settings.kv_heads)
    queries = heads.num_heads * heads.head_dim / config.parallel.tensor
    return 2 * (settings.model.hidden_size + 4 * queries) + 8 * heads.head_dim


def lte(config: Config, settings: Settings) -> float:
    """LTE: blocked attention with a mask a query head, and the router.

    The router's l-th convolution has U / 2^l input channels, U = 2 K, all in fp32: its input, SiLU's input with half
    the channels, and with dropout a byte a channel of the mask: 6 or 7 a channel, 7/4 U channels in all. SiLU's last
    output takes 4 U / 8.
    """
    heads, tensor = settings.model.attention, config.parallel.tensor
    channels = 2 * settings.kv_heads * heads.head_dim / tensor
    router = ((7 if settings.model.lte.dropout else 6) * 7 / 4 + 1 / 2) * channels
    return router + _blocked(config, settings, None, mask_heads=heads.num_heads / tensor)


def _blocked(config: Config, settings: Settings, reach: int | None, mask_heads: float) -> float:
    """`attention.reference` on a GPU, for a document as long as the sample, the most that there can be.

    Input w h; q, output before and after it is joined, w Q each, and with grouped queries two copies more; k and v,
    2 w K; sines and cosines of q and k, 8 head_dim; and the mask, as SDPA adds it to the logits: w a head and column,
    where a block of queries has the columns that its last query reaches.
    """
    heads, width, length = settings.model.attention, _width(config), config.train.seq_length
    a_head = heads.head_dim / config.parallel.tensor
    queries, keys = heads.num_heads * a_head, settings.kv_heads * a_head
    copies = 3 if heads.num_heads == settings.kv_heads else 5
    columns = mean_of_min(length, reach or length) + min(QUERY_BLOCK, length) / 2
    own = settings.model.hidden_size + copies * queries + 2 * keys + mask_heads * columns
    return width * own + 8 * heads.head_dim


def loss(config: Config, settings: Settings, tokens: int) -> float:
    """The final norm's output and its gradient, 2 w h; for all `tokens` together, with W words on this rank, the fp32
    gradient of the output weight, 4 h W, and a chunk's logits beside as many numbers in fp32, (w + 4) W a token."""
    width, hidden, words = (
        _width(config),
        settings.model.hidden_size,
        settings.model.vocab_size / config.parallel.tensor,
    )
    chunk = min(tokens, chunk_length(tokens, int(words), width))
    return 2 * width * hidden + (4 * hidden * words + chunk * (width + 4) * words) / tokens


def _width(config: Config) -> int:
    return 2 if config.train.dtype == "bf16" else 4


def _stream_ranks(config: Config) -> int:
    """Over how many ranks the residual stream's tokens are split."""
    return config.parallel.tensor if config.parallel.sequence else 1
