"""What is evaluated: a run's checkpoint, any other checkpoint, or a Hugging Face folder, as a model on this device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megahybrid.config import Config, load_config
from megahybrid.config.evaluation import evaluation_window
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.devices import DTYPES
from megahybrid.errors import UserError
from megahybrid.hf.import_ import as_checkpoint, config_of
from megahybrid.inference.loading import load_generator
from megahybrid.model.stack import Stack
from megahybrid.tasks import Task, Vocabulary
from megahybrid.training import checkpoint, checkpoint_folder


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated.

    Attributes:
        model: on this process's device, split over all processes.
        config: the recipe that it was trained with.
        tokenizer: of text, or of the numbers of tokens.
        vocabulary: the tokens that tasks are made of.
        window: as `evaluation_window` says.
        step: of its checkpoint; 0 for an imported model.
        weights: names the values of its parameters.
        home: the run directory, the folder that a checkpoint without a run is in, or the exported model.
        of_run: whether it is a run directory.
        tracking_id: the id of the run's W&B run, if there is a run.
    """

    model: Stack
    config: Config
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    window: int
    step: int
    weights: str
    home: Path
    of_run: bool
    tracking_id: str | None

    def answers(self, task: Task) -> Vocabulary:
        """The tokens that may be answers: a model of text has rows of the embedding that are none, never trained."""
        return self.vocabulary._replace(size=self.tokenizer.vocab_size) if task.text else self.vocabulary

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the results of a sample, beside its task."""
        return {
            "pattern": self.config.model.pattern,
            "weights": self.weights,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "vocabulary": self.vocabulary.size,
            "window": self.window,
        }


def recipe(path: Path) -> Config:
    """The recipe of what a path means, of which no weights are read. Raises UserError where there is no model in it."""
    if (folder := checkpoint_folder.find(path)) is not None:
        return load_config(folder / "config.yaml")
    if not (path / "config.json").is_file():
        raise UserError(
            f"There is no checkpoint and no exported model in '{path}'; give a run directory, a checkpoint, or a "
            "folder with config.json and safetensors."
        )
    return config_of(path)


def vocabulary(config: Config, tokenizer: Tokenizer) -> Vocabulary:
    """The tokens in which a model of this recipe, trained with this tokenizer, is asked."""
    return Vocabulary(config.model.vocab_size, tokenizer.document_id, tokenizer if _writes(tokenizer) else None)


def load(path: Path, dtype: str | None = None) -> Subject:
    """Load what a path means; called by every process, whose number is the tensor parallel size.

    Its weights are rounded to `dtype`, one of `DTYPES`; when left out, to what `load_generator` chooses.

    Raises UserError where there is no model in it, it is damaged, or does not split into so many parts.
    """
    folder = checkpoint_folder.find(path)
    if folder is not None:
        run = _run(folder)
        return _load(folder, run or folder.resolve().parent, dtype, of_run=run is not None)
    recipe(path)  # or it refuses
    with as_checkpoint(path) as converted:
        return _load(converted, path, dtype, of_run=False)


def _load(folder: Path, home: Path, dtype: str | None, of_run: bool) -> Subject:
    generator, facts = load_generator(folder, dtype and DTYPES[dtype]), checkpoint.read_facts(folder)
    config, tokenizer = load_config(folder / "config.yaml"), generator.tokenizer
    return Subject(
        generator.model,
        config,
        tokenizer,
        vocabulary(config, tokenizer),
        evaluation_window(config),
        facts["position"]["step"],
        checkpoint.weights_name(facts),
        home,
        of_run,
        facts["position"].get("tracking_id"),
    )


def _run(folder: Path) -> Path | None:
    """The run directory of a checkpoint; None for one that was copied elsewhere."""
    checkpoints = folder.resolve().parent
    run = checkpoints.parent
    is_run = checkpoints.name == "checkpoints" and all(
        (run / name).is_file() for name in ("config.yaml", "metrics.jsonl")
    )
    return run if is_run else None


def _writes(tokenizer: Tokenizer) -> bool:
    """Whether it is one of text: that of a model of bare tokens knows numbers only."""
    try:
        return bool(tokenizer.encode("text"))
    except UserError:
        return False
