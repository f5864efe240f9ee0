"""What the hub wants of a model's folder: files, and a card that says under which licence and how to use it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from megahybrid.errors import UserError

_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_METADATA = ("library_name", "pipeline_tag", "tags", "license")


def check_wishes(repository: str | None, license_: str | None) -> None:
    """Raise UserError for what the hub would not take as a repository, USER/NAME, or a licence, and a missing one."""
    if license_ is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license_):
        raise UserError(f"--license is '{license_}'; give the hub's identifier of it, such as apache-2.0 or mit.")
    if repository is None:
        return
    try:
        validate_repo_id(repository)
    except HFValidationError:
        valid = False
    else:
        valid = repository.count("/") == 1
    if not valid:
        raise UserError(f"--push-ready is '{repository}'; give the repository's name as USER/NAME.")
    if license_ is None:
        raise UserError("--push-ready wants a licence; give --license, such as apache-2.0.")


def license_of(folder: Path) -> str | None:
    """The licence that a folder's card names."""
    card = folder / "README.md"
    return _card(card.read_text(encoding="utf-8"))[0].get("license") if card.is_file() else None


def require_ready(folder: Path, repository: str, evaluated: bool) -> None:
    """Raise UserError, which names all that is missing, for a folder that the hub would show or load badly.

    evaluated: whether there are results, which the card's metadata then have to have.
    """
    missing = [name for name in (*_FILES, *_code(folder), *_weights(folder)) if not (folder / name).is_file()]
    card = folder / "README.md"
    metadata, text = _card(card.read_text(encoding="utf-8")) if card.is_file() else ({}, "")
    missing += [f"'{key}' in README.md" for key in _METADATA if not metadata.get(key)]
    if not re.search(rf'```python\n[^`]*from_pretrained\("{re.escape(repository)}"', text):
        missing.append(f"an example in README.md that loads {repository}")
    if evaluated and not any(each.get("results") for each in metadata.get("model-index") or ()):
        missing.append("'model-index' in README.md")
    if missing:
        raise UserError(f"The folder is not ready for the hub, it lacks {', '.join(missing)}; nothing was written.")


def _card(text: str) -> tuple[dict[str, Any], str]:
    """A card's metadata, {} where there are none that can be read, and what follows."""
    found = re.match(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        metadata = None
    return (metadata if isinstance(metadata, dict) else {}), found[2] if found else text


def _code(folder: Path) -> list[str]:
    """The modules that config.json names, and what these import of the folder."""
    config = folder / "config.json"
    classes = json.loads(config.read_text(encoding="utf-8")).get("auto_map", {}).values() if config.is_file() else ()
    named, found = sorted({f"{each.split('.')[0]}.py" for each in classes}), []
    while named:
        name = named.pop()
        if name not in found:
            found.append(name)
            if (folder / name).is_file():
                text = (folder / name).read_text(encoding="utf-8")
                named += [f"{each}.py" for each in re.findall(r"^from \.(\w+) import", text, re.MULTILINE)]
    return found or ["the code that config.json should name in auto_map"]


def _weights(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
