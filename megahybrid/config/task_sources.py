"""A recipe's task sources: their parameters, by stages."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from megahybrid.config.schema import Config, SourceConfig
from megahybrid.errors import UserError
from megahybrid.key import keys
from megahybrid.tasks import TASKS, Task, TaskParameters, Vocabulary


class Stage(NamedTuple):
    """A part of a source's samples, with the parameters of the task's samples in them.

    Attributes:
        until: the number of the first sample of the next stage; None where this one lasts for ever.
        parameters: of the task's own class.
    """

    until: int | None
    parameters: TaskParameters


def task_sources(config: Config) -> dict[str, SourceConfig]:
    """The recipe's task sources, sorted by name."""
    return {name: source for name, source in sorted(config.data.sources.items()) if source.format == "task"}


def text_sources(config: Config) -> dict[str, SourceConfig]:
    """The recipe's other sources, sorted by name: those that `prepare` reads."""
    return {name: source for name, source in sorted(config.data.sources.items()) if source.format != "task"}


def bare_tokens(config: Config) -> bool:
    """Whether the recipe's model knows bare tokens only, numbers without text: nothing of it has a tokenizer."""
    return bool(task_sources(config)) and not text_sources(config) and config.data.tokenizer is None


def find_task(name: str, where: str) -> Task:
    """The task of a name. Raises UserError, beginning with `where`, where there is none."""
    if name not in TASKS:
        raise UserError(f"{where} is '{name}', which is no task; {_instead(name, TASKS)}")
    return TASKS[name]


def asked_sources(config: Config) -> list[str]:
    """The task sources that evaluation asks when it is not told which: those that are trained on."""
    return [name for name, source in task_sources(config).items() if source.weight != 0]


def named_task(config: Config, name: str, where: str) -> tuple[Task, dict[str, Any]]:
    """What evaluation asks by a name: a task source's task with the parameters of its last stage; else the task of that
    name, with those of the only source that trains on it, or none. Raises UserError, beginning with `where`."""
    sources = task_sources(config)
    trained = [each for each in asked_sources(config) if sources[each].task == name]
    source = name if name in sources else trained[0] if len(trained) == 1 else None
    if source is None:
        return find_task(name, where), {}
    task = find_task(str(sources[source].task), f"data.sources.{source}.task")
    return task, dataclasses.asdict(task_stages(source, sources[source])[-1].parameters)


def task_parameters(task: Task, values: Mapping[str, Any], where: str) -> TaskParameters:
    """What a task's parameters come to, with defaults for those that `values` leaves out. Raises UserError, naming
    them after `where`, for what the task does not know or cannot be."""
    schema = OmegaConf.structured(task.parameters)
    try:
        made = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create(dict(values))))
    except ConfigKeyError as error:
        name = str(error.full_key)
        raise UserError(f"{where}.{name} is no parameter of {task.name}; {_instead(name, list(schema))}") from error
    except MissingMandatoryValue as error:
        raise UserError(f"{where} does not set {error.full_key}, which {task.name} needs; add it.") from error
    except OmegaConfBaseException as error:
        fault = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{where}.{error.full_key}: {fault}; give a value of that type.") from error
    for name, value, rules in keys(made):
        if fault := rules.fault(value):
            raise UserError(f"{where}.{name} is {value}; {fault}.")
    return made


def task_stages(name: str, source: SourceConfig) -> list[Stage]:
    """The stages of the task source called `name`: a single one where the recipe has none. Raises UserError."""
    where = f"data.sources.{name}"
    task, stages, last = find_task(str(source.task), f"{where}.task"), [], 0
    given = source.stages or [{}]
    for number, values in enumerate(given):
        place = f"{where}.stages[{number}]" if source.stages else f"{where}.parameters"
        if not isinstance(values, Mapping):
            raise UserError(f"{place} is {values}; give it parameters, such as {{until: 20000, length: 64}}.")
        until = values.get("until")
        if number < len(given) - 1:
            if type(until) is not int or until <= last:
                raise UserError(f"{place}.until is {until}; it must be a whole number greater than {last}.")
            last = until
        elif until is not None:
            raise UserError(f"{place}.until is {until}, but the last stage lasts for ever; leave it out.")
        task_parameters(task, source.parameters, f"{where}.parameters")  # what stands there is wrong there
        own = {key: value for key, value in values.items() if key != "until"}
        stages.append(Stage(until, task_parameters(task, {**source.parameters, **own}, place)))
    return stages


def check_stages(config: Config, vocabulary: Vocabulary) -> None:
    """Raises UserError for what keeps a task source from making its samples; of those that write text only some of it
    where `vocabulary` has no tokenizer."""
    for name, source in task_sources(config).items():
        task = find_task(str(source.task), f"data.sources.{name}.task")
        if task.text and bare_tokens(config):
            raise UserError(
                f"data.sources.{name} writes text ({task.name}), and there is no text to train a tokenizer on; set "
                "data.tokenizer."
            )
        for stage in task_stages(name, source):
            length = stage.parameters.length or config.train.seq_length
            if length > config.train.seq_length:
                raise UserError(
                    f"data.sources.{name} has samples of length {length}, longer than train.seq_length "
                    f"({config.train.seq_length}); lower it."
                )
            if vocabulary.tokenizer is not None or not task.text:
                task.check(stage.parameters, length, vocabulary)


def _instead(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(known)}."
