"""A fit as the terminal shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_HOW = {"a_opt": ".3f", "alpha": ".4f", "beta": ".4f", "E": ".4f", "A": ".4g", "B": ".4g"}


def describe(found: Mapping[str, Any]) -> str:
    """A short table a kind, comparisons, predictions and warnings, of what fit.json holds."""
    lines = [found["rule"]]
    for kind, law in found["kinds"].items():
        lines += ["", *_law(kind, law), *_predictions(law["predictions"]), *_checks(found, kind)]
    for pair, points in found["multipliers"].items():
        lines += ["", f"compute multiplier, {pair}", *_multipliers(points)]
    lines += ["", *(f"Warning: {each}" for each in found["warnings"])] if found["warnings"] else []
    return "\n".join(lines)


def _law(kind: str, law: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{kind}: {law['runs']} runs, objective {law['objective']:.6g}, gradient {law['gradient_norm']:.1e}, "
        f"condition {law['condition']:.1e}"
    )
    columns = {"": law, **{f"delta {name}": each for name, each in law["delta"].items() if each}}
    names = [name or "delta 1e-3" for name in columns]
    yield f"  {'':6}" + "".join(f"{each:>14}" for each in names) + ("   95 % interval" if law["intervals"] else "")
    for name, how in _HOW.items():
        row = "".join(f"{_number(each[name], how):>14}" for each in columns.values())
        yield f"  {name:6}{row}   {_interval(law['intervals'].get(name), how)}".rstrip()


def _predictions(predictions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for each in predictions:
        name = each["cell"] or f"{each['parameters']:.3g} parameters, {each['tokens']:.3g} tokens"
        said = f"  {name}: loss {each['loss']:.4f} {_interval(each['interval'], '.4f')}".rstrip()
        if each["actual"] is not None:
            inside = {True: ", inside", False: ", outside", None: ""}[each["covered"]]
            said += f"; came {each['actual']:.4f} ({100 * each['error']:+.2f} %{inside})"
        yield said


def _checks(found: Mapping[str, Any], kind: str) -> Iterator[str]:
    if steps := found["rollout"][kind]:
        last = steps[-1]
        covered = "" if last["covered"] is None else f", {last['covered']} of {last['predicted']} inside"
        yield (
            f"  rollout: the largest compute, {last['flops']:.2g} FLOPs, from {last['fitted']} smaller runs: "
            f"{100 * last['error']:+.2f} %{covered}"
        )
    if (check := found["approach2"][kind]) is not None:
        bias = check["bias"]
        said = "" if bias is None else f"; biased even without noise, here by {100 * bias['tokens']:+.1f} % of tokens"
        yield f"  approach 2: a_opt {check['a_opt']:.3f}{said}"


def _multipliers(points: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for each in points[:: max(1, len(points) // 5)]:
        yield f"  {each['flops']:.2g} FLOPs: {each['multiplier']:.3g} {_interval(each['interval'], '.3g')}".rstrip()


def _number(value: float | None, how: str) -> str:
    return "none" if value is None else f"{value:{how}}"


def _interval(ends: Sequence[float | None] | None, how: str) -> str:
    return "" if ends is None else f"[{', '.join(_number(each, how) for each in ends)}]"
