"""Refuse at load what cannot work, in one sentence that says what to change."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megahybrid.config.batch import micro_batches
from megahybrid.config.branching import branch_point
from megahybrid.config.pattern import parse_pattern
from megahybrid.config.schema import Config, SourceConfig
from megahybrid.config.task_sources import check_stages, named_task, task_sources, text_sources
from megahybrid.errors import UserError
from megahybrid.key import derived, keys
from megahybrid.mixers import KINDS
from megahybrid.tasks import Vocabulary


def validate(config: Config) -> None:
    """Check ranges and combinations. Raises UserError at the first fault."""
    for name, value, rules in keys(config):
        if fault := rules.fault(value):
            raise UserError(f"{name} is {_shown(value)}; {fault}.")
    _model(config)
    _layout(config)
    _training(config)
    _data(config)
    _evaluation(config)


def check_replicas(config: Config, replicas: int) -> None:
    """Check what also depends on the number of data parallel replicas. Raises UserError."""
    parallel, train, count = config.parallel, config.train, micro_batches(config, replicas)
    if train.micro_batch_size * replicas * count != train.global_batch_size:
        raise UserError(
            f"train.global_batch_size ({train.global_batch_size}) must be a multiple of train.micro_batch_size "
            f"times the data parallel size ({train.micro_batch_size} * {replicas})."
        )
    if parallel.virtual_pipeline > 1 and count % parallel.pipeline:
        raise UserError(
            f"With parallel.virtual_pipeline a replica's micro-batches a step ({count}) must be a multiple of "
            f"parallel.pipeline ({parallel.pipeline}); change train.global_batch_size or train.micro_batch_size."
        )


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


def _model(config: Config) -> None:
    model = derived(config.model)
    for letter in dict.fromkeys(parse_pattern(model.pattern).letters):
        KINDS[letter].check(model)


def _layout(config: Config) -> None:
    parallel = config.parallel
    if parallel.gradient_reduction == "bf16" and config.train.dtype == "fp32":
        raise UserError(
            "parallel.gradient_reduction is bf16, which would round what train.dtype fp32 computes; set it to fp32."
        )
    _heads(config)
    keys, ranks = "parallel.context", parallel.context
    if parallel.sequence:
        keys, ranks = "parallel.tensor * parallel.context", parallel.tensor * parallel.context
    if config.train.seq_length % ranks:
        raise UserError(
            f"train.seq_length ({config.train.seq_length}) is split over {keys} ({ranks}) ranks, which does not come "
            "out even; change one of them."
        )
    _pipeline(config)


def tensor_parallel_fault(config: Config, tensor: int) -> str | None:
    """Why the model cannot be split over `tensor` ranks and what to choose, as the end of a sentence, or None."""
    model = derived(config.model)
    for key in ("vocab_size", "intermediate_size"):
        if (count := getattr(model, key)) % tensor:
            return f"does not divide model.{key} ({count}); choose a divisor of it"
    return _heads_fault(config, parse_pattern(model.pattern).letters, tensor)


def require_split(config: Config, processes: int) -> None:
    """Raises UserError where the model cannot be split over all processes, each of which has a part of every layer."""
    if fault := tensor_parallel_fault(config, processes):
        raise UserError(f"All processes share a model evenly; their number, {processes}, {fault}.")


def _heads_fault(config: Config, letters: Iterable[str], ranks: int) -> str | None:
    """The same of these mixers' heads."""
    model = derived(config.model)
    faults = (KINDS[letter].heads_fault(model, ranks) for letter in dict.fromkeys(letters))
    return next(filter(None, faults), None)


def keepers(config: Config) -> str:
    """Letters of the mixers with which context parallel ranks keep their tokens (`Kind.keeps_tokens`)."""
    model, train, parallel = derived(config.model), config.train, config.parallel
    tokens = train.micro_batch_size * train.seq_length // parallel.context
    sizes = tokens, parallel.tensor, parallel.context, 2 if train.dtype == "bf16" else 4
    letters = dict.fromkeys(parse_pattern(model.pattern).letters)
    return "".join(letter for letter in letters if KINDS[letter].keeps_tokens(model, *sizes))


def _heads(config: Config) -> None:
    parallel = config.parallel
    if fault := tensor_parallel_fault(config, parallel.tensor):
        raise UserError(f"parallel.tensor is {parallel.tensor}, which {fault}.")
    ranks = parallel.tensor * parallel.context
    keeping, letters = keepers(config), parse_pattern(config.model.pattern).letters
    for letter in dict.fromkeys(letters):
        if letter not in keeping and (fault := _heads_fault(config, letter, ranks)):
            keys = "parallel.tensor * parallel.context" if parallel.tensor > 1 else "parallel.context"
            raise UserError(f"{keys} is {ranks}, which {fault}.")


def _pipeline(config: Config) -> None:
    parallel, pattern = config.parallel, parse_pattern(config.model.pattern)
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if chunks == 1:
        return
    if parallel.pipeline == 1:
        raise UserError(
            f"parallel.virtual_pipeline is {parallel.virtual_pipeline} without a pipeline; set parallel.pipeline to 2 "
            "or more, or parallel.virtual_pipeline to 1."
        )
    if parallel.zero_stage > 1:
        raise UserError(
            f"parallel.zero_stage {parallel.zero_stage} does not go with parallel.pipeline {parallel.pipeline}: its "
            "gradients would be reduced before the schedule has all of them; set parallel.zero_stage to 1."
        )
    if pattern.stage_starts and len(pattern.stage_starts) + 1 != chunks:
        raise UserError(
            f"model.pattern has {len(pattern.stage_starts) + 1} stages between its '|', but parallel.pipeline * "
            f"parallel.virtual_pipeline is {chunks}; make them equal, or leave '|' out to have stages balanced."
        )
    if len(pattern.letters) < chunks:
        raise UserError(
            f"model.pattern has {len(pattern.letters)} layers, fewer than parallel.pipeline * "
            f"parallel.virtual_pipeline ({chunks}); every stage needs a layer."
        )


def _training(config: Config) -> None:
    train = config.train
    letters = parse_pattern(config.model.pattern).letters
    if train.recompute not in ("none", "all") and not set(train.recompute) <= set(letters):
        raise UserError(
            f"train.recompute is '{train.recompute}'; write none, all, or letters of model.pattern ({letters})."
        )
    if train.cuda_graph and train.recompute != "none":
        raise UserError(
            "train.cuda_graph cannot record recomputed activations; set it to false, or train.recompute to none."
        )
    if train.global_batch_size % train.micro_batch_size:
        raise UserError(
            f"train.global_batch_size ({train.global_batch_size}) must be a multiple of "
            f"train.micro_batch_size ({train.micro_batch_size})."
        )
    listed = {"checkpoint.milestones": config.checkpoint.milestones, "train.trace.steps": train.trace.steps}
    for name, steps in listed.items():
        if (last := max(steps, default=0)) > train.steps:
            raise UserError(f"{name} has {last}, which a run of train.steps = {train.steps} does not reach; remove it.")
    _branch(config)


def _branch(config: Config) -> None:
    train, point = config.train, branch_point(config.train)
    if point is None:
        if train.branch_data == "own":
            raise UserError(
                "train.branch_data is own, but the run is no branch; give train.branch_from, or leave it out."
            )
        return
    trunk, step = point
    if train.init_from is not None:
        raise UserError("train.init_from and train.branch_from are both set; a run begins with one of them.")
    if step >= train.steps:
        raise UserError(
            f"train.branch_from begins at step {step} of train.steps = {train.steps}: there is nothing left to do; "
            "give a larger train.steps, or an earlier step."
        )
    if trunk.resolve() == Path(config.run.dir).resolve():
        raise UserError(
            f"train.branch_from names run.dir '{config.run.dir}' itself; give a new one, or go back with "
            f"train.resume_from={step}."
        )


def _data(config: Config) -> None:
    data = config.data
    if "://" in str(data.path):
        raise UserError(
            f"data.path '{data.path}' must be a local folder; copy what `prepare` writes there and set data.remote."
        )
    if data.identity is not None and not re.fullmatch("[0-9a-f]{16}", data.identity):
        raise UserError(
            f"data.identity is '{data.identity}'; write the 16 hexadecimal digits that `megahybrid doctor RECIPE` "
            "prints, in quotes."
        )
    if data.remote is not None and data.cache is None:
        raise UserError("data.remote needs data.cache, a folder on each node's own disk for the shards in use.")
    for name, source in data.sources.items():
        _keys_of_format(f"data.sources.{name}", source)
        _tokens(f"data.sources.{name}", source, data.tokenizer)
    if data.path is None and (text_sources(config) or not data.sources):
        raise UserError("data.path is not set; give the folder where `prepare` writes.")
    weights = {name: source.weight for name, source in data.sources.items()}
    if weights and not any(weight is None or weight > 0 for weight in weights.values()):
        raise UserError("Every source in data.sources has weight 0; give at least one a weight above 0.")
    if None in weights.values() and any(weights.values()):
        unset = ", ".join(name for name, weight in weights.items() if weight is None)
        raise UserError(
            f"data.sources has weights, but not for {unset}; give every source one, or none, or remove one with null "
            "in its place."
        )
    if any(weight is None for name, weight in weights.items() if name in task_sources(config)):
        raise UserError("A task has no size to count by; give every source in data.sources a weight.")
    check_stages(config, Vocabulary(config.model.vocab_size, 0))


def _keys_of_format(where: str, source: SourceConfig) -> None:
    """Refuse what a source of another format has, and demand what one of its own needs."""
    task, needed = ("task", "parameters", "stages"), "task" if source.format == "task" else "path"
    if getattr(source, needed) is None:
        what = "the task" if needed == "task" else "the folder of its files"
        raise UserError(f"{where}.{needed} is not set; give {what}.")
    for field in dataclasses.fields(source):
        known = field.name in task if source.format == "task" else field.name not in task
        if field.name in ("format", "weight") or known:
            continue
        if getattr(source, field.name) not in (None, [], {}, field.default):
            formats = "all formats but task" if source.format == "task" else "the format task"
            raise UserError(f"{where}.{field.name} is for {formats}; leave it out.")


def _tokens(key: str, source: SourceConfig, tokenizer: str | None) -> None:
    """What only sources of token ids have and need."""
    if source.format not in ("npy", "bin"):
        for name in ("dtype", "eos_token_id"):
            if getattr(source, name) is not None:
                raise UserError(f"{key}.{name} is for the formats npy and bin, not {source.format}; leave it out.")
        return
    if tokenizer is None:
        raise UserError(
            f"{key} holds tokens (format {source.format}), on which no tokenizer can be trained; set data.tokenizer to "
            "the one that they were made with."
        )
    if source.format == "bin":
        if source.dtype is None:
            raise UserError(f"{key}.format bin says nothing of its numbers; set {key}.dtype to uint16 or uint32.")
    elif source.dtype is not None:
        raise UserError(f"{key}.dtype is for format bin: an .npy file says itself what it holds; leave it out.")


def _evaluation(config: Config) -> None:
    evaluate, train = config.evaluate, config.train
    for name in evaluate.tasks:
        named_task(config, name, "evaluate.tasks")
    most = train.micro_batch_size * train.seq_length
    if evaluate.lengths and max(evaluate.lengths) > most:
        raise UserError(
            f"evaluate.lengths has {max(evaluate.lengths)}, more tokens than a micro-batch "
            f"(train.micro_batch_size * train.seq_length = {most}); lower it, or use `megahybrid eval`."
        )
