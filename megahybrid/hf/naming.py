"""The two sides of the conversion beside each other: names of parameters and keys of the configuration."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megahybrid.config.pattern import parse_pattern
from megahybrid.config.schema import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from megahybrid.errors import UserError
from megahybrid.key import keys
from megahybrid.mixers import KINDS
from megahybrid.mixers.kinds import sections
from megahybrid.model.settings import Settings

MODEL_TYPE = "megahybrid"

_OUTPUT, _HEAD = "output.weight", "lm_head.weight"


def exported_name(name: str) -> str:
    """The exported model's name of a parameter of the training model."""
    return _HEAD if name == _OUTPUT else f"model.{name}"


def exported_config(config: Config) -> dict[str, Any]:
    """What config.json says of the architecture: the keyword arguments of `MegahybridConfig`."""
    settings = Settings.of(config)
    model, letters = settings.model, settings.pattern.letters
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "layers": letters,
        **{name: _architecture(getattr(model, name)) for name in _sections(letters)},
        "norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "max_position_embeddings": config.train.seq_length,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _sections(letters: str) -> dict[str, type]:
    """The parts of the model's configuration that layers with these letters read."""
    return sections({letter: KINDS[letter] for letter in letters})


def _architecture(section: Any) -> dict[str, Any]:
    """What decides the model: all that may not change when a run goes on."""
    return {name: value for name, value, rules in keys(section) if not rules.may_change}


def recipe(model: ModelConfig, seq_length: int) -> Config:
    """A whole recipe for a model that was imported: what the weights do not tell has its default."""
    return Config(
        run=RunConfig(dir="runs/imported"),
        model=model,
        train=TrainConfig(seq_length=seq_length, micro_batch_size=1, global_batch_size=64, steps=1000),
        data=DataConfig(path="data"),
    )


def imported_config(found: dict[str, Any]) -> Config:
    """The recipe of an exported config.json. Raises UserError for a missing key, an unknown letter or another type."""
    try:
        letters = parse_pattern(str(found["layers"])).letters
        model = ModelConfig(
            pattern=found["layers"],
            hidden_size=found["hidden_size"],
            vocab_size=found["vocab_size"],
            intermediate_size=found["intermediate_size"],
            tie_embeddings=found.get("tie_word_embeddings", True),  # transformers 4 leaves its defaults out
            norm_eps=found["norm_eps"],
            init_std=found["initializer_range"],
            **{name: section(**found[name]) for name, section in _sections(letters).items()},
        )
        return OmegaConf.to_object(OmegaConf.structured(recipe(model, found["max_position_embeddings"])))
    except OmegaConfBaseException as error:  # a value of another type
        raise UserError(f"config.json: {error.full_key}: {str(error).splitlines()[0]}; correct it.") from error
    except KeyError as error:
        raise UserError(f"config.json lacks {error}; export the checkpoint again.") from error
    except TypeError as error:
        raise UserError(f"config.json does not fit this version ({error}); export the checkpoint again.") from error
