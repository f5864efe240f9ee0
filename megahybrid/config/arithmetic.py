"""Whole numbers that follow from others: heads from a width, layers from a depth, steps from tokens."""

from __future__ import annotations

import ast
import math
import operator
import re
from fractions import Fraction

from megahybrid.errors import UserError

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def whole(text: str, **names: int) -> int:
    """The value of an expression of whole numbers, names, + - * / and brackets; it is computed, never run as code.

    Raises UserError for anything else, and where it comes to no whole number of at least 1.
    """
    try:
        if len(text) > 100:
            raise ValueError
        value = _value(ast.parse(text.strip(), mode="eval").body, names)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        known = f"{', '.join(names)}, whole" if names else "whole"
        raise UserError(f"'{text:.100}' cannot be computed; write {known} numbers, + - * / and brackets.") from error
    except ZeroDivisionError as error:
        raise UserError(f"'{text}' divides by 0; change it.") from error
    if value.denominator != 1 or value < 1:
        given = ", ".join(f"{name} {number}" for name, number in names.items())
        raise UserError(
            f"'{text}' is {float(value):g}{f' at {given}' if given else ''}, no whole number of at least 1; change one "
            "of them."
        )
    return int(value)


def steps_of(tokens: str, tokens_per_step: int) -> int:
    """The least number of steps that read so many tokens, written as 10.7B, 300M, 1.0e9 or 65536.

    Raises UserError for what is no such number, and for 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?(?:[eE]\+?\d{1,2})?)([KMBT]?)", tokens.strip().replace("_", ""))
    number = Fraction(found[1]) * _SUFFIXES[found[2]] if found else Fraction(0)
    if not number:
        raise UserError(f"'{tokens:.100}' is no number of tokens; write one such as 10.7B, 300M or 1.0e9.")
    return math.ceil(number / tokens_per_step)


def fill(template: str, **names: int) -> str:
    """The text with every {expression} in it replaced by its value. Raises UserError as `whole`."""
    return re.sub(r"\{([^{}]*)\}", lambda found: str(whole(found[1], **names)), template)


def _value(node: ast.expr, names: dict[str, int]) -> Fraction:
    match node:
        case ast.Constant(value=value) if type(value) is int:
            return Fraction(value)
        case ast.Name(id=name) if name in names:
            return Fraction(names[name])
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, names), _value(right, names))
    raise ValueError
