"""What `prepare` left in data.path: dataset.json, the tokenizer and the splits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megahybrid.config.schema import Config
from megahybrid.data.tokenizer import tokenizer_file, tokenizer_hash
from megahybrid.errors import UserError
from megahybrid.files import write_json

TRAIN, VALIDATION = "train", "validation"

_FILE = "dataset.json"
_VERSION = 1


@dataclass
class SplitCounts:
    """What one split of one source holds."""

    documents: int = 0
    """Texts."""
    bytes: int = 0
    """Of these texts, as UTF-8."""
    tokens: int = 0
    """Of these texts, document tokens included, before the tail shorter than a sample is dropped."""
    samples: int = 0
    """Of seq_length + 1 tokens, overlapping by one."""


@dataclass
class Prepared:
    """Tokenised text as it lies in data.path.

    `root/tokenizer/tokenizer.json` and `root/SOURCE/SPLIT/{index.json, shard.*.mds}`; SPLIT is train or validation.
    """

    root: Path
    """data.path."""
    seq_length: int
    """Tokens a sample feeds to the model; it stores one more."""
    vocab_size: int
    """One more than the largest token id."""
    document_id: int
    """The token that begins every document."""
    token_dtype: str
    """uint16 or uint32."""
    tokenizer_sha256: str
    """Of tokenizer.json."""
    settings: dict[str, Any]
    """The configuration keys that determine what was written, dotted."""
    sources: dict[str, dict[str, SplitCounts]]
    """Source → split → counts."""

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that the tokens come from."""
        return self.root / "tokenizer" / "tokenizer.json"

    def samples(self, split: str) -> int:
        """Samples of a split over all sources."""
        return sum(counts[split].samples for counts in self.sources.values())

    def sources_of(self, split: str) -> dict[str, int]:
        """Source → samples, sorted by name, of the sources that have samples in this split."""
        return {
            name: counts[split].samples for name, counts in sorted(self.sources.items()) if counts[split].samples > 0
        }

    def save(self) -> None:
        """Write dataset.json, atomically; its presence means that everything else is there."""
        fields = asdict(self)
        del fields["root"]
        write_json(self.root / _FILE, {"version": _VERSION, **fields})


def prepare_settings(config: Config) -> dict[str, Any]:
    """The configuration keys that determine what `prepare` writes, dotted, with their values."""
    data = config.data
    settings: dict[str, Any] = {
        "train.seq_length": config.train.seq_length,
        "data.validation_fraction": data.validation_fraction,
    }
    if data.tokenizer is None:
        settings["model.vocab_size"] = config.model.vocab_size
    else:
        settings["data.tokenizer"] = f"sha256:{tokenizer_hash(tokenizer_file(data.tokenizer))}"
    for name, source in sorted(data.sources.items()):
        settings[f"data.sources.{name}.path"] = str(Path(source.path).expanduser().absolute())
        settings[f"data.sources.{name}.include"] = list(source.include)
        settings[f"data.sources.{name}.exclude"] = list(source.exclude)
    return settings


def find_prepared(root: Path) -> Prepared | None:
    """What lies in `root`, or None. Raises UserError if dataset.json is there but unreadable."""
    file = root / _FILE
    if not file.is_file():
        return None
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        version = fields.pop("version")
        if version != _VERSION:
            raise ValueError(f"it has version {version}, not {_VERSION}")
        fields["sources"] = {
            name: {split: SplitCounts(**counts) for split, counts in splits.items()}
            for name, splits in fields["sources"].items()
        }
        return Prepared(root=root, **fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{file}' is not readable ({' '.join(str(error).split())}); remove '{root}' and run `megahybrid prepare` "
            "again."
        ) from error


def open_prepared(config: Config) -> Prepared:
    """What `prepare` wrote for this recipe.

    Raises UserError if there is nothing, if it has another sequence length or more tokens than the model, and if its
    tokenizer is not the one that it was prepared with.
    """
    root = Path(config.data.path).expanduser()
    prepared = find_prepared(root)
    if prepared is None:
        raise UserError(f"data.path '{config.data.path}' holds no prepared data; run `megahybrid prepare` first.")
    if prepared.seq_length != config.train.seq_length:
        raise UserError(
            f"data.path '{config.data.path}' was prepared with train.seq_length = {prepared.seq_length}, but the "
            f"recipe says {config.train.seq_length}; set it back, or prepare into another data.path."
        )
    if prepared.vocab_size > config.model.vocab_size:
        raise UserError(
            f"data.path '{config.data.path}' has {prepared.vocab_size} tokens in its vocabulary, more than "
            f"model.vocab_size ({config.model.vocab_size}); raise model.vocab_size or prepare into another data.path."
        )
    if tokenizer_hash(prepared.tokenizer_file) != prepared.tokenizer_sha256:
        raise UserError(
            f"'{prepared.tokenizer_file}' is not the tokenizer that the data was prepared with; put it back, or remove "
            f"'{root}' and run `megahybrid prepare` again."
        )
    return prepared


def differences(prepared: Prepared, settings: dict[str, Any]) -> list[str]:
    """The dotted keys whose values differ."""
    keys = sorted(prepared.settings.keys() | settings.keys())
    return [key for key in keys if prepared.settings.get(key) != settings.get(key)]
