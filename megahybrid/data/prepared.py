"""What `prepare` left in data.path: dataset.json, the tokenizer and the splits."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megahybrid.config.schema import Config, DataConfig, SourceConfig
from megahybrid.config.task_sources import find_task, task_sources, task_stages, text_sources
from megahybrid.data.documents import TRAIN, VALIDATION
from megahybrid.data.mds import token_dtype
from megahybrid.data.stores import Folder, Remote, Store
from megahybrid.data.tokenizer import tokenizer_file, tokenizer_hash
from megahybrid.data.tokens import TOKENISED
from megahybrid.errors import MachineFault, UserError
from megahybrid.files import write_json
from megahybrid.key import derived

TOKENIZER = "tokenizer/tokenizer.json"
"""The tokenizer's file in data.path."""
_FILE = "dataset.json"
_VERSION = 2


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
    index_sha256: str = ""
    """Of index.json, which has the size and the hash of every shard: dataset.json vouches for all files."""


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
        return self.root / TOKENIZER

    def samples(self, split: str) -> int:
        """Samples of a split over all sources."""
        return sum(counts[split].samples for counts in self.sources.values())

    def sources_of(self, split: str) -> dict[str, int]:
        """Source → samples, sorted by name, of the sources that have samples in this split."""
        return {
            name: counts[split].samples for name, counts in sorted(self.sources.items()) if counts[split].samples > 0
        }

    @property
    def identity(self) -> str:
        """Short hash of every token and its place: of the tokenizer, and of all shards through their indices."""
        indices = {name: {split: each.index_sha256 for split, each in s.items()} for name, s in self.sources.items()}
        facts = json.dumps([self.tokenizer_sha256, self.seq_length, indices], sort_keys=True)
        return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()

    def save(self) -> None:
        """Write dataset.json, atomically; its presence means that everything else is there."""
        fields = asdict(self)
        del fields["root"]
        write_json(self.root / _FILE, {"version": _VERSION, **fields})


def prepare_settings(config: Config) -> dict[str, Any]:
    """The configuration keys that determine what `prepare` writes, dotted, with their values."""
    data = config.data
    sources = text_sources(config)
    settings: dict[str, Any] = {"train.seq_length": config.train.seq_length} | _reading(config, sources)
    if data.tokenizer is None:
        settings["model.vocab_size"] = config.model.vocab_size
    else:
        settings["data.tokenizer"] = f"sha256:{tokenizer_hash(tokenizer_file(data.tokenizer))}"
    for name, source in sources.items():
        settings[f"data.sources.{name}.path"] = str(Path(str(source.path)).expanduser().absolute())
    return settings


def _reading(config: Config, sources: Mapping[str, SourceConfig]) -> dict[str, Any]:
    """Of `prepare_settings` those that say how these sources are read and split, wherever they lie."""
    settings: dict[str, Any] = {"data.validation_fraction": config.data.validation_fraction}
    for name, source in sources.items():
        settings[f"data.sources.{name}.format"] = source.format
        settings[f"data.sources.{name}.include"] = include_patterns(source)
        settings[f"data.sources.{name}.exclude"] = list(source.exclude)
        if source.format in ("jsonl", "parquet"):
            settings[f"data.sources.{name}.field"] = source.field
        if source.format == "bin":
            settings[f"data.sources.{name}.dtype"] = source.dtype
        if source.format in TOKENISED:
            settings[f"data.sources.{name}.eos_token_id"] = source.eos_token_id
    return settings


def include_patterns(source: SourceConfig) -> list[str]:
    """The file names that a source takes."""
    return derived(source).include


def find_prepared(root: Path) -> Prepared | None:
    """What lies in a folder, or None. Raises UserError if dataset.json is there but unreadable."""
    file = root / _FILE
    if not file.is_file():
        return None
    return _parse(Folder(root), f"remove '{root}' and run `megahybrid prepare` again")


def _parse(store: Store, remedy: str) -> Prepared:
    try:
        fields = json.loads(store.read(_FILE, None))
        version = fields.pop("version")
        if version != _VERSION:
            raise ValueError(f"it has version {version}, not {_VERSION}")
        fields["sources"] = {
            name: {split: SplitCounts(**counts) for split, counts in splits.items()}
            for name, splits in fields["sources"].items()
        }
        prepared = Prepared(root=store.root, **fields)
        _check(prepared)
        return prepared
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{store.describe(_FILE)} is not readable ({' '.join(str(error).split())[:200]}); {remedy}."
        ) from error


def _check(prepared: Prepared) -> None:
    """Raises ValueError for what `prepare` does not write: the file may come from anywhere."""

    def require(fits: bool, what: str, value: object) -> None:
        if not fits:
            raise ValueError(f"its {what} is {value!r:.60}")

    for key, least in (("seq_length", 1), ("vocab_size", 1), ("document_id", 0)):
        value = getattr(prepared, key)
        require(type(value) is int and least <= value < 1 << 32, key, value)
    require(prepared.token_dtype == token_dtype(prepared.vocab_size), "token_dtype", prepared.token_dtype)
    require(_is_sha256(prepared.tokenizer_sha256), "tokenizer_sha256", prepared.tokenizer_sha256)
    require(isinstance(prepared.settings, dict), "settings", prepared.settings)
    for name, splits in prepared.sources.items():
        require(is_source_name(name), "source's name", name)
        require(splits.keys() == {TRAIN, VALIDATION}, f"splits of {name}", sorted(splits))
        for counts in splits.values():
            for key in ("documents", "bytes", "tokens", "samples"):
                value = getattr(counts, key)
                require(type(value) is int and value >= 0, key, value)
            require(_is_sha256(counts.index_sha256), "index_sha256", counts.index_sha256)


def is_source_name(name: str) -> bool:
    """Whether a source may be called so: its name is that of a folder in data.path."""
    return re.fullmatch(r"\w[\w.-]*", name) is not None and name not in ("tokenizer", _FILE)


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def open_store(config: Config) -> Store:
    """Where training reads text from: data.path, or data.remote through data.cache. Raises UserError."""
    data = config.data
    if data.remote is None:
        return Folder(Path(str(data.path)).expanduser())
    limit = None if data.cache_limit is None else int(data.cache_limit * 1e9)
    return Remote(data.remote, Path(str(data.cache)).expanduser().absolute(), limit)


def open_prepared(config: Config) -> Prepared:
    """What `prepare` wrote for this recipe, in data.path or as a copy at data.remote.

    Raises UserError if there is nothing, if it is not what data.identity names, if its samples are shorter than
    train.seq_length or no multiple of it, if it has more tokens than the model, another tokenizer or other sources than
    the recipe, if these were read in another way and data.identity does not name it, and if its tokenizer is not the
    one that it was prepared with.
    """
    store = open_store(config)
    where = f"data.path '{config.data.path}'" if config.data.remote is None else f"data.remote '{config.data.remote}'"
    if config.data.remote is None and not (store.root / _FILE).is_file():
        raise UserError(f"{where} holds no prepared data; run `megahybrid prepare` first.")
    prepared = _parse(store, store.remedy())
    _check_fit(prepared, config, where)
    try:
        store.read(TOKENIZER, prepared.tokenizer_sha256)
    except MachineFault:
        raise
    except UserError as error:
        raise UserError(
            f"{store.describe(TOKENIZER)} is missing or not the tokenizer that the data was prepared "
            f"with; put it back, or {store.remedy()}."
        ) from error
    return prepared


def _check_fit(prepared: Prepared, config: Config, where: str) -> None:
    check_identity(config, data_identity(config, prepared), where)
    length = config.train.seq_length
    if length > prepared.seq_length:
        raise UserError(
            f"{where} was prepared with samples of {prepared.seq_length} tokens, shorter than train.seq_length "
            f"({length}); lower it, or prepare into another data.path."
        )
    if prepared.seq_length % length:
        raise UserError(
            f"{where} was prepared with samples of {prepared.seq_length} tokens, which train.seq_length ({length}) "
            "does not divide; change it, or prepare into another data.path."
        )
    if prepared.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{where} has {prepared.vocab_size} tokens in its vocabulary, more than "
            f"model.vocab_size ({config.model.vocab_size}); raise model.vocab_size or prepare into another data.path."
        )
    if _other_tokenizer(prepared, config.data.tokenizer):
        raise UserError(
            f"{where} was prepared with another tokenizer than data.tokenizer '{config.data.tokenizer}'; prepare into "
            "another data.path, or read this data by data.tokenizer=null."
        )
    named = set(text_sources(config))
    if named and named != set(prepared.sources):
        raise UserError(
            f"{where} was prepared from {_listed(prepared.sources)}, but data.sources names {_listed(named)}; prepare "
            "into another data.path, or leave a source out by weight 0."
        )
    if config.data.identity is None and (another := _read_otherwise(prepared, config)):
        raise UserError(f"{where} was prepared with another {another}; set it back, or prepare into another data.path.")


def _read_otherwise(prepared: Prepared, config: Config) -> str:
    """What the recipe says of reading the sources in use that is not what they were prepared with, empty where there
    is nothing. A recipe without sources says nothing by a default."""
    sources = text_sources(config)
    if not sources and config.data.validation_fraction == DataConfig.validation_fraction:
        return ""
    meant = _reading(config, {name: source for name, source in sources.items() if source.weight != 0})
    changed = [key for key, value in meant.items() if not _same(prepared.settings.get(key, value), value)]
    return told(changed, prepared.settings, meant)


def _same(was: Any, now: Any) -> bool:
    """Whether two values of a setting mean the same: in a list of names or patterns no order counts."""
    if isinstance(was, list) and isinstance(now, list):
        return set(map(str, was)) == set(map(str, now))
    return was == now


def _other_tokenizer(prepared: Prepared, path: str | None) -> bool:
    """Whether `path` holds a tokenizer that is not the prepared one; training needs none there."""
    try:
        return path is not None and tokenizer_hash(tokenizer_file(path)) != prepared.tokenizer_sha256
    except UserError:
        return False


def data_identity(config: Config, prepared: Prepared | None) -> str:
    """`Prepared.identity`; with task sources, of which `prepare` writes nothing, a hash of that and of all that decides
    their samples. Raises UserError."""
    tasks = {}
    for name, source in task_sources(config).items():
        task = find_task(str(source.task), f"data.sources.{name}.task")
        tasks[name] = [(stage.until, task.identity(stage.parameters)) for stage in task_stages(name, source)]
    if not tasks and prepared is not None:
        return prepared.identity
    text = prepared.identity if prepared else None
    if prepared is None and config.data.tokenizer is not None:
        text = tokenizer_hash(tokenizer_file(config.data.tokenizer))
    facts = json.dumps([text, config.model.vocab_size, config.train.seq_length, tasks], sort_keys=True)
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


def check_identity(config: Config, found: str, where: str) -> None:
    """Raises UserError unless data of this identity, which `where` holds, may be read."""
    if config.data.identity not in (None, found):
        raise UserError(
            f"{where} holds data whose identity is {found}, but data.identity is {config.data.identity}; "
            "put back the data that was meant, or change the key."
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def differences(prepared: Prepared, settings: dict[str, Any]) -> list[str]:
    """The dotted keys whose values differ."""
    keys = sorted(prepared.settings.keys() | settings.keys())
    return [key for key in keys if not _same(prepared.settings.get(key), settings.get(key))]


def told(keys: Iterable[str], was: dict[str, Any], now: dict[str, Any]) -> str:
    """Settings that differ, as a user reads them."""
    return ", ".join(f"{key} ({_value(was, key)}, now {_value(now, key)})" for key in keys)


def _value(settings: dict[str, Any], key: str) -> str:
    if key == "data.tokenizer":
        return str(settings.get(key, "one that prepare trains"))[:23]  # of a hash enough to tell two apart
    return "not set" if settings.get(key) is None else " ".join(str(settings[key]).split())[:200]
