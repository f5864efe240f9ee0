"""Tiny models to evaluate, in this process and in several."""

import os
from pathlib import Path

import torch

from megahybrid.config.schema import ParallelConfig
from megahybrid.data.number_tokenizer import number_tokenizer
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.errors import UserError
from megahybrid.evaluation import modes
from megahybrid.evaluation.runner import Plan, evaluate
from megahybrid.evaluation.scorer import Scorer
from megahybrid.evaluation.subject import Subject
from megahybrid.evaluation.tasks import Chosen
from megahybrid.inference.generate import Options
from megahybrid.inference.sampling import Sampling
from megahybrid.model.stack import build
from megahybrid.parallel import groups
from megahybrid.tasks import TASKS, Vocabulary
from tests.model import tiny


def subject(home: Path, pattern: str = "GLSFN", dtype: torch.dtype = torch.float32) -> Subject:
    config = tiny.config(pattern)
    config.parallel = ParallelConfig(tensor=groups.tensor_parallel()[1])
    config.tracking.wandb = "disabled"
    model = build(config, "cpu", dtype).requires_grad_(False)
    vocabulary = Vocabulary(tiny.VOCAB, 0)
    return Subject(
        *(model, config, number_tokenizer(tiny.VOCAB), vocabulary, 8, 0, "weights", home),
        of_run=False,
        tracking_id=None,
    )


def chosen(name: str, **parameters) -> Chosen:
    return Chosen(name, TASKS[name], TASKS[name].parameters(**parameters))


def plan(**changes) -> Plan:
    tasks = (chosen("selective_mqar", pairs=4), chosen("copy"))
    usual = {"tasks": tasks, "lengths": (32, 64), "depths": 3, "samples": 7, "mode": "forced", "policies": ("learned",)}
    return Plan(**{**usual, "batch_size": 3, "prefill_chunk": 24, **changes})


def brief(mode: str, pattern: str = "GLSF", length: int = 48) -> Plan:
    others = ("random", "attention_mass") if "L" in pattern else ()
    return plan(mode=mode, lengths=(length,), samples=4, policies=("learned", *others))


def evaluate_in_parallel(home: str, pattern: str, length: int) -> None:
    """What each of several processes does."""
    torch.set_num_threads(1)
    groups.initialize(ParallelConfig(tensor=int(os.environ["WORLD_SIZE"])))
    for mode in ("forced", "generate"):
        evaluate(subject(Path(home), pattern), brief(mode, pattern, length))


def run_out_of_memory_on_one(home: str) -> str:
    """What each of several processes does, of which the second has no memory for the longer samples."""
    torch.set_num_threads(1)
    groups.initialize(ParallelConfig(tensor=int(os.environ["WORLD_SIZE"])))
    forced = modes.forced

    def limited(subject, task, samples, *rest):
        outcomes = forced(subject, task, samples, *rest)
        if len(samples[0].tokens) > 32 and groups.world()[0] == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return outcomes

    modes.MODES["forced"] = limited
    try:
        evaluate(subject(Path(home)), plan())
        return "done"
    except UserError as error:
        return str(error)
    finally:
        modes.MODES["forced"] = forced


WORDS = "the cat sat on a mat, and the dog lay by the door; 17 + 4 = 21. Who is there? Nobody! "


def scorer(pattern: str = "GLSFN", dtype: torch.dtype = torch.float64, **sizes) -> Scorer:
    """One of a model of text, with some words as tokens."""
    tokenizer = Tokenizer.train([WORDS], 300)
    config = tiny.config(pattern)
    config.model.vocab_size = 3 * tokenizer.vocab_size  # rows that are no tokens are often the likeliest
    config.parallel = ParallelConfig(tensor=groups.tensor_parallel()[1])
    return Scorer(build(config, "cpu", dtype).requires_grad_(False), tokenizer, **sizes)


def score(pairs: list[tuple[str, str]], prompt: str) -> tuple[list, list]:
    """What is asked of one process and of several."""
    asked = scorer()
    return sorted(asked.likelihoods(pairs)), sorted(asked.generate([(prompt, Options(12, (), Sampling(0)))]))


def score_in_parallel(pairs: list[tuple[str, str]], prompt: str) -> tuple[list, list]:
    """What each of several processes does."""
    torch.set_num_threads(1)
    groups.initialize(ParallelConfig(tensor=int(os.environ["WORLD_SIZE"])))
    return score(pairs, prompt)
