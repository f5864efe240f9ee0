"""Numbers as they are written for people."""

from __future__ import annotations


def short(value: float) -> str:
    """Three digits at most: 43.7M, 8.27B, 512."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= 0.9995 * limit:
            return f"{float(f'{value / limit:.3g}'):g}{suffix}"
    return f"{value:.3g}"
