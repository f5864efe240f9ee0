"""The format of the weights published with laLTE and laNSA (`hybrid_gated_deltanet`, `gated_deltanet`)."""

from __future__ import annotations

import re
from typing import Any

from megahybrid.config import Config
from megahybrid.config.schema import ModelConfig
from megahybrid.errors import UserError
from megahybrid.hf.naming import recipe
from megahybrid.mixers.attention import AttentionConfig
from megahybrid.mixers.gdn import GDNConfig
from megahybrid.mixers.lte import LTEConfig
from megahybrid.mixers.nsa import NSAConfig

MODEL_TYPES = ("hybrid_gated_deltanet", "gated_deltanet")

# The controller's state: it does not affect logits.
IGNORED = ("model.l1_lambda", "model.num_kept")

_WHOLE = {
    "embedding.weight": "model.embeddings.weight",
    "final_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Of a layer, first match holds.
_LAYER = (
    (r"mixer_norm\.weight", "attn_norm.weight"),
    (r"mixer\.([qkv])_conv", r"attn.\1_conv1d.weight"),
    (r"mixer\.norm", "attn.o_norm.weight"),
    (r"mixer\.router\.conv(\d)_(weight|bias)", r"attn.router.conv_stack.convs.\1.\2"),
    (r"mixer\.router\.projection_bias", "attn.router.conv_stack.proj.bias"),
    (r"mixer\.router\.projection", "attn.router.conv_stack.proj.weight"),
    (r"mixer\.(.+)", r"attn.\1"),
    (r"(.+)", r"\1"),
)


def reference_name(name: str) -> str:
    """The published name of a parameter of the training model."""
    if name in _WHOLE:
        return _WHOLE[name]
    _, layer, rest = name.split(".", 2)
    for pattern, replacement in _LAYER:
        if re.fullmatch(pattern, rest):
            return f"model.layers.{layer}.{re.sub(pattern, replacement, rest, count=1)}"
    raise AssertionError(name)


def reference_config(found: dict[str, Any]) -> Config:
    """The recipe of a published config.json. Raises UserError for what this code has no counterpart of."""
    attn = found.get("attn") or {}
    try:
        _refuse_variants(found, attn)
        model = ModelConfig(
            pattern=_pattern(found, attn),
            hidden_size=found["hidden_size"],
            vocab_size=found["vocab_size"],
            intermediate_size=found.get("intermediate_size") or _intermediate_size(found),
            tie_embeddings=found.get("tie_word_embeddings", False),
            norm_eps=found.get("norm_eps", 1e-6),
            init_std=found.get("initializer_range", 0.006),
            gdn=GDNConfig(
                num_heads=found["num_heads"],
                head_dim=found["head_dim"],
                value_head_dim=round(found["head_dim"] * found.get("expand_v", 1)),
                conv_size=found.get("conv_size", 4),
            ),
        )
        if attn:
            _add_attention(model, attn)
    except KeyError as error:
        raise UserError(f"config.json lacks {error}; download the model again.") from error
    return recipe(model, found.get("max_position_embeddings") or 4096)


def _add_attention(model: ModelConfig, attn: dict[str, Any]) -> None:
    """The sections of the layers that are no GDN. Raises KeyError for a key that is missing."""
    heads, kind = attn["num_heads"], attn.get("attn_type")
    shape = {
        "num_heads": heads,
        "num_kv_heads": attn.get("num_kv_heads") or heads,
        "rope_theta": float(attn.get("rope_theta") or 10000.0),
    }
    if kind == "nsa":
        model.nsa = NSAConfig(
            **shape,
            head_dim=attn["head_dim"],
            block_size=attn["block_size"],
            num_blocks=attn["block_counts"],
            window_size=attn["window_size"],
        )
        return
    model.attention = AttentionConfig(**shape, head_dim=attn.get("head_dim") or model.hidden_size // heads)
    if kind == "lte":
        model.lte = LTEConfig(
            window_size=attn["window_size"],
            buffer_size=attn["buffer_size"],
            sink_size=attn["sink_size"],
            conv_size=_same("conv_size", attn["conv_size"]),
            conv_dilation=_same("conv_dilation", attn["conv_dilation"]),
            dropout=attn.get("dropout_prob", LTEConfig.dropout),
        )
    elif attn.get("window_size"):
        model.attention.window_size = attn["window_size"]


def _pattern(found: dict[str, Any], attn: dict[str, Any]) -> str:
    letters = ["G"] * found["num_hidden_layers"]
    kind = attn.get("attn_type")
    letter = {"lte": "L", "nsa": "N"}.get(kind) or ("S" if attn.get("window_size") else "F")
    for layer in attn.get("layers") or ():
        letters[layer] = letter
    return "".join(letters)


def _refuse_variants(found: dict[str, Any], attn: dict[str, Any]) -> None:
    kind = attn.get("attn_type")
    if kind not in (None, "lte", "nsa", "attn", "swa"):
        raise UserError(
            f"config.json has attn.attn_type '{kind}'; lte, nsa, sliding-window and full attention can be imported."
        )
    only = {
        "use_gate": (found, True),
        "use_short_conv": (found, True),
        "hidden_act": (found, "swish"),
        "num_v_heads": (found, found.get("num_heads")),
        "qkv_bias": (attn, False),
        "qk_norm": (attn, False),
        "routing_method": (attn, "sigmoid"),
        "routing_shared": (attn, "head"),
    }
    for key, (section, expected) in only.items():
        if section.get(key) not in (None, expected):
            raise UserError(
                f"config.json has {key} = {section[key]}; only models with {key} = {expected} can be imported."
            )


def _same(key: str, value: int | list[int]) -> int:
    """The one value of all three router convolutions."""
    values = [value] * 3 if isinstance(value, int) else value
    if len(values) != 3 or len(set(values)) != 1:
        raise UserError(f"config.json has attn.{key} = {value}; three equal router convolutions can be imported.")
    return values[0]


def _intermediate_size(found: dict[str, Any]) -> int:
    """Two thirds of hidden_ratio times the width, rounded up to a multiple of 256."""
    width = found["hidden_size"] * (found.get("hidden_ratio") or 4) * 2 // 3
    return 256 * -(-width // 256)
