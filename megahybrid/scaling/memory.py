"""Memory a GPU needs in training, in bytes: what ZeRO keeps, and what the layers save for the backward pass.

Activations are counted tensor by tensor as the Triton kernels and torch's attention save them, per token, rows as wide
as a projection and wider, and states that mixers keep: what is smaller (logarithms of denominators, scores, indices,
dropout keys) and the allocator's slack add a few per cent. Without a GPU ops run in PyTorch
and keep far more.

Letters in the formulas: h hidden size, w bytes of an activation (2 in bf16, 4 in fp32), I width of the SwiGLU. What an
op widens to fp32 takes 4 in either case. What a mixer keeps is said by its kind.

With t tensor parallel ranks I, what a mixer has of heads and the vocabulary are a rank's own, so 1 / t. The residual
stream is whole on every rank, or with sequence parallelism 1 / t of the tokens; s is that divisor, 1 or t. What
projections read was gathered once and is kept whole. Of c context parallel ranks each has 1 / c of the tokens; in a
mixer that exchanges them all tokens and of the heads 1 / (t c).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megahybrid.config.batch import micro_batches
from megahybrid.config.schema import Config
from megahybrid.errors import UserError
from megahybrid.mixers import KINDS
from megahybrid.mixers.kind import Activations, MicroBatch
from megahybrid.model.settings import Settings
from megahybrid.scaling.parameters import parameter_specs, parameters_by_rank
from megahybrid.scaling.schedule import in_flight
from megahybrid.scaling.splitting import gathered, kept_whole
from megahybrid.scaling.stages import stage_layers
from megahybrid_kernels.linear_cross_entropy.chunks import chunk_length

ZERO_STAGES = (1, 2, 3)
BUCKET = 4 * 10**7
"""Gradients that are reduced at once, at most or of one parameter: enough to fill links, little of a step."""


def states(config: Config, parameters: int, zero_stage: int, replicas: int) -> float:
    """Bytes a GPU of weights, gradients and optimizer (Rajbhandari et al., "ZeRO", arXiv 1910.02054, section 5).

    A parameter takes: its working copy, w; its gradient, accumulated in fp32 in either precision, 4; and 12 in the
    optimizer, master weight and two moments in fp32 (DeepSpeed keeps the master also of fp32 weights). Of these every
    stage splits the optimizer's over the replicas, stage 2 also the gradients, stage 3 also the working copies.
    """
    weights = parameters * _width(config) / (replicas if zero_stage >= 3 else 1)
    gradients = parameters * 4 / (replicas if zero_stage >= 2 else 1)
    return weights + gradients + parameters * 12 / replicas


def peak_bytes(config: Config, replicas: int) -> list[float]:
    """Most bytes that a GPU holds at the start or in a step, by pipeline rank, with `replicas` data parallel ones, each
    of which has all context parallel ranks' shares of the states.

    In a step, beside its states, that is the activations, which gradients in reduction replace, and what ZeRO-3 has
    whole. The update takes nothing more.
    """
    stage, peaks, holders = config.parallel.zero_stage, [], replicas * config.parallel.context
    for rank, count in enumerate(parameters_by_rank(config)):
        passes = _backward(config, activations(config, replicas, rank), count, holders)
        passes += _width(config) * gathered(config, holders)
        peaks.append(max(start_up(config, count, holders), states(config, count, stage, holders) + passes))
    return peaks


def start_up(config: Config, parameters: int, replicas: int) -> float:
    """Most bytes that a GPU holds until the first step: its states, and what ZeRO-3 keeps whole; or with ZeRO-2, before
    it has moments, beside working copies, masters and shards of gradients DeepSpeed's sums of all gradients. Working
    copies are split by ZeRO-3 a layer at a time, before there are masters; what is drawn or read is so on the host.
    """
    stage = config.parallel.zero_stage
    before = parameters * (_width(config) + 4 + 8 / replicas) if stage == 2 else 0
    return max(states(config, parameters, stage, replicas) + _width(config) * kept_whole(config, replicas), before)


def check_room(config: Config, replicas: int, room: float) -> None:
    """Raise UserError where a GPU of `room` bytes cannot hold what a run has before its first step."""
    holders = replicas * config.parallel.context
    needed = max(start_up(config, count, holders) for count in parameters_by_rank(config))
    if needed > room:
        raise UserError(
            f"In this layout a GPU holds {needed / 2**30:.1f} GiB before the first step, and this one has "
            f"{room / 2**30:.1f}; use parallel.zero_stage=3, more parallel.tensor or more GPUs."
        )


def _backward(config: Config, held: float, parameters: int, replicas: int) -> float:
    """Activations, or what is first reduced and the activations that the backward pass has left by then: it has come as
    far as the bucket's share of the parameters."""
    left = 1 - _bucket(config, parameters) / parameters
    return max(held, held * left + reduction(config, parameters, replicas))


def reduction(config: Config, parameters: int, replicas: int) -> float:
    """What the reduction of gradients takes, of w bytes each, r on their way.

    ZeRO-1 has no other gradients than the sums in fp32, which are reduced in their place, or as a copy of a bucket, r,
    into another of the rank's piece, r / replicas. ZeRO 2 and 3 have these while they fill the next bucket, r.
    """
    travels, bucket = 4 if config.parallel.gradient_reduction == "fp32" else 2, _bucket(config, parameters)
    piece = travels * bucket / replicas
    if config.parallel.zero_stage == 1:
        return travels * bucket + piece if travels == 2 else 0
    return 2 * travels * bucket + piece


def _bucket(config: Config, parameters: int) -> int:
    """How many gradients are reduced at once, of a rank's so many parameters."""
    tensor = config.parallel.tensor
    largest = max(math.prod(spec.local_shape(tensor)) for spec in parameter_specs(config).values())
    return min(parameters, max(largest, BUCKET))


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
    tokens = config.train.micro_batch_size * config.train.seq_length // config.parallel.context
    chunks = []
    for number, layers in enumerate(every):
        first, last = number == 0, number == len(every) - 1
        sent = tokens * ((not first) + (not last)) * residual(config, settings)
        chunk = _chunk(config, settings, settings.pattern.letters[layers.start : layers.stop], tokens)
        if last:
            chunk = _with_loss(chunk, config, settings, tokens, tied=first and settings.model.tie_embeddings)
        chunks.append(Chunk(sent + chunk.held, chunk.backward))
    return chunks


def _chunk(config: Config, settings: Settings, letters: str, tokens: int) -> Chunk:
    """Consecutive layers.

    A layer that recomputes keeps its input, w h / s, and its mixer's decision alone, and in its backward pass has all
    its saved tensors, and its output in place of the input. By then the layers behind it have none left.
    """
    held, peak = 0.0, 0.0
    for letter in letters:
        saved, decision = layer(config, settings, letter), _mixer(config, settings, letter).decision
        again = letter in settings.recompute
        held += residual(config, settings) + decision if again else saved
        peak = max(peak, held + (saved - decision) * again + layer_backward(config, settings, letter))
    return Chunk(tokens * held, tokens * (peak - held))


def _with_loss(chunk: Chunk, config: Config, settings: Settings, tokens: int, tied: bool) -> Chunk:
    """The last layers with final norm, output layer and loss, which makes gradients in its forward pass.

    Kept until the backward pass: the norm's input, w h / s; the gradient of its output, w h; and that of the output
    weight in fp32, 4 h W for W words on this rank. At its peak the loss also has the norm's output, w h, and a chunk of
    tokens' logits, w W each; or in the backward pass the two gradients again in w. Then only the hidden states' is
    left, and where the output weight is the embedding, its own, until the embedding adds to it.
    """
    width, hidden = _width(config), settings.model.hidden_size
    words = settings.model.vocab_size // config.parallel.tensor
    kept = tokens * (residual(config, settings) + width * hidden) + 4 * hidden * words
    logits = width * words * min(tokens, chunk_length(tokens, words, width))
    at_loss = tokens * width * hidden + max(logits, width * hidden * words)
    in_layers = chunk.backward + width * hidden * words * tied - kept
    return Chunk(chunk.held + kept, max(at_loss, in_layers))


def layer(config: Config, settings: Settings, letter: str) -> float:
    """All that a layer saves: what both norms read, 2 w h / s, what projections read, 2 w h, the SwiGLU's gate, up and
    product, 3 w I, and the mixer's own."""
    stream = 2 * residual(config, settings) + 2 * _width(config) * settings.model.hidden_size
    return stream + 3 * _inner(config, settings) + _mixer(config, settings, letter).saved


def layer_backward(config: Config, settings: Settings, letter: str) -> float:
    """What a layer's backward pass has beyond all its saved tensors: in the SwiGLU, whose product is gone, gradients of
    product, gate and up, 2 w I more; or in the mixer, when all of the SwiGLU's 3 w I are gone, the mixer's gradients.

    In both there is the stream's gradient, w h / s; in the mixer that of its input in place of the SwiGLU's input.
    """
    inner = _inner(config, settings)
    mixer = _mixer(config, settings, letter).backward - 3 * inner
    return residual(config, settings) + max(2 * inner, mixer)


def residual(config: Config, settings: Settings) -> float:
    """The residual stream at one place, w h / s."""
    return _width(config) * settings.model.hidden_size / _stream_ranks(config)


def _inner(config: Config, settings: Settings) -> float:
    """A tensor of the SwiGLU, w I."""
    return _width(config) * settings.model.intermediate_size / config.parallel.tensor


def _mixer(config: Config, settings: Settings, letter: str) -> Activations:
    """Its bytes for each token of this rank, at most where its ranks keep tokens in some steps, and not in others."""
    train, width, tensor, contexts = config.train, _width(config), config.parallel.tensor, config.parallel.context
    kind, model, samples, length = KINDS[letter], settings.model, train.micro_batch_size, train.seq_length
    batch = MicroBatch(samples, length, width, tensor * contexts, contexts > 1)
    exchanging = Activations(*(contexts * each for each in kind.activations(model, batch)))
    if letter not in settings.keepers:
        return exchanging
    own = max(1, samples // contexts), min(length, samples * length // contexts)
    keeping = kind.activations(model, MicroBatch(*own, width, tensor, rows=contexts))
    if not kind.exchanges_at_times(model, tensor * contexts):
        return keeping
    return Activations(*map(max, exchanging, keeping))


def _width(config: Config) -> int:
    return 2 if config.train.dtype == "bf16" else 4


def _stream_ranks(config: Config) -> int:
    """Over how many ranks the residual stream's tokens are split."""
    return config.parallel.tensor if config.parallel.sequence else 1
