"""The code in an exported folder: modules of this package as files beside each other that need nothing of it.

`….hf.NAME_megahybrid` keeps its name, a mixer's `….NAME.hf` becomes NAME_megahybrid, imports between them become
relative. The model's own file gets the table of its kinds of layers: transformers 4 reads no other file anew where a
process loads two models whose folders have the same name. Its configuration's file gets a mark of all.
"""

from __future__ import annotations

import re
from hashlib import sha256
from importlib import import_module
from pathlib import Path

from megahybrid.errors import UserError
from megahybrid.hf.mixer_classes import MIXERS

_MODEL = "megahybrid.hf.modeling_megahybrid"
_CONFIGURATION = "megahybrid.hf.configuration_megahybrid"
_TABLE = "from megahybrid.hf.mixer_classes import MIXERS\n"
_TABLE_OF_ITS_OWN = """
# transformers 4 copies from a local folder only the files that this one imports.
{imports}

MIXERS = {{{classes}}}
"""
# transformers 5 takes a model's code for that of another whose folder has the same name and this file.
_MARK = """
# Of the model's code beside this file: {}
"""
# A module, and the first name that is taken from it.
_IMPORT = re.compile(r"^from ([\w.]+(?:_megahybrid|\.hf))(?= import \(?\s*(\w+))", re.MULTILINE)

_LEFT = re.compile(r"^[ \t]*(?:from|import) megahybrid\b.*", re.MULTILINE)


def model_files(letters: str) -> dict[str, str]:
    """File name → text, of a model whose layers have these letters. Raises UserError where one needs this package."""
    classes = {letter: MIXERS[letter] for letter in sorted(set(letters))}
    imported: dict[str, set[str]] = {}
    for each in classes.values():
        imported.setdefault(each.__module__, set()).add(each.__name__)
    texts, modules = {}, [_MODEL, *imported]
    for module in modules:  # which grows
        texts[module] = Path(import_module(module).__file__).read_text(encoding="utf-8")
        for needed, name in _IMPORT.findall(texts[module]):
            if needed not in modules:
                modules.append(needed)
                if module != _MODEL:
                    imported[needed] = {name}
    table = _TABLE_OF_ITS_OWN.format(
        imports="\n".join(f"from {module} import {', '.join(sorted(imported[module]))}" for module in sorted(imported)),
        classes=", ".join(f'"{letter}": {each.__name__}' for letter, each in classes.items()),
    )
    texts[_MODEL] = texts[_MODEL].replace(_TABLE, table)
    flat = {module: _IMPORT.sub(lambda found: f"from .{_flat(found[1])}", text) for module, text in texts.items()}
    flat[_CONFIGURATION] += _MARK.format(sha256("".join(flat.values()).encode()).hexdigest()[:16])
    for module, text in flat.items():
        if left := _LEFT.search(text):
            raise UserError(f"{module} cannot be exported: '{left[0]}' is of megahybrid, not of the exported files.")
    return {f"{_flat(module)}.py": text for module, text in flat.items()}


def _flat(module: str) -> str:
    *_, parent, name = module.split(".")
    return f"{parent}_megahybrid" if name == "hf" else name
