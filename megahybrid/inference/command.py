"""`megahybrid generate`: its flags, and what it prints."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megahybrid.errors import UserError

if TYPE_CHECKING:
    from megahybrid.inference.generate import Options, Piece

Opened = Callable[[Path], contextlib.AbstractContextManager[Path]]


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """The flags; their defaults are those of `Options` and `Sampling`."""
    verb.add_argument("path", type=Path, metavar="PATH", help="a run directory, a checkpoint, or an exported model")
    verb.add_argument("--prompt", action="append", default=[], help="the text to continue; may be repeated")
    verb.add_argument("--prompts-file", type=Path, metavar="FILE", help="more prompts, one a line")
    verb.add_argument("--tokens", type=int, default=128, help="the most tokens to write (default 128)")
    verb.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    verb.add_argument("--top-k", type=int, default=0, help="only the so many likeliest tokens (default 0: all)")
    verb.add_argument("--top-p", type=float, default=1.0, help="only the likeliest ones of this mass (default 1: all)")
    verb.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: fewer repeats (default 1)")
    verb.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be repeated")
    verb.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    add_dtype(verb)
    verb.add_argument("--batch-size", type=int, default=16, help="prompts in work at once (default 16)")
    verb.add_argument(
        "--prefill-chunk", type=int, help="prompt tokens read in one step (default 65536 on a GPU, else 2048)"
    )


def add_dtype(verb: argparse.ArgumentParser) -> None:
    """The flag of what `load_generator` rounds weights to; None where it is left out."""
    default = "on a GPU training's, or an exported model's own; else fp32"
    verb.add_argument("--dtype", choices=("fp32", "bf16"), help=f"of the weights (default: {default})")


def run(parsed: argparse.Namespace, opened: Opened = contextlib.nullcontext) -> None:
    """Generate and print; on rank 0 only, all ranks compute.

    opened: from the path to the checkpoint that it means, for as long as that is read.
    Raises UserError.
    """
    prompts, options = _prompts(parsed), _options(parsed)
    from megahybrid.devices import DTYPES
    from megahybrid.inference.loading import load_generator
    from megahybrid.parallel import groups

    with opened(parsed.path) as checkpoint:
        generator = load_generator(checkpoint, DTYPES.get(parsed.dtype))
    pieces = generator.generate(prompts, options)
    if not groups.is_main():
        for _ in pieces:
            pass
    elif len(prompts) == 1:
        _print_stream(prompts[0], pieces)
    else:
        _print_in_order(prompts, pieces)


def _prompts(parsed: argparse.Namespace) -> list[str]:
    prompts = list(parsed.prompt)
    if parsed.prompts_file is not None:
        try:
            lines = parsed.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(f"--prompts-file '{parsed.prompts_file}' cannot be read: {reason}.") from error
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise UserError("There is no prompt; give --prompt TEXT, or --prompts-file FILE with one a line.")
    return prompts


def _options(parsed: argparse.Namespace) -> Options:
    from megahybrid.inference.generate import Options
    from megahybrid.inference.sampling import Sampling

    sampling = Sampling(parsed.temperature, parsed.top_k, parsed.top_p, parsed.repetition_penalty, parsed.seed)
    return Options(parsed.tokens, tuple(parsed.stop), sampling, parsed.batch_size, parsed.prefill_chunk)


def _print_stream(prompt: str, pieces: Iterable[Piece]) -> None:
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print()


def _print_in_order(prompts: list[str], pieces: Iterable[Piece]) -> None:
    """Each prompt with its text as soon as it and all before it are finished."""
    texts, finished, following = [""] * len(prompts), [False] * len(prompts), 0
    for piece in pieces:
        texts[piece.prompt] += piece.text
        finished[piece.prompt] = piece.finish is not None
        while following < len(prompts) and finished[following]:
            print(f"--- {following + 1} of {len(prompts)}")
            print(prompts[following] + texts[following])
            sys.stdout.flush()
            following += 1
