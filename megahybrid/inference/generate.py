"""Text from a checkpoint: the prompt in one pass, then a token at a time from the mixers' states."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megahybrid.config import load_config
from megahybrid.config.schema import ParallelConfig
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.errors import UserError
from megahybrid.model.context import Context
from megahybrid.model.stack import Stack
from megahybrid.parallel import groups
from megahybrid.training import checkpoint
from megahybrid_kernels import Sequences


class Generator:
    """A model with its tokenizer, ready to continue prompts."""

    def __init__(self, path: Path):
        """Load a run directory's newest checkpoint, or a checkpoint folder inside one. Raises UserError."""
        folder = checkpoint.find(path)
        if folder is None:
            raise UserError(
                f"There is no checkpoint in '{path}'; give a run directory that `megahybrid train` has saved in."
            )
        config = load_config(folder / "config.yaml")
        config.parallel = ParallelConfig()
        groups.initialize(config.parallel)
        self.device = groups.device()
        self.tokenizer = Tokenizer.load(folder / "tokenizer.json")
        model = Stack(config)
        checkpoint.load_weights(folder, model)
        self.model = model.to(self.device)

    @torch.inference_mode()
    def continue_text(self, prompt: str, tokens: int, temperature: float, seed: int) -> Iterator[str]:
        """Pieces of text after `prompt`, at most `tokens` tokens, until the document ends.

        temperature 0 takes the likeliest token, above that tokens are sampled.
        """
        random = torch.Generator().manual_seed(seed)
        ids = [self.tokenizer.document_id, *self.tokenizer.encode(prompt)]
        states = self.model.initial_states(1)
        position, written, so_far = 0, [], ""
        for _ in range(tokens):
            starts = torch.tensor([position], device=self.device)
            context = Context(Sequences.of([len(ids)], self.device, starts))
            out = self.model(torch.tensor(ids, device=self.device), context, states=states)
            states, position = out.states, position + len(ids)
            token = _sample(self.model.logits(out.hidden[-1:])[0], temperature, random)
            if token == self.tokenizer.document_id:
                return
            ids = [token]
            written.append(token)
            text = self.tokenizer.decode(written)
            if not text.endswith("\ufffd"):  # a character may need more than one token
                yield text[len(so_far) :]
                so_far = text


def _sample(logits: Tensor, temperature: float, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits.double().cpu() / temperature, -1), 1, generator=random))
