"""lm-evaluation-harness (Gao et al., doi 10.5281/zenodo.12608602) on the models of this project, as its model
"megahybrid": importing this module registers it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megahybrid.devices import DTYPES
from megahybrid.errors import UserError
from megahybrid.evaluation.scorer import Scorer, options
from megahybrid.evaluation.subject import load
from megahybrid.parallel import groups


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Raises UserError where the harness, or what it needs, is missing, too old or broken."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness cannot be imported ({' '.join(str(error).split())}); install it with `pip install "
            "'lm_eval>=0.4.13' transformers`."
        ) from error


with _importing():
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook


@register_model("megahybrid")
class HarnessModel(LM):
    """A run, a checkpoint or an exported model, split over all processes.

    All of them are asked the same and give the same answers: to the harness each is rank 0 of 1.
    """

    def __init__(
        self,
        path: str,
        dtype: str | None = None,
        batch_size: int | str = "auto",
        prefill_chunk: int | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """`max_batch_size` and `device` are what the harness always says; the device is this process's GPU, or the CPU.

        dtype: as of `subject.load`.
        Raises UserError as `subject.load` does, and for a model of bare tokens.
        """
        super().__init__()
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"--model_args has dtype={dtype}; choose among {', '.join(DTYPES)}.")
        sizes = {"batch_size": None if batch_size == "auto" else batch_size, "prefill_chunk": prefill_chunk}
        for name, size in sizes.items():
            if size is not None and (not str(size).isdecimal() or int(size) < 1):
                raise UserError(f"{name} is {size}; give a number of at least 1, or leave it out.")
            sizes[name] = size and int(size)
        self._subject = load(Path(path), dtype)
        if self._subject.tokenizer.of_numbers:
            raise UserError(f"The model in '{path}' knows bare tokens and no text, which benchmarks are made of.")
        self._scorer = Scorer(self._subject.model, self._subject.tokenizer, **sizes)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the harness wants it: `(context, continuation)` in, `(logarithm of the probability, greedy)` out."""
        return self._ask("loglikelihood", requests, self._scorer.likelihoods, tuple, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """`(text,)` in, logarithm of its probability out: of any length in one piece, so that nothing rolls."""

        def ask(texts: Sequence[tuple[str]]) -> Iterator[tuple[int, Any]]:
            return self._scorer.document_likelihoods([text for (text,) in texts])

        return self._ask("loglikelihood_rolling", requests, ask, lambda found: found.logarithm, disable_tqdm)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """`(context, generation_kwargs)` in, text out, up to the first stop string. Raises UserError as `options`."""

        def ask(asked: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[tuple[int, str]]:
            return self._scorer.generate([(text, options(how)) for text, how in asked])

        return self._ask("generate_until", requests, ask, str, disable_tqdm)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Raises UserError with several processes: each would have a cache of its own, and ask what that lacks."""
        if groups.world()[1] > 1:
            raise UserError("--use_cache is for one process; start a single one, or leave it out.")
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results say of the model."""
        return {**self._subject.settings, "step": self._subject.step}

    def _ask(
        self,
        kind: str,
        requests: Sequence[Instance],
        ask: Callable[[list[Any]], Iterator[tuple[int, Any]]],
        result: Callable[[Any], Any],
        quiet: bool,
    ) -> list[Any]:
        """The results in the order of the requests, each in the harness's cache as soon as it is there."""
        asked = [request.args for request in requests]
        found: list[Any] = [None] * len(asked)
        quiet = quiet or not groups.is_main()
        for number, value in tqdm(ask(asked), kind, len(asked), disable=quiet):
            found[number] = result(value)
            self.cache_hook.add_partial(kind, asked[number], found[number])
        return found


def run(path: Path, arguments: Sequence[str]) -> None:
    """`lm_eval run` with these arguments on what `path` means; called by every process, the first one reports.

    Raises UserError for a model or a task that there is not, and as HarnessModel does.
    """
    with _importing():
        from lm_eval.__main__ import cli_evaluate

    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    before, model = sys.argv, ["--model", "megahybrid", "--model_args", json.dumps({"path": str(path)})]
    sys.argv = ["lm_eval", "run", *model, "--batch_size", "auto", *arguments]
    try:
        cli_evaluate()
    except ValueError as error:
        if "Tasks not found" not in str(error):
            raise
        raise UserError(
            f"{error}; `lm_eval ls tasks` lists what there is, and a path to a .yaml file works."
        ) from error
    finally:
        sys.argv = before
