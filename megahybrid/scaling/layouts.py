"""Which layout a recipe should have on so many GPUs, by what layouts take of time and memory.

Time is computed from kernels and links as they were measured on one and two GPUs (docs/performance), and from a
network that was not. What is named here is all that is assumed; that ranks wait for each other is not in it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from megahybrid.config import Config
from megahybrid.config.batch import micro_batches
from megahybrid.config.validate import check_replicas, validate
from megahybrid.errors import UserError
from megahybrid.mixers import KINDS
from megahybrid.model.settings import Settings
from megahybrid.scaling.hours import kernel_seconds, with_host
from megahybrid.scaling.memory import BUCKET, peak_bytes, residual
from megahybrid.scaling.parameters import parameter_specs, parameters_by_rank
from megahybrid.scaling.splitting import split_matrices
from megahybrid.scaling.stages import layer_costs, stage_layers


@dataclass(frozen=True)
class Cluster:
    """H100s with NVLink, and what layouts lose on them.

    Attributes:
        host: GPUs of one.
        memory: bytes that training may allocate of a GPU's 80 GB, so that some are left for NCCL and fragments.
        link: bytes a second that a GPU gives and gets in a collective over its host.
        beside_matmuls: the same of those that tensor parallel ranks make beside matmuls.
        exposed: part of these during which nothing is multiplied; also of what ZeRO-3 gathers in passes, of which 0.47
            was measured, and 0.67 with what kernels beside it lose.
        smaller: what kernels take longer each time that tensor parallel ranks halve them.
        hindering: bytes of gradients that a GPU gives and gets for a second that kernels lose by reductions beside
            them: 11.5 ms for 2.7 GB, by the steps of ZeRO-1 and 2. By bytes also over a network, which is a guess.
        interleaved: what kernels take longer beside an interleaved pipeline's transfers, by its steps.
        network: bytes a second that a GPU gives and gets between hosts: 80 % of 400 Gbit/s, not measured.
    """

    host: int = 8
    memory: float = 74 * 2**30
    link: float = 300e9
    beside_matmuls: float = 175e9
    exposed: float = 0.54
    smaller: float = 1.03
    hindering: float = 235e9
    interleaved: float = 1.027
    network: float = 40e9


CLUSTER = Cluster()
_BACKWARD = 2 / 3  # of a micro-batch's time
_EXCHANGES = 8  # of a layer's input or output over its tensor parallel ranks: two gathers, two sums, and as many back


@dataclass(frozen=True)
class Seconds:
    """What a step takes on the rank that is slowest, one after the other.

    Attributes:
        kernels: on as many GPUs as there are, if nothing were lost.
        smaller: kernels that are smaller or slower, stages that are not equal, or launches that last longer.
        tensor: exposed gathers and sums of activations.
        context: what context parallel ranks exchange in mixers, beside which nothing else is done.
        bubble: the pipeline's.
        transfers: exposed ones between stages.
        gradients: reductions that last longer than the backward pass beside them, the last bucket's, and what kernels
            lose by the others.
        weights: gathered after the update, and with ZeRO-3 in the passes.
    """

    kernels: float
    smaller: float
    tensor: float
    context: float
    bubble: float
    transfers: float
    gradients: float
    weights: float

    @property
    def step(self) -> float:
        """All of it."""
        return sum(getattr(self, each.name) for each in fields(self))

    @property
    def share(self) -> float:
        """Of one GPU's tokens a second, what each makes."""
        return self.kernels / self.step


@dataclass(frozen=True)
class Layout:
    """A recipe on some replicas.

    Attributes:
        config: with its layout and micro-batch.
        replicas: data parallel ones.
        seconds: of a step.
    """

    config: Config
    replicas: int
    seconds: Seconds

    def changes(self, recipe: Config) -> str:
        """What to write behind a recipe for it."""
        before, after = (_layout_keys(each) for each in (recipe, self.config))
        return " ".join(f"{key}={value}" for key, value in after.items() if value != before[key])

    @property
    def peak(self) -> float:
        """Bytes that the GPU allocates that needs most."""
        return max(peak_bytes(self.config, self.replicas))


def _layout_keys(config: Config) -> dict[str, str]:
    chosen = {f"parallel.{each.name}": getattr(config.parallel, each.name) for each in fields(config.parallel)}
    chosen["train.micro_batch_size"] = config.train.micro_batch_size
    return {key: str(value).lower() for key, value in chosen.items()}


def fitting(config: Config, gpus: int, most: int = 5) -> list[Layout]:
    """The fastest layouts of all these GPUs that their memory is enough for, at the recipe's global batch,
    recomputation and sums of gradients."""
    found: dict[str, Layout] = {}
    for layout in sorted(_possible(config, gpus), key=lambda layout: layout.seconds.step):
        split = repr(layout.config.parallel)  # each with its fastest micro-batch
        if len(found) < most and split not in found and layout.peak <= CLUSTER.memory:
            found[split] = layout
    return list(found.values())


def splits(config: Config, gpus: int) -> bool:
    """Whether any layout divides the recipe over all these GPUs, whatever memory it takes."""
    return any(True for _ in _possible(config, gpus))


def _possible(config: Config, gpus: int) -> Iterator[Layout]:
    powers = [2**n for n in range(int(math.log2(CLUSTER.host)) + 1)]
    for tensor, pipeline, chunks, stage in itertools.product(powers, powers, (1, 2), (1, 2, 3)):
        parallel = replace(
            config.parallel,
            tensor=tensor,
            sequence=tensor > 1,
            pipeline=pipeline,
            virtual_pipeline=chunks,
            zero_stage=stage,
        )
        if gpus % parallel.replica:
            continue
        micro = config.train.micro_batch_size * tensor
        while micro:
            train, replicas = replace(config.train, micro_batch_size=micro), gpus // parallel.replica
            other = replace(config, parallel=parallel, train=train)
            micro //= 2
            try:
                validate(other)
                check_replicas(other, replicas)
            except UserError:
                continue
            yield Layout(other, replicas, seconds(other, replicas))


def seconds(config: Config, replicas: int) -> Seconds:
    """What a step of a recipe takes in its layout."""
    parallel, count = config.parallel, micro_batches(config, replicas)
    kernels = kernel_seconds(config) / (replicas * parallel.replica)
    costs, layers = layer_costs(config), _layers_by_rank(config)
    largest = max(sum(costs[layer] for layer in own) for own in layers) * parallel.pipeline / sum(costs)
    letters = Settings.of(config).pattern.letters
    slower = CLUSTER.smaller ** math.log2(parallel.tensor)
    if parallel.virtual_pipeline > 1:
        slower *= CLUSTER.interleaved
    held, processes = ["".join(letters[layer] for layer in own) for own in layers], replicas * parallel.replica
    computing = max(with_host(config, processes, kernels * largest * slower, own, count) for own in held)
    tensor = CLUSTER.exposed * max(map(len, layers)) * count * exchanged(config) / CLUSTER.beside_matmuls
    crossing_rank = max(crossing(config, own) for own in held)
    context = count * crossing_rank / _rate(parallel.tensor * parallel.context, parallel.tensor)
    bubble = (parallel.pipeline - 1) / (parallel.virtual_pipeline * count) * (computing + tensor + context)
    transfers = 0.0
    if parallel.pipeline > 1 and parallel.virtual_pipeline == 1:  # interleaved ones go beside the passes
        ranks = parallel.replica // parallel.pipeline * replicas
        transfers = 2 * count * handed_on(config) / _rate(2 * ranks, ranks)
    gradients, weights = _replicas_seconds(config, replicas, computing / count)
    return Seconds(kernels, computing - kernels, tensor, context, bubble, transfers, gradients, weights)


def _replicas_seconds(config: Config, replicas: int, a_micro_batch: float) -> tuple[float, float]:
    """What replicas exchange of gradients and weights, exposed."""
    parallel, count = config.parallel, micro_batches(config, replicas)
    holders = replicas * parallel.context
    if holders == 1:
        return 0.0, 0.0
    rate = _rate(parallel.tensor * holders, parallel.tensor)
    sent, width = _travelling(config), 2 if config.train.dtype == "bf16" else 4
    parameters, part = max(parameters_by_rank(config)), (holders - 1) / holders
    split = sum(split_matrices(config, holders).values())
    reducing, gathering = parameters * sent * part / rate, (parameters - split) * width * part / rate
    hidden, last = _BACKWARD * a_micro_batch, min(BUCKET, parameters) * sent * part / rate
    hindered = parameters * sent * part / CLUSTER.hindering
    gradients = (count if parallel.zero_stage > 1 else 1) * (max(reducing - hidden, last) + hindered)
    passes = 2 * split * width * part / rate  # forward and backward
    return gradients, gathering + count * max(CLUSTER.exposed * passes, passes - a_micro_batch)


def _rate(ranks: int, stride: int) -> float:
    """Bytes a second of each in a collective of every `stride`-th of so many GPUs: between hosts each host gives as
    much as those of its GPUs that take part."""
    return (
        CLUSTER.link if ranks <= CLUSTER.host else min(CLUSTER.link, CLUSTER.network * max(1, CLUSTER.host // stride))
    )


def _travelling(config: Config) -> int:
    return 4 if config.parallel.gradient_reduction == "fp32" else 2


def exchanged(config: Config) -> float:
    """Bytes that a tensor parallel rank gives, and gets, of a layer's inputs and outputs in a micro-batch."""
    ranks, width = config.parallel.tensor, 2 if config.train.dtype == "bf16" else 4
    whole = _tokens(config) * config.model.hidden_size * width
    return _EXCHANGES * whole * (ranks - 1) / ranks


def crossing(config: Config, letters: str) -> float:
    """Bytes that a context parallel rank gets in these layers' mixers in a micro-batch, forward and backward."""
    settings, ranks, width = Settings.of(config), config.parallel.context, 2 if config.train.dtype == "bf16" else 4
    if ranks == 1:
        return 0.0
    total = 0.0
    for letter in letters:
        kind, passes = KINDS[letter], 3 if letter in settings.recompute else 2
        once = width * kind.exchanged(settings.model) * _tokens(config) * (ranks - 1) / ranks
        if letter in settings.keepers:
            once = kind.passed_on(settings.model, ranks, width)
        total += passes * once / config.parallel.tensor
    return total


def handed_on(config: Config) -> float:
    """Bytes that a micro-batch has between two stages, on one rank."""
    return _tokens(config) * residual(config, Settings.of(config))


def _tokens(config: Config) -> int:
    """Of a micro-batch, on a context parallel rank."""
    return config.train.micro_batch_size * config.train.seq_length // config.parallel.context


def _layers_by_rank(config: Config) -> list[list[int]]:
    every, pipeline = stage_layers(config), config.parallel.pipeline
    return [[layer for chunk in every[rank::pipeline] for layer in chunk] for rank in range(pipeline)]


@dataclass(frozen=True)
class Volume:
    """Bytes that the GPUs that hold a part of the model each give, and get, for it in a step.

    Attributes:
        part: a kind of layer, with its SwiGLU and norms, or what is not a layer.
        gradients, weights: between replicas.
        activations: between tensor parallel ranks.
    """

    part: str
    gradients: float
    weights: float
    activations: float


def volumes(layout: Layout) -> list[Volume]:
    """By part, of all layers of a kind together, as if one pipeline rank held them all."""
    config, replicas = layout.config, layout.replicas
    letters, count = Settings.of(config).pattern.letters, micro_batches(config, replicas)
    holders = replicas * config.parallel.context
    stage, part = config.parallel.zero_stage, (holders - 1) / holders
    sizes: Counter[str] = Counter()
    for name, spec in parameter_specs(config).items():
        words = name.split(".")
        sizes[letters[int(words[1])] if words[0] == "layers" else ""] += math.prod(
            spec.local_shape(config.parallel.tensor)
        )
    split: Counter[str] = Counter()
    for layer, size in split_matrices(config, holders).items():
        split[letters[layer]] += size
    width = 2 if config.train.dtype == "bf16" else 4
    return [
        Volume(
            f"{KINDS[letter].title} layers" if letter else "embedding and output",
            size * _travelling(config) * part * (count if stage > 1 else 1),
            (size - split[letter] + 2 * count * split[letter]) * width * part,
            letters.count(letter) * count * exchanged(config) if letter else 0,
        )
        for letter, size in sizes.items()
    ]
