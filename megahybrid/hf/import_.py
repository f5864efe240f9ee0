"""A Hugging Face folder as a checkpoint of weights: what `export` wrote, or the published format of laLTE and laNSA.

A run starts from it by `train.init_from`, in any layout; all that reads checkpoints takes it as any other.
Only safetensors are read: a pickle may run any code when it is opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megahybrid import code_version
from megahybrid.config import Config, save_config
from megahybrid.config.schema import ParallelConfig
from megahybrid.config.validate import require_split, validate
from megahybrid.data.chat import Chat
from megahybrid.data.tokenizer import Tokenizer, has_tokenizer, tokenizer_file
from megahybrid.errors import UserError
from megahybrid.files import write_json
from megahybrid.hf import reference_format, verify
from megahybrid.hf.naming import MODEL_TYPE, exported_name, imported_config
from megahybrid.hf.staging import staged, told
from megahybrid.model.settings import Settings
from megahybrid.parallel import groups
from megahybrid.parallel.parameters import ParameterSpec
from megahybrid.scaling.parameters import parameter_specs
from megahybrid.training import checkpoint, checkpoint_folder
from megahybrid.training.checkpoint import Position
from megahybrid.training.tensor_files import write_stream

Report = Callable[[str], None]

_HEAD = exported_name("output.weight")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def import_model(source: Path, target: Path, check: bool | None = None, report: Report = print) -> None:
    """Write the model in folder `source` as a checkpoint to the new folder `target`.

    Without a tokenizer, which it then lacks, too, it serves `train.init_from`; for all else one is to be put there.

    check: compare logits of the training model and of the exported one; None does it where host memory suffices.
    Raises UserError for a model of another type, missing or wrong tensors, a target that is not empty, a full disk, and
    logits that differ; the target is then left as it was.
    """
    found = _read_config(source)
    config, name_of = _understand(found)
    validate(config)
    tokenizer = Tokenizer.load(source) if has_tokenizer(source) else None
    if tokenizer is not None:
        tokenizer.require_fit(config.model.vocab_size)
        chat = Chat.read(source)
        if chat.others:
            report(f"Only the default chat template is imported, not {', '.join(chat.others)}.")
    specs = parameter_specs(config)
    places = _places(source)
    sources = {name: name_of(name) for name in specs}
    ours = found["model_type"] == MODEL_TYPE
    _require_fit(source, config, specs, sources, places, published=not ours)
    with staged(target) as part:
        _write(part, config, specs, sources, places, found["model_type"], report)
        if tokenizer is not None:
            shutil.copyfile(tokenizer_file(source), part / checkpoint_folder.TOKENIZER)
            chat.write(part)
        save_config(config, part / "config.yaml")
        if verify.wanted(config, check, report):
            trained = verify.trained_model(part, config)
            if ours:
                exported = verify.exported_model(found, {file for file, _ in places.values()})
            else:
                exported = verify.converted_model(trained, config)
            verify.verify(trained, exported, config, tokenizer, report)
    report(f"Imported {source} to {target}; train.init_from={target} starts a run from it.")
    if tokenizer is None:
        name = checkpoint_folder.TOKENIZER
        report(f"It has no tokenizer, since {source} has none: for text put one into {target} as {name}.")


@contextlib.contextmanager
def as_checkpoint(source: Path) -> Iterator[Path]:
    """The model in folder `source` as a checkpoint in a temporary folder of one host, for as long as it is read; called
    by every process, whose number is the tensor parallel size.

    Raises UserError for what `import_model` refuses, where there is no tokenizer, and where the model does not split.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    require_split(config_of(source), processes)
    tokenizer_file(source)  # or it refuses
    groups.initialize(ParallelConfig(tensor=processes))
    part = groups.on_main(lambda: tempfile.mkdtemp(prefix="megahybrid-"))
    try:
        converted = Path(part) / "checkpoint"
        groups.on_main(lambda: import_model(source, converted, check=False, report=lambda _: None))
        yield converted
        groups.gather(None)  # all have read it
    finally:
        if groups.is_main():
            shutil.rmtree(part, ignore_errors=True)


def config_of(source: Path) -> Config:
    """The configuration that a model in folder `source` is imported with. Raises UserError like `import_model`."""
    config, _ = _understand(_read_config(source))
    validate(config)
    return config


def _read_config(source: Path) -> dict[str, Any]:
    file = source / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"There is no '{file}'; give a downloaded model's folder (`hf download NAME --local-dir DIR`)."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"'{file}' cannot be read as JSON; download the model again.") from error
    if not isinstance(found, dict):
        raise UserError(f"'{file}' is not a model's configuration; give another folder.")
    return found


def _understand(found: dict[str, Any]) -> tuple[Config, Callable[[str], str]]:
    """The recipe, and the source's name of a parameter of the training model."""
    kind = found.get("model_type")
    if kind == MODEL_TYPE:
        config, name_of = imported_config(found), exported_name
    elif kind in reference_format.MODEL_TYPES:
        config, name_of = reference_format.reference_config(found), reference_format.reference_name
    else:
        known = ", ".join((MODEL_TYPE, *reference_format.MODEL_TYPES))
        raise UserError(f"config.json has model_type '{kind}'; only {known} can be imported.")
    stored = found.get("dtype", found.get("torch_dtype"))  # transformers before 4.56 wrote the latter
    config.train.dtype = "fp32" if stored == "float32" else "bf16"
    return config, name_of


def _places(source: Path) -> dict[str, tuple[Path, list[int]]]:
    """File and shape of every tensor in the folder."""
    places = {}
    for file in _weight_files(source):
        if not file.is_file():
            raise UserError(f"'{file}' is missing; download it again.")
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  (it is no dictionary)
                    if name in places:
                        both = f"{places[name][0].name} and {file.name}"
                        raise UserError(f"'{source}' has {name} twice, in {both}; download it again.")
                    places[name] = (file, tensors.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"'{file}' is damaged or no safetensors file; download it again.") from error
    return places


def _weight_files(source: Path) -> list[Path]:
    index = source / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"'{index}' is not an index of shards; download it again.") from error
        if any(Path(name).name != name for name in names):
            raise UserError(f"'{index}' names files outside its folder; do not trust this download.")
        return [source / name for name in names]
    if (source / "model.safetensors").is_file():
        return [source / "model.safetensors"]
    pickles = sorted(each.name for pattern in _PICKLES for each in source.glob(pattern))
    if pickles:
        raise UserError(
            f"'{source}' holds weights only as a pickle ({pickles[0]}), which could run any code when opened; "
            "have them converted to safetensors by somebody who trusts them."
        )
    raise UserError(f"'{source}' has neither model.safetensors nor model.safetensors.index.json; download the weights.")


def _require_fit(
    source: Path,
    config: Config,
    specs: Mapping[str, ParameterSpec],
    sources: Mapping[str, str],
    places: Mapping[str, tuple[Path, list[int]]],
    published: bool,
) -> None:
    for name, spec in specs.items():
        if sources[name] not in places:
            raise UserError(f"'{source}' has no tensor {sources[name]}; download its weights again.")
        file, shape = places[sources[name]]
        # The published convolutions have axes of length 1 that ours do not need.
        ones = {1} if published else set()
        if [n for n in shape if n not in ones] != [n for n in spec.shape if n not in ones]:
            raise UserError(
                f"'{file}': {sources[name]} is {shape}, but config.json calls for {list(spec.shape)}; "
                "one of the two is another model's: download both again."
            )
    tied = {_HEAD} if config.model.tie_embeddings else set()
    both = _HEAD, sources["embedding.weight"]
    if tied & places.keys() and not torch.equal(*(_tensor(places, name) for name in both)):
        raise UserError(
            f"'{source}' has an output layer, {_HEAD}, that is not the embedding, to which config.json ties it; set "
            "tie_word_embeddings to false there, or download both again."
        )
    extra = places.keys() - set(sources.values()) - tied - set(reference_format.IGNORED if published else ())
    if extra:
        raise UserError(
            f"'{source}' has {len(extra)} tensors that its config.json has no place for, such as {min(extra)}; "
            "download both again."
        )


def _tensor(places: Mapping[str, tuple[Path, list[int]]], name: str) -> Tensor:
    with safe_open(places[name][0], "pt") as source:
        return source.get_tensor(name).to(torch.float32)


def _write(
    part: Path,
    config: Config,
    specs: Mapping[str, ParameterSpec],
    sources: Mapping[str, str],
    places: Mapping[str, tuple[Path, list[int]]],
    model_type: str,
    report: Report,
) -> None:
    def tensors() -> Iterator[Tensor]:
        for name, spec in specs.items():
            yield _tensor(places, sources[name]).reshape(spec.shape)

    file = checkpoint.file_name("weights", 0)
    entries = {name: ("F32", spec.shape) for name, spec in specs.items()}
    written = write_stream(part / file, entries, told(tensors(), report))
    facts = {
        "megahybrid": code_version(),
        "imported_from": model_type,
        "position": asdict(Position(0, 0, "")),
        "layers": Settings.of(config).pattern.letters,
        "layout": {**asdict(ParallelConfig()), "data": 1},
        "parameters": {name: {"shape": list(spec.shape), "file": 0} for name, spec in specs.items()},
        "files": {file: written},
    }
    write_json(part / "checkpoint.json", facts)
