"""Read a recipe: the files it includes, its own YAML, then key=value overrides, checked against the schema."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import sysconfig
import typing
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    GrammarParseError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from megahybrid.config.arithmetic import steps_of, whole
from megahybrid.config.schema import Config
from megahybrid.config.validate import validate
from megahybrid.errors import UserError
from megahybrid.files import write_text

T = typing.TypeVar("T")

# The interpreter's own library, and the packages installed for it: text that is on every machine.
OmegaConf.register_resolver("python_stdlib", lambda: str(Path(os.__file__).parent), replace=True)
OmegaConf.register_resolver("python_packages", lambda: sysconfig.get_paths()["purelib"], replace=True)
# Heads that follow the width: ${whole:${model.hidden_size}/64}.
OmegaConf.register_resolver("whole", lambda expression: whole(str(expression)), replace=True)


def _steps(*tokens: object, _root_: DictConfig) -> int:
    if len(tokens) != 1:
        raise UserError("${steps:…} takes one number of tokens; write one such as ${steps:10.7B}.")
    batch, length = _root_.train.global_batch_size, _root_.train.seq_length
    return steps_of(str(tokens[0]), max(1, batch * length))  # what they must be is said when the recipe is checked


# Steps of a run that reads so many tokens: ${steps:10.7B}.
OmegaConf.register_resolver("steps", _steps, replace=True)


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The recipe with `key=value` overrides applied, validated.

    `include: FILE` or `include: [FILE, …]` at its top level names other files, relative to its own folder, whose keys
    hold where the recipe has none; of two that set the same key the later one holds. A source that is null removes what
    came before under its name.
    Raises UserError for a missing or malformed file, an unknown key, a missing or impossible value.
    """
    path = Path(recipe)
    if not path.is_file():
        raise UserError(f"There is no recipe '{recipe}'; give the path of a YAML file such as recipes/quickstart.yaml.")
    config = merge(Config, _with_includes(path, (), set()), overrides, str(recipe))
    validate(config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, atomically."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def _with_includes(path: Path, above: tuple[Path, ...], read: set[Path]) -> list[DictConfig]:
    """The file's tree after those of the files it includes, each file once: one that two others share must not undo
    what the first of them changed.

    Args:
        path: the file.
        above: the files whose includes led here, outermost first.
        read: resolved paths of all files read so far; this one's are added.
    """
    if path.resolve() in [each.resolve() for each in above]:
        chain = " → ".join(f"'{each}'" for each in (*above, path))
        raise UserError(f"A recipe cannot include itself: {chain}; remove one of these includes.")
    if path.resolve() in read:
        return []
    read.add(path.resolve())
    tree = read_tree(path)
    includes = _pop_includes(tree, path)
    trees = []
    for name in includes:
        included = path.parent / name
        if not included.is_file():
            raise UserError(f"'{path}' includes '{name}', but there is no file '{included}'; correct its include.")
        trees += _with_includes(included, (*above, path), read)
    return [*trees, tree]


def read_tree(path: Path) -> DictConfig:
    """The YAML file's tree, nothing in it resolved. Raises UserError."""
    try:
        tree = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"'{path}' must hold sections such as model: and train:, not a list or a single value.")
    return tree


def _pop_includes(tree: DictConfig, path: Path) -> list[str]:
    """Take the `include` key out of the tree."""
    if "include" not in tree:
        return []
    value = OmegaConf.to_container(tree)["include"]  # unresolved: what an interpolation gives is not known yet
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"'{path}': include must be a file name or a list of file names, relative to that file.")
    del tree["include"]
    return names


def merge(schema: type[T], trees: Sequence[DictConfig], overrides: Sequence[str], file: str) -> T:
    """An object of the dataclass `schema` from its defaults, trees and then key=value overrides, later ones on top.

    Null in place of a named section (`_maps_of_sections`) removes it from what came before; the trees lose both.
    Raises UserError for an unknown key, a missing one or one of another type; `file` is what lacks a missing one.
    """
    try:
        changes = [_read_override(override) for override in overrides]
        for layer in (*trees, *changes):
            _require_sections(layer, schema, "")
        for key in _maps_of_sections(schema):
            _remove_nulls([*trees, *changes], key)
        layers = [*trees, OmegaConf.merge({}, *changes)]  # one for all changes: each costs a check of its types
        return typing.cast(T, OmegaConf.to_object(OmegaConf.merge(_defaults(schema), *layers)))
    except ConfigKeyError as error:
        raise UserError(_unknown_key(schema, str(error.full_key))) from error
    except MissingMandatoryValue as error:
        raise UserError(f"'{file}' does not set {error.full_key}; add it.") from error
    except (InterpolationResolutionError, GrammarParseError) as error:
        raise UserError(f"{error.full_key or file}: {_first_line(error)}.") from error
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{where}{_first_line(error)}; give a value of that type.") from error


def _read_override(override: str) -> DictConfig:
    """The tree of one key=value. Raises UserError, or OmegaConf's own fault."""
    if "=" not in override or override.startswith("="):
        raise UserError(f"'{override}' is not an override; write key=value, such as train.steps=100.")
    try:
        return OmegaConf.from_dotlist([override])
    except yaml.YAMLError as error:
        raise UserError(
            f"The value of '{override}' is not valid YAML ({_first_line(error)}); put texts with special "
            """characters in quotes, and all of it in the shell's: 'key=["*.txt"]'."""
        ) from error


@functools.cache
def _defaults(schema: type) -> DictConfig:
    """Made once, and copied by whoever merges: it takes longer than all the rest."""
    return OmegaConf.structured(schema)


def _require_sections(tree: DictConfig, schema: type, prefix: str) -> None:
    """Refuse a plain value where the schema has a section, named entries or a list, and one of these where it has
    another; OmegaConf's own message does not name the key."""
    hints = typing.get_type_hints(schema)
    for key in tree:
        hint, node, name = hints.get(str(key)), tree._get_node(key), f"{prefix}{key}"
        if type(None) in typing.get_args(hint):
            if node._is_none():
                continue
            hint = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(hint):
            if not OmegaConf.is_dict(node):
                example = dataclasses.fields(hint)[0].name
                raise UserError(f"{name} is a section, not a value; set its keys, such as {name}.{example}.")
            _require_sections(node, hint, f"{name}.")
        elif node._is_interpolation():
            continue
        elif typing.get_origin(hint) is dict and not OmegaConf.is_dict(node):
            raise UserError(f"{name} holds named entries; write {{NAME: …}}.")
        elif typing.get_origin(hint) in (list, tuple) and not OmegaConf.is_list(node):
            raise UserError(f"{name} is a list; write [ … ].")


def _maps_of_sections(schema: type, prefix: str = "") -> typing.Iterator[str]:
    """Keys that hold sections by names of the user's choice, such as data.sources."""
    for name, hint in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            yield from _maps_of_sections(hint, f"{prefix}{name}.")
        elif typing.get_origin(hint) is dict and dataclasses.is_dataclass(typing.get_args(hint)[1]):
            yield prefix + name


def _remove_nulls(layers: Sequence[DictConfig], key: str) -> None:
    """Of the map at `key`, take what a layer sets to null out of it and out of all layers before. Raises UserError
    where none of these has it."""
    before: list[DictConfig] = []
    for entries in filter(None, (_entries(layer, key) for layer in layers)):
        for name in [name for name in entries if entries._get_node(name)._is_none()]:
            holders = [each for each in before if each._get_node(name) is not None]
            if not holders:
                names = ", ".join(dict.fromkeys(str(name) for each in before for name in each))
                raise UserError(
                    f"{key}.{name} is null, which removes what came before under that name, but {key} had "
                    f"{f'only {names}' if names else 'nothing'} there; correct the name, or leave it out."
                )
            for each in [*holders, entries]:
                del each[name]
        before.append(entries)


def _entries(layer: DictConfig, key: str) -> DictConfig | None:
    """The map at `key`, None where the layer does not spell one out."""
    section, _, name = key.rpartition(".")
    above = OmegaConf.select(layer, section)
    node = None if above is None else above._get_node(name)
    return node if OmegaConf.is_dict(node) else None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


def _unknown_key(schema: type, full_key: str) -> str:
    keys, (section, _, name) = list(known_keys(schema)), full_key.rpartition(".")
    beside = {last: key for key in keys for above, _, last in [key.rpartition(".")] if above == section}
    close = [beside[each] for each in difflib.get_close_matches(name, list(beside), n=1, cutoff=0.7)]
    close = close or [key for key in keys if key.endswith(f".{name}")]  # in another section
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    elif section and beside:
        hint = f"{section} has {', '.join(beside)}."
    else:
        hint = f"see {schema.__module__.replace('.', '/')}.py."
    return f"Unknown configuration key '{full_key}'; {hint}"


def known_keys(schema: type, prefix: str = "") -> typing.Iterator[str]:
    """Every key of the schema, dotted."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from known_keys(hints[field.name], f"{prefix}{field.name}.")
