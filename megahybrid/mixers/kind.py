"""What is known of a kind of mixer without loading it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from megahybrid.config.schema import ModelConfig
    from megahybrid.model.mixer import Mixer
    from megahybrid.model.regulation import Regulator
    from megahybrid_kernels.judging.case import Shape


LEARNED = "learned"
"""The policy that a mixer has learnt itself."""


class MicroBatch(NamedTuple):
    """What a rank computes at once.

    Attributes:
        samples, length: how many samples, and tokens of each.
        width: bytes of an activation: 2 in bf16, 4 in fp32.
        ranks: tensor and context parallel ranks that share the heads.
        exchanged: whether context parallel ones are among them, who exchange what a mixer's op gives: where the op
            keeps that, too, it is kept twice.
        rows: how many context parallel ranks have a part each, of which this is one, and keep their tokens.
    """

    samples: int
    length: int
    width: int
    ranks: int
    exchanged: bool = False
    rows: int = 1


class Activations(NamedTuple):
    """Bytes of a mixer beside its input, on one rank, for each token of the whole micro-batch.

    Attributes:
        saved: for the backward pass.
        backward: gradients and temporaries in it, beyond that, at most.
        decision: of what is saved, what a layer that recomputes its activations keeps, too.
    """

    saved: float
    backward: float
    decision: float = 0


class Kind(ABC):
    """A kind of mixer, named by a letter of `model.pattern`. Importing it must not import torch.

    The `model` of all methods is a configuration in which what was left out is derived (`megahybrid.key.derived`).

    Attributes:
        letter: a capital.
        title: the name in tables and messages.
        sections: dataclasses of its configuration by their name under `model`, with fields made by
            `megahybrid.key.key`. Kinds may share one.
        parts: submodules of its module whose parameters a plan counts apart.
        policies: by what else than LEARNED its module can keep tokens in evaluation (`Mixer.swap`).
        utilisation, launches: of layers of this kind in training on an H100, for the plan of a recipe that nobody has
            run (`megahybrid.scaling.hours`): MFU at widths of 1,024 and 2,048, and the launches of a layer's forward
            and backward pass. Both are guesses where nothing else is said.
    """

    letter: str
    title: str
    sections: ClassVar[Mapping[str, type]] = {}
    parts: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    utilisation: tuple[float, float] = (0.38, 0.475)
    launches: int = 62

    def check(self, model: ModelConfig) -> None:  # noqa: B027
        """Raise UserError for sizes that do not go together; ranges of single keys stand at their fields."""

    @abstractmethod
    def split(self, model: ModelConfig) -> dict[str, int]:
        """What ranks that split heads share evenly: the number by the configuration key that sets it."""

    def shared(self, model: ModelConfig) -> dict[str, int]:
        """Likewise, but where there are more ranks than that, as many neighbouring ones share each."""
        return {}

    def heads_fault(self, model: ModelConfig, ranks: int) -> str | None:
        """Why its heads cannot be split over so many ranks and what to choose, as the end of a sentence, or None."""
        for key, count in self.split(model).items():
            if count % ranks:
                return f"does not divide {key} ({count}); choose a divisor of it"
        for key, count in self.shared(model).items():
            if count % ranks and ranks % count:
                return f"is neither a divisor nor a multiple of {key} ({count}); choose one of them"
        return None

    @abstractmethod
    def exchanged(self, model: ModelConfig) -> int:
        """Channels of a token that context parallel ranks exchange for heads, and back again, in a forward pass."""

    def passed_on(self, model: ModelConfig, ranks: int, width: int) -> float | None:
        """Bytes that a context parallel rank receives at most in a forward pass if all of `ranks` keep their tokens,
        with all heads, and pass on what others need of them; `width` bytes an activation. None where they cannot."""
        return None

    def keeps_tokens(self, model: ModelConfig, tokens: int, tensor: int, ranks: int, width: int) -> bool:
        """Whether context parallel ranks of so many tokens each, of which each tensor parallel rank has its own, keep
        them, rather than exchange them for heads: where fewer bytes travel so, or heads are too few."""
        passed = self.passed_on(model, ranks, width) if ranks > 1 else None
        if passed is None:
            return False
        exchanged = width * self.exchanged(model) * tokens * (ranks - 1) / ranks
        return passed < exchanged or self.heads_fault(model, tensor * ranks) is not None

    def exchanges_at_times(self, model: ModelConfig, ranks: int) -> bool:
        """Whether of so many tensor and context parallel ranks those that keep their tokens nevertheless exchange them
        for heads in some steps."""
        return False

    @abstractmethod
    def flops(self, model: ModelConfig, length: int) -> dict[str, float]:
        """FLOPs a token of the forward pass by part, averaged over a document of `length` tokens; what counts is said
        in megahybrid.scaling.flops."""

    def window(self, model: ModelConfig) -> float:
        """Keys that a query sees whatever they hold, itself included; infinity for all of a document."""
        return 0

    def chooses_after(self, model: ModelConfig) -> int:
        """Tokens of a document after which it chooses by what they hold which of them a query sees; 0 where it never
        does. A check of what it computes has to go beyond."""
        return 0

    def close_limits(self, model: ModelConfig) -> dict[str, dict[str, int]]:
        """What bounds a query's view, by section and key, so close that a text of 256 tokens goes far beyond, or one
        some blocks longer than `chooses_after` says of them. A conversion is compared with these limits, too."""
        return {}

    @abstractmethod
    def activations(self, model: ModelConfig, batch: MicroBatch) -> Activations:
        """What training keeps; what counts is said in megahybrid.scaling.memory."""

    @abstractmethod
    def module(self) -> type[Mixer]:
        """The class of its module, imported when it is asked for."""

    @abstractmethod
    def exported(self) -> type:
        """The class of its exported form, a `Mixer` of megahybrid.hf.layers_megahybrid, likewise."""

    def judged(self, model: ModelConfig, ranks: int) -> list[Shape]:
        """The ops of megahybrid_kernels that it runs on one of so many ranks that split heads, for `doctor`."""
        return []

    def regulator(self) -> type[Regulator] | None:
        """The class of what regulates its layers, likewise; None where nothing is regulated."""
        return None
