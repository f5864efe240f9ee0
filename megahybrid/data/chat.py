"""How transformers turns messages into text: a tokenizer's chat template, and the tokens that it names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megahybrid.errors import UserError
from megahybrid.files import write_json, write_text

_FILE, _SETTINGS = "chat_template.jinja", "tokenizer_config.json"


@dataclass(frozen=True)
class Chat:
    """What a tokenizer's folder says of it.

    Attributes:
        template: in Jinja; None where there is none.
        tokens: bos_token and eos_token, as far as they are given.
        others: names of further templates, such as one for tools.
    """

    template: str | None
    tokens: dict[str, str]
    others: list[str]

    @classmethod
    def read(cls, folder: Path) -> Chat:
        """Raises UserError where a file cannot be read."""
        file = folder / _SETTINGS
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            tokens = {name: found[name] for name in ("bos_token", "eos_token") if found.get(name)}
            tokens = {name: token if isinstance(token, str) else token["content"] for name, token in tokens.items()}
            template = found.get("chat_template")  # where older versions have it, or several by name
            named = {each["name"]: each["template"] for each in template} if isinstance(template, list) else {}
            template = named.pop("default", None) if isinstance(template, list) else template
            named |= dict.fromkeys(each.stem for each in folder.glob("additional_chat_templates/*.jinja"))
            file = folder / _FILE
            return cls(file.read_text(encoding="utf-8") if file.is_file() else template, tokens, sorted(named))
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise UserError(f"'{file}' cannot be read ({error}); download it again or remove it.") from error

    def write(self, folder: Path) -> None:
        """Into a checkpoint's folder, from which `read` has it again but for the further templates."""
        if self.template is not None:
            write_text(folder / _FILE, self.template)
            write_json(folder / _SETTINGS, self.tokens)
