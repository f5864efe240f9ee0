"""What is known of a kind of mixer without loading it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from megahybrid.config.schema import ModelConfig


class Kind(ABC):
    """A kind of mixer, named by a letter of `model.pattern`. Importing it must not import torch.

    The `model` of all methods is a configuration in which what was left out is derived (`megahybrid.key.derived`).

    Attributes:
        letter: a capital.
        title: the name in tables and messages.
        sections: dataclasses of its configuration by their name under `model`, with fields made by
            `megahybrid.key.key`. Kinds may share one.
    """

    letter: str
    title: str
    sections: ClassVar[Mapping[str, type]] = {}

    def check(self, model: ModelConfig) -> None:  # noqa: B027
        """Raise UserError for sizes that do not go together; ranges of single keys stand at their fields."""

    @abstractmethod
    def split(self, model: ModelConfig) -> dict[str, int]:
        """What tensor parallel ranks share evenly: the number by the configuration key that sets it."""
