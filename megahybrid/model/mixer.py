"""What the module of every mixer has, see megahybrid.mixers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megahybrid.config.schema import ModelConfig
from megahybrid.errors import UserError
from megahybrid.mixers.kind import LEARNED
from megahybrid.model.context import Aux, Context
from megahybrid.model.settings import Settings


class Fallback(NamedTuple):
    """An op that runs in PyTorch on a GPU, too, since its kernels do not take what the configuration asks.

    Attributes:
        op: its name.
        reason: the end of the sentence "its kernels …".
        key: the configuration key that a user would change.
        quadratic: whether training without kernels takes memory quadratic in a document's length.
    """

    op: str
    reason: str
    key: str
    quadratic: bool = False


class Mixer(nn.Module):
    """A token mixer over packed documents, whose forward pass changes nothing of it: recomputing would do so twice.

    Parameters are those of megahybrid.parallel's `parameter` and layers; a tensor parallel rank works on its own heads.

    Attributes:
        only_projects: whether `forward` hands x to `parallel.layers.project` and to nothing else. Then x of a single
            decoded token may be a `NormOfARow`, which is made along with the projections.
    """

    only_projects = False

    def __init__(self, settings: Settings, layer: int):
        super().__init__()
        self.settings, self.layer = settings, layer
        # Of context parallel ranks each keeps its tokens, with all heads, or they exchange them for all of some heads.
        self.keeps_tokens = settings.pattern.letters[layer] in settings.keepers

    def forward(self, x: Tensor, context: Context, state: Any = None) -> tuple[Tensor, Aux | None, Any]:
        """`[tokens, 1, hidden]` → (the same, by-products in training or None, the next state).

        There is a next state where one was given, or `context.keep_states` says so; else None.
        """
        raise NotImplementedError

    def initial_state(self, sequences: int) -> Any:
        """The state before the first token of `sequences` sequences: named tuples or dataclasses of tensors, and of
        `GrowingCache`s, which all have the sequences in front."""
        raise NotImplementedError

    def begun(self, state: Any, context: Context) -> Any:
        """The state, or the first one where there is none but it is to be kept."""
        return self.initial_state(context.sequences.count) if state is None and context.keep_states else state

    def held(self, state: Any) -> Tensor | None:
        """Positions of the tokens whose keys the next query finds in a state, each once: int64
        `[sequences, heads of this rank, slots]`, -1 for a blank; None where a mixer has no keys. Of ranks that share a
        head, one says so."""
        return None

    def swap(self, policy: str, wanted: Sequence[Sequence[int]], numbers: Sequence[int]) -> None:
        """Keep tokens by LEARNED or one of the kind's policies from now on, see `swapped`; called of all mixers, those
        without such a policy go on as they are."""

    def balance(self, x: Tensor, context: Context) -> dict[str, Tensor]:
        """By how much to shift parameters, by name, for each head to keep about half of this input's tokens, where it
        keeps them by a threshold. A check of what it computes then sees both outcomes, whatever has been learnt."""
        return {}

    @classmethod
    def fallbacks(cls, model: ModelConfig, dtype: torch.dtype) -> Iterable[Fallback]:
        """The ops whose kernels do not take the derived configuration and dtype on a GPU."""
        return ()


def check_whole(settings: Settings) -> None:
    """Raise UserError where ranks keep a part of the tokens: such mixers have neither states nor policies."""
    if settings.keepers:
        raise UserError(
            "Context parallel ranks that keep their tokens neither generate nor keep tokens by another policy; "
            "set parallel.context to 1."
        )


@contextlib.contextmanager
def swapped(
    model: nn.Module, policy: str, wanted: Sequence[Sequence[int]], numbers: Sequence[int] = ()
) -> Iterator[None]:
    """A model whose mixers keep tokens by another policy in evaluation, for sequences that begin now.

    Args:
        policy: LEARNED, or one of those of its kinds (`Kind.policies`).
        wanted: positions in each sequence that will be asked for, which an oracle keeps.
        numbers: of 32 bits, what tells the sequences apart where a policy draws.

    Raises UserError as `check_whole`.
    """
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    if policy != LEARNED:
        check_whole(mixers[0].settings)
    for mixer in mixers:
        mixer.swap(policy, wanted, numbers)
    try:
        yield
    finally:
        for mixer in mixers:
            mixer.swap(LEARNED, (), ())
