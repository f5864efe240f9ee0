"""The kinds of layers by their letters, as the conversions need them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from megahybrid.config.schema import AttentionConfig, GDNConfig, LTEConfig


@dataclass(frozen=True)
class Kind:
    """One kind of layer.

    Attributes:
        sections: the parts of the model's configuration that it reads, by their names there.
        exported: `MODULE:CLASS` of its exported form, a `Mixer` of layers_megahybrid.
    """

    sections: dict[str, type]
    exported: str

    def exported_class(self) -> type:
        """The class of its exported form."""
        module, name = self.exported.split(":")
        return getattr(import_module(module), name)


_ATTENTION = {"attention": AttentionConfig}

KINDS = {
    "G": Kind({"gdn": GDNConfig}, "megahybrid.mixers.gdn.hf:GatedDeltaNet"),
    "L": Kind({**_ATTENTION, "lte": LTEConfig}, "megahybrid.mixers.lte.hf:LTEAttention"),
    "S": Kind(_ATTENTION, "megahybrid.mixers.attention.hf:WindowAttention"),
    "F": Kind(_ATTENTION, "megahybrid.mixers.attention.hf:FullAttention"),
}


class _Exported(dict):
    def __missing__(self, letter: str) -> type:
        return KINDS[letter].exported_class()


MIXERS = _Exported()
"""Letter → class of the exported form, loaded when it is asked for; an exported model has a table of its own kinds."""
