"""A checkpoint as a folder that transformers loads: its own model files, safetensors shards, tokenizer, model card.

Tensors go from the checkpoint's files to the shards one by one: host memory holds one parameter at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from megahybrid.config import Config, load_config
from megahybrid.data.chat import Chat
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.devices import DTYPES
from megahybrid.errors import UserError
from megahybrid.files import read_json, write_json, write_text
from megahybrid.hf import hub, verify
from megahybrid.hf.card import evaluated, model_card
from megahybrid.hf.mixer_classes import MIXERS
from megahybrid.hf.model_files import model_files
from megahybrid.hf.naming import MODEL_TYPE, exported_config, exported_name
from megahybrid.hf.staging import staged, told
from megahybrid.model.settings import Settings
from megahybrid.scaling.parameters import parameter_specs
from megahybrid.training import checkpoint, checkpoint_folder
from megahybrid.training.tensor_files import facts_of, write_stream

Report = Callable[[str], None]

_LABELS = {torch.bfloat16: "BF16", torch.float32: "F32"}
_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def export(
    path: Path,
    target: Path,
    dtype: str = "bf16",
    shard_size: str = "5GB",
    check: bool | None = None,
    license_: str | None = None,
    repository: str | None = None,
    report: Report = print,
) -> None:
    """Write the checkpoint (or a run directory's newest one) to the new folder `target`.

    Args:
        dtype: of the weights, bf16 or fp32; what a kind of layer keeps in fp32 stays so.
        shard_size: the most bytes a file holds, such as 5GB or 500MB; a larger tensor has a file of its own.
        check: compare logits with the training model's; None does it where host memory suffices.
        license_: of the weights, as the hub writes it.
        repository: USER/NAME on the hub; the folder then has to have all that the hub wants, a licence too.

    Raises UserError for a checkpoint that is missing or damaged, a target that is not empty, a full disk, and logits
    that differ; the target is then left as it was.
    """
    hub.check_wishes(repository, license_)
    folder = checkpoint_folder.find(path)
    if folder is None:
        raise UserError(f"There is no checkpoint in '{path}'; give a run directory or a checkpoint inside one.")
    facts, config = checkpoint.read_facts(folder), load_config(folder / "config.yaml")
    tokenizer = Tokenizer.load(folder / checkpoint_folder.TOKENIZER)
    most = _bytes(shard_size)
    _require_whole(folder, facts, config)
    with staged(target) as part:
        _write_small_files(part, folder, config, tokenizer, DTYPES[dtype])
        results = evaluated(folder, facts, report)
        card = model_card(repository or target.name, config, facts, folder, license_, results)
        write_text(part / "README.md", card)
        types = stored_types(config, DTYPES[dtype])
        _write_weights(part, folder, facts, types, most, report)
        if verify.wanted(config, check, report):
            trained = verify.trained_model(folder, config, types)
            exported = verify.exported_model(read_json(part / "config.json"), part.glob("*.safetensors"))
            verify.verify(trained, exported, config, tokenizer, report)
        if repository is not None:
            hub.require_ready(part, repository, bool(results))
    report(f"Exported {folder} to {target}.")
    if repository is not None:
        report(f"It is ready for the hub: hf upload {repository} {target}")


def is_exported(target: Path, dtype: str = "bf16", license_: str | None = None) -> bool:
    """Whether the folder is an exported model with weights of this type, and under this licence where one is given."""
    config = read_json(target / "config.json") or {}
    return config.get("dtype") == _NAMES[DTYPES[dtype]] and license_ in (None, hub.license_of(target))


def stored_types(config: Config, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The type in which each parameter is exported: `dtype`, but fp32 for what a kind of layer keeps in it."""
    kept = {name for letter in Settings.of(config).pattern.letters for name in MIXERS[letter].keep_in_fp32}
    return {name: torch.float32 if name.rpartition(".")[2] in kept else dtype for name in parameter_specs(config)}


def _bytes(text: str) -> int:
    """Bytes of 5GB or 500MB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)", text.strip().upper())
    size = float(found[1]) * {"KB": 1e3, "MB": 1e6, "GB": 1e9}[found[2]] if found else 0
    if size < 1:
        raise UserError(f"--shard-size is '{text}'; write a size such as 5GB or 500MB.")
    return int(size)


def _require_whole(folder: Path, facts: dict[str, Any], config: Config) -> None:
    for name, spec in parameter_specs(config).items():
        found = facts["parameters"].get(name, {}).get("shape")
        if found != list(spec.shape):
            raise UserError(
                f"'{folder}': {name} should be {list(spec.shape)}, it is {found or 'missing'}; "
                "its config.yaml is another model's: put the right one back."
            )
    for name, saved in facts["files"].items():
        if name.startswith("weights-") and not ((folder / name).is_file() and facts_of(folder / name) == saved):
            raise UserError(f"'{folder / name}' is missing or not what was saved; export another checkpoint.")


def _write_small_files(part: Path, folder: Path, config: Config, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    architecture = exported_config(config)
    for name, text in model_files(architecture["layers"]).items():
        write_text(part / name, text)
    tokens, chat = dict.fromkeys(("bos_token", "eos_token", "pad_token"), tokenizer.document_token), Chat.read(folder)
    if chat.template is not None:
        write_text(part / "chat_template.jinja", chat.template)
        tokens |= chat.tokens
    ids = {f"{name}_id": tokenizer.id_of(token) for name, token in tokens.items()}
    auto = {"AutoConfig": "configuration_megahybrid.MegahybridConfig"}
    for each, name in (("AutoModel", "MegahybridModel"), ("AutoModelForCausalLM", "MegahybridForCausalLM")):
        auto[each] = f"modeling_megahybrid.{name}"
    head = {"architectures": ["MegahybridForCausalLM"], "model_type": MODEL_TYPE, "auto_map": auto}
    write_json(part / "config.json", {**head, "dtype": _NAMES[dtype], **architecture, **ids})
    ends = sorted({ids["eos_token_id"], tokenizer.document_id})  # of an answer, and of a document
    write_json(part / "generation_config.json", ids | {"eos_token_id": ends if len(ends) > 1 else ends[0]})
    write_text(part / "tokenizer.json", _beginning_documents(folder / checkpoint_folder.TOKENIZER, tokenizer))
    write_json(
        part / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **tokens,
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        },
    )


def _beginning_documents(file: Path, tokenizer: Tokenizer) -> str:
    """tokenizer.json, changed where needed so that a text begins with the document token, as in training."""
    backend = Backend.from_file(str(file))
    if backend.encode("").ids[:1] != [tokenizer.document_id]:
        token = tokenizer.document_token
        backend.post_processor = TemplateProcessing(
            single=[token, "$A"], pair=[token, "$A", token, "$B"], special_tokens=[(token, tokenizer.document_id)]
        )
    return backend.to_str(pretty=True)


def _write_weights(
    part: Path, folder: Path, facts: dict[str, Any], types: dict[str, torch.dtype], most: int, report: Report
) -> None:
    shapes = {name: facts["parameters"][name]["shape"] for name in types}
    sizes = {name: math.prod(shapes[name]) * dtype.itemsize for name, dtype in types.items()}
    shards = _shards(sizes, most)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        entries = {exported_name(name): (_LABELS[types[name]], shapes[name]) for name in names}
        written = write_stream(part / file, entries, told(_read(folder, facts, names, types), report))
        index |= dict.fromkeys(entries, file)
        report(f"{file}: {written['bytes'] / 1e6:,.1f} MB, {len(index)} of {len(types)} parameters")
    if len(shards) > 1:
        text = json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}, indent=2)
        write_text(part / "model.safetensors.index.json", text + "\n")


def _shards(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Names in order, cut into shards of at most `most` bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _read(folder: Path, facts: dict[str, Any], names: list[str], types: dict[str, torch.dtype]) -> Iterator[Tensor]:
    for name in names:
        file = folder / checkpoint.file_name("weights", facts["parameters"][name]["file"])
        with safe_open(file, "pt") as tensors:
            yield tensors.get_tensor(name).to(types[name])
