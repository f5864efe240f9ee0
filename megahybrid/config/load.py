"""Read a recipe: YAML, then key=value overrides, checked against the schema."""

from __future__ import annotations

import dataclasses
import difflib
import os
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

from megahybrid.config.schema import Config
from megahybrid.config.validate import validate
from megahybrid.errors import UserError
from megahybrid.files import write_text

# The interpreter's own library: text that is on every machine.
OmegaConf.register_resolver("python_stdlib", lambda: str(Path(os.__file__).parent), replace=True)


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The recipe with `key=value` overrides applied, validated.

    Raises UserError for a missing or malformed file, an unknown key, a missing or impossible value.
    """
    path = Path(recipe)
    if not path.is_file():
        raise UserError(f"There is no recipe '{recipe}'; give the path of a YAML file such as recipes/quickstart.yaml.")
    try:
        tree = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"'{recipe}' is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"'{recipe}' must hold sections such as model: and train:, not a list or a single value.")
    config = _merge(tree, overrides, str(recipe))
    validate(config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, atomically."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def _merge(tree: DictConfig, overrides: Sequence[str], recipe: str) -> Config:
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise UserError(f"'{override}' is not an override; write key=value, such as train.steps=100.")
    try:
        layers = [tree, OmegaConf.from_dotlist(list(overrides))]
        merged = OmegaConf.structured(Config)
        for layer in layers:
            _require_sections(layer, Config, "")
            merged = OmegaConf.merge(merged, layer)
        return typing.cast(Config, OmegaConf.to_object(merged))
    except ConfigKeyError as error:
        raise UserError(_unknown_key(str(error.full_key))) from error
    except MissingMandatoryValue as error:
        raise UserError(f"'{recipe}' does not set {error.full_key}; add it or give {error.full_key}=VALUE.") from error
    except (InterpolationResolutionError, GrammarParseError) as error:
        raise UserError(f"{error.full_key or recipe}: {_first_line(error)}.") from error
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{where}{_first_line(error)}; give a value of that type.") from error
    except yaml.YAMLError as error:
        raise UserError(f"An override is not valid YAML: {_first_line(error)}.") from error


def _require_sections(tree: DictConfig, schema: type, prefix: str) -> None:
    """Refuse a plain value where the schema has a section; OmegaConf's own message does not name the key."""
    hints = typing.get_type_hints(schema)
    for key in tree:
        section = hints.get(str(key))
        if section is None or not dataclasses.is_dataclass(section):
            continue
        if not OmegaConf.is_dict(tree._get_node(key)):
            example = dataclasses.fields(section)[0].name
            raise UserError(f"{prefix}{key} is a section, not a value; set its keys, such as {prefix}{key}.{example}.")
        _require_sections(tree[key], section, f"{prefix}{key}.")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")


def _unknown_key(full_key: str) -> str:
    known = list(known_keys())
    close = difflib.get_close_matches(full_key, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else "see megahybrid/config/schema.py for the known keys."
    return f"Unknown configuration key '{full_key}'; {hint}"


def known_keys(schema: type = Config, prefix: str = "") -> typing.Iterator[str]:
    """Every key of the schema, dotted."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from known_keys(hints[field.name], f"{prefix}{field.name}.")
