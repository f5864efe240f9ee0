"""The controller that drives every head's number of retained tokens to the eviction buffer's size.

Source: He & Garner, arXiv 2510.20787; the weight lambda of the L1 term grows by a factor while a head keeps more tokens
than its buffer holds and shrinks while it keeps clearly fewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from megahybrid.config.schema import Config
from megahybrid.errors import UserError
from megahybrid.key import derived
from megahybrid.mixers.lte import LTEConfig, most_room, room_for
from megahybrid.model.regulation import Count, Quantity
from megahybrid.parallel import groups

FORGET = 0.9998
"""Factor a step on margins."""


class LambdaController:
    """Lambda and the moving average of kept tokens, for every LTE layer and key-value head: a `Regulator`.

    Attributes:
        lambdas: fp32 `[layers, heads]`; the mixers read their row of a copy on the device.
        kept: fp32 `[layers, heads]`, moving average of `kept_now`.
        shares: fp32 `[layers]`, share, 0 to 1, of its tokens that the head keeping most kept in the last step.
        margins: fp32 `[layers]`, factor on `shares` where ranks make room: doubled when that was not enough, and
            forgotten slowly.
        kept_now: fp32 `[layers, heads]`, tokens kept in the last step by the share of all that were, of a document as
            long as that step's longest: every document has a buffer of its own, and that one's must suffice.
        longest: tokens of that step's longest document: of a rank's tokens only one document's are passed on.
    """

    name = "retention"
    member = "head"

    def __init__(
        self,
        config: LTEConfig,
        seq_length: int,
        layers: Sequence[int],
        heads: int,
        device: torch.device | str = "cpu",
        tokens: int = 0,
    ):
        """tokens: of a context parallel rank, where there are several."""
        self.config, self.layers, self.tokens = config, layers, tokens
        self.counts = {
            "kept": Count(heads, split=True),
            "positions": Count(1, split=False),
            "missing": Count(heads, split=True, void=True),
        }
        self.shares, self.margins = torch.ones(len(layers)), torch.ones(len(layers))
        self.longest = seq_length
        self._rooms = torch.zeros(len(layers), dtype=torch.int64, device="cpu")
        # On the host, which gets the counts anyway, and never waits for what it tells of them.
        self.lambdas = torch.zeros(len(layers), heads)
        self._steering = self.lambdas.to(device)
        self.kept = torch.full((len(layers), heads), float(seq_length))
        self.kept_now = self.kept.clone()

    @classmethod
    def of(cls, config: Config, layers: Sequence[int], device: torch.device) -> LambdaController:
        """See `Regulator`."""
        model = derived(config.model)
        train, contexts = config.train, config.parallel.context
        tokens = train.micro_batch_size * train.seq_length // contexts if contexts > 1 else 0
        return cls(model.lte, train.seq_length, layers, model.attention.num_kv_heads, device, tokens)

    @staticmethod
    def quantities(config: Config) -> tuple[Quantity, ...]:
        """See `Regulator`."""
        size = config.model.lte.buffer_size
        kept = Quantity(
            "kept",
            "kept tokens a document",
            target=("buffer size", size),
            dead=0.05 * size,
            line="kept {low:.0f}–{high:.0f} a head",
            summary=(
                "kept tokens",
                f"{{mean:.1f}} a head and document, from {{low:.1f}} to {{high:.1f}}; buffer size {size}",
            ),
        )
        return kept, Quantity("lambda", "lambda", steered=True, log=True)

    def attach(self, layer: int, mixer: nn.Module) -> None:
        """See `Regulator`."""
        rank, size = groups.tensor_parallel() if mixer.keeps_tokens else groups.head_parallel()
        row = self.layers.index(layer)
        mixer.l1_lambda, mixer.room = self._steering[row].chunk(size)[rank], self._rooms[row]

    def update(self, step: int, counts: Mapping[str, Tensor] | None, longest: int) -> None:
        """Take in an optimizer step, and every update_interval steps adjust lambda; see `Regulator`.

        Without counts, and with no counted positions (only tiny documents), the moving average, shares and margins
        rest: a step that was void and then left out teaches nothing, and the next one may be void, too.
        """
        if counts is not None and counts["positions"].all():
            rate = 2 / (1 + self.config.loss.update_interval / 2)
            scale = (longest / counts["positions"].double()).to(torch.float32)
            self.kept_now = counts["kept"].to(torch.float32) * scale
            self.kept = (1 - rate) * self.kept + rate * self.kept_now
            self.longest = longest
            self.shares = (counts["kept"] / counts["positions"]).amax(1).to(torch.float32)
            short = (counts["missing"] > 0).any(1)
            self.margins = torch.where(short, 2 * self.margins, (FORGET * self.margins).clamp(min=1))
            self._make_room()
        if step % self.config.loss.update_interval == 0:
            self._steer(self._adjusted())

    def _make_room(self) -> None:
        """For what a rank retains; none for more than a plan counts with."""
        most = most_room(self.config)
        for row, share in enumerate((self.shares * self.margins).tolist()):
            room = room_for(share * min(self.tokens, self.longest), self.config.sink_size)
            self._rooms[row] = room if self.tokens and room <= most else 0

    def _steer(self, lambdas: Tensor) -> None:
        self.lambdas = lambdas
        self._steering.copy_(lambdas, non_blocking=True)  # in place: the mixers hold views

    def _adjusted(self) -> Tensor:
        loss, size = self.config.loss, self.config.buffer_size
        over = self.kept > loss.tolerance * size
        under = self.kept < size
        grown = torch.where(over & ~under, self.lambdas * loss.increase, self.lambdas)
        shrunk = torch.where(under & ~over, grown / loss.decrease, grown).clamp(max=loss.maximum)
        cut = torch.where(shrunk < loss.initial, torch.zeros_like(shrunk), shrunk)
        return torch.where((cut == 0) & over, torch.full_like(cut, loss.initial), cut)

    def metrics(self) -> dict[str, Tensor]:
        """See `Regulator`."""
        return {"kept": self.kept_now, "lambda": self.lambdas}

    def state(self) -> dict[str, list]:
        """What a checkpoint keeps; float32 survives the way through JSON's decimals exactly."""
        every = {"lambdas": self.lambdas, "kept": self.kept, "shares": self.shares, "margins": self.margins}
        return {name: values.tolist() for name, values in every.items()} | {"longest": [self.longest]}

    def load_state(self, state: dict[str, list]) -> None:
        """See `Regulator`."""
        if missing := self.state().keys() - state.keys():
            raise UserError(
                f"The checkpoint's state of LTE's controller lacks {', '.join(sorted(missing))}; use one that "
                "this version of megahybrid has written."
            )
        self._steer(torch.tensor(state["lambdas"]))
        self.kept, self.shares, self.margins = (torch.tensor(state[name]) for name in ("kept", "shares", "margins"))
        (self.longest,) = state["longest"]
        self._make_room()
