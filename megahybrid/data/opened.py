"""What a recipe trains on, whether it is text that `prepare` wrote, tasks, or both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend

from megahybrid.config.schema import Config
from megahybrid.config.task_sources import bare_tokens, find_task, task_sources, text_sources
from megahybrid.data.documents import TRAIN
from megahybrid.data.number_tokenizer import number_tokenizer
from megahybrid.data.prepared import TOKENIZER, Prepared, check_identity, data_identity, open_prepared, open_store
from megahybrid.data.tokenizer import Tokenizer, tokenizer_file
from megahybrid.errors import UserError
from megahybrid.tasks import Vocabulary


@dataclass(frozen=True)
class OpenedData:
    """What there is beside the samples."""

    prepared: Prepared | None
    """Of the sources of text; None where there are none, and nothing is prepared."""
    identity: str
    """Short hash of everything that decides the samples of every source."""
    tokenizer_json: str
    """The tokenizer's file to the byte, as checkpoints keep it."""
    vocabulary: Vocabulary
    """In which tasks write."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What the file holds; reading a large one takes most of a second."""
        return Tokenizer(Backend.from_str(self.tokenizer_json))


def open_data(config: Config) -> OpenedData:
    """What the recipe's sources are. Raises UserError as `open_prepared`, and for a tokenizer that does not fit."""
    prepared, size = None, config.model.vocab_size
    if bare_tokens(config):
        numbers = number_tokenizer(size)
        text, vocabulary = numbers.to_json(), Vocabulary(size, numbers.document_id)
    elif text_sources(config) or not config.data.sources:
        prepared = open_prepared(config)
        text = open_store(config).read(TOKENIZER, prepared.tokenizer_sha256).decode()
        vocabulary = Vocabulary(size, prepared.document_id, _for_tasks(config, prepared.tokenizer_file))
    else:
        file = tokenizer_file(str(config.data.tokenizer))
        tokenizer = Tokenizer.load(file)
        tokenizer.require_fit(size)
        text, vocabulary = file.read_bytes().decode(), Vocabulary(size, tokenizer.document_id, tokenizer)
    identity = data_identity(config, prepared)
    check_identity(config, identity, "The recipe")
    return OpenedData(prepared, identity, text, vocabulary)


def _for_tasks(config: Config, file: Path) -> Tokenizer | None:
    """The tokenizer, where a task may need it: reading a large one takes most of a second."""
    probed = config.evaluate.every and not {"recall", "kept"}.isdisjoint(config.evaluate.probes)
    if probed or any(find_task(str(source.task), name).text for name, source in task_sources(config).items()):
        return Tokenizer.load(file)
    return None


def text_weights(config: Config, prepared: Prepared | None) -> dict[str, float]:
    """The sources of text in use, sorted by name, with their weights: those of the recipe, or their sizes.

    Raises UserError for a source with a weight and without samples, and if no source, nor a task, is left.
    """
    sizes = prepared.sources_of(TRAIN) if prepared else {}
    given = {name: source.weight for name, source in text_sources(config).items() if source.weight is not None}
    for name, weight in given.items():
        if weight > 0 and name not in sizes:
            raise UserError(
                f"data.sources.{name} has a weight but less than one sample of text; add text or set its weight to 0."
            )
    tasks = any(source.weight for source in task_sources(config).values())
    if any(given.values()) or tasks:
        weights = {name: given.get(name, 0.0) for name in sizes}
    else:
        weights = {name: float(size) for name, size in sizes.items() if name not in given}
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    if not weights and not tasks:
        raise UserError("No source is left to train on; give one that has samples a weight above 0.")
    return weights
