"""Whole numbers that follow from others: heads from a width, layers from a depth."""

from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction

from megahybrid.errors import UserError

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


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
