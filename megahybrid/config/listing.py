"""Every configuration key as text: what the schema says of it, and what a recipe has."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import yaml
from omegaconf import MISSING

from megahybrid.config.schema import Config, SourceConfig
from megahybrid.errors import UserError
from megahybrid.key import Key, derived, walk

_WIDTH = 100


def listing(words: Sequence[str] = (), config: Config | None = None) -> str:
    """A paragraph a key: its name, type, value and range, and what it means.

    Args:
        words: only keys with one of these in their names; none: all.
        config: whose values are shown, with those that follow from others; the schema's defaults without it.

    Raises UserError where no key has any of the words.
    """
    shown = _defaults() if config is None else derived(config)
    found = list(_paragraphs(shown, words))
    if not found:
        raise UserError(f"No key has {' or '.join(words)} in its name; `megahybrid keys` alone lists all.")
    return "\n".join(found)


def _paragraphs(config: Config, words: Sequence[str]) -> Iterator[str]:
    for name, holder, field, rules in walk(config):
        if words and not any(word.lower() in name for word in words):
            continue
        facts = [f"{name}: {field.type} = {_shown(getattr(holder, field.name))}", *_rules(rules, field.type)]
        meaning = textwrap.fill(
            meanings(type(holder)).get(field.name, ""), _WIDTH, initial_indent="    ", subsequent_indent="    "
        )
        yield f"{'; '.join(facts)}\n{meaning}"


def _defaults() -> Config:
    config = Config()
    config.data.sources["NAME"] = SourceConfig()
    return config


def _shown(value: Any) -> str:
    """As YAML has it in one line."""
    if value == MISSING:
        return "(to be given)"
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def _rules(rules: Key, of_type: str) -> Iterator[str]:
    if rules.choices:
        yield f"one of {', '.join(map(str, rules.choices))}"
    elif "int" in of_type or "float" in of_type:
        yield rules.range()
    if rules.may_change:
        yield "may change when a run goes on"


@cache
def meanings(section: type) -> dict[str, str]:
    """By name what the text below each field of a section's class says."""
    found: dict[str, str] = {}
    for each in reversed(section.__mro__):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        except (OSError, TypeError):  # made by a function, or of C
            continue
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found
