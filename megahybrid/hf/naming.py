"""The two sides of the conversion beside each other: names of parameters and keys of the configuration."""

from __future__ import annotations

from typing import Any

from megahybrid.config.schema import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from megahybrid.errors import UserError
from megahybrid.mixers.attention import AttentionConfig
from megahybrid.mixers.gdn import GDNConfig
from megahybrid.mixers.lte import LTEConfig
from megahybrid.model.settings import Settings

MODEL_TYPE = "megahybrid"

_OUTPUT, _HEAD = "output.weight", "lm_head.weight"


def exported_name(name: str) -> str:
    """The exported model's name of a parameter of the training model."""
    return _HEAD if name == _OUTPUT else f"model.{name}"


def exported_config(config: Config) -> dict[str, Any]:
    """What config.json says of the architecture: the keyword arguments of `MegahybridConfig`."""
    settings = Settings.of(config)
    model = settings.model
    gdn, attention, lte = model.gdn, model.attention, model.lte
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": settings.model.intermediate_size,
        "layers": settings.pattern.letters,
        "gdn": {
            "num_heads": gdn.num_heads,
            "head_dim": gdn.head_dim,
            "value_head_dim": gdn.value_head_dim,
            "conv_size": gdn.conv_size,
        },
        "attention": {
            "num_heads": attention.num_heads,
            "num_kv_heads": settings.model.attention.num_kv_heads,
            "head_dim": attention.head_dim,
            "window_size": attention.window_size,
            "rope_theta": attention.rope_theta,
        },
        "lte": {
            "window_size": lte.window_size,
            "buffer_size": lte.buffer_size,
            "sink_size": lte.sink_size,
            "conv_size": lte.conv_size,
            "conv_dilation": lte.conv_dilation,
        },
        "norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "max_position_embeddings": config.train.seq_length,
        "tie_word_embeddings": model.tie_embeddings,
    }


def recipe(model: ModelConfig, seq_length: int) -> Config:
    """A whole recipe for a model that was imported: what the weights do not tell has its default."""
    return Config(
        run=RunConfig(dir="runs/imported"),
        model=model,
        train=TrainConfig(seq_length=seq_length, micro_batch_size=1, global_batch_size=64, steps=1000),
        data=DataConfig(path="data"),
    )


def imported_config(found: dict[str, Any]) -> Config:
    """The recipe of an exported config.json. Raises UserError for a missing key."""
    try:
        model = ModelConfig(
            pattern=found["layers"],
            hidden_size=found["hidden_size"],
            vocab_size=found["vocab_size"],
            intermediate_size=found["intermediate_size"],
            tie_embeddings=found["tie_word_embeddings"],
            norm_eps=found["norm_eps"],
            init_std=found["initializer_range"],
            gdn=GDNConfig(**found["gdn"]),
            attention=AttentionConfig(**found["attention"]),
            lte=LTEConfig(**found["lte"]),
        )
        return recipe(model, found["max_position_embeddings"])
    except KeyError as error:
        raise UserError(f"config.json lacks {error}; export the checkpoint again.") from error
    except TypeError as error:
        raise UserError(f"config.json does not fit this version ({error}); export the checkpoint again.") from error
