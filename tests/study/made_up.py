"""A study's files as its verbs leave them, made from a law that is known: no fit is made, the law is what it says."""

import csv
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np

from megahybrid.study.results import read_results

LAWS = {  # A, B, E, alpha, beta
    "transformer": (150.0, 900.0, 1.70, 0.28, 0.33),
    "gdn": (143.0, 880.0, 1.68, 0.28, 0.33),
    "lalte": (138.0, 850.0, 1.67, 0.28, 0.33),
}
COUNTS = {"transformer": 1.25, "gdn": 1.10, "lalte": 1.15}  # FLOPs a token by 6 N
HOURS = {"transformer": 7e-18, "gdn": 7e-18, "lalte": 9e-18}  # a FLOP, of large models
SIZES = {"128x4": 1.0e6, "192x6": 2.6e6, "256x8": 5.5e6, "320x10": 10.0e6}
BUDGETS = (1e15, 3e15, 1e16)
BEST_FACTOR = 0.9  # on the learning rate
FROZEN = "2026-01-02T03:00:00+00:00"
SPREAD = 0.002  # half of an interval of a loss, relative
COLUMNS = """cell run kind size budget seed role trunk held_out retry_of parameters parameters_without_embedding tokens
flops flops_per_token learning_rate batch_tokens steps gpu_hours loss state excluded code_version began""".split()  # noqa: SIM905


def loss(kind, parameters, tokens):
    a, b, e, alpha, beta = LAWS[kind]
    return e + a / parameters**alpha + b / tokens**beta


def optimum(kind, flops):
    """Parameters, tokens and loss of the best model at some FLOPs, in closed form (Hoffmann 2022, equation 4)."""
    a, b, _, alpha, beta = LAWS[kind]
    product = flops / (6 * COUNTS[kind])
    parameters = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * product ** (beta / (alpha + beta))
    return parameters, product / parameters, loss(kind, parameters, product / parameters)


def row(kind, size, budget, seed=0, noise=0.0, **changes):
    parameters = SIZES[size] * {"transformer": 1.0, "gdn": 1.04, "lalte": 1.02}[kind]
    tokens = changes.get("tokens", budget / (6 * COUNTS[kind] * parameters))
    cell = changes.get("cell", f"{kind}-{size}-{budget:.0e}-s{seed}".replace("e+", "e"))
    return {
        "cell": cell,
        "run": identity(cell),
        "kind": kind,
        "size": size,
        "budget": budget,
        "seed": seed,
        "role": "single",
        "trunk": identity(cell),
        "held_out": 0,
        "retry_of": "",
        "parameters": parameters,
        "parameters_without_embedding": 0.7 * parameters,
        "tokens": tokens,
        "flops": 6 * COUNTS[kind] * parameters * tokens,
        "flops_per_token": 6 * COUNTS[kind] * parameters,
        "learning_rate": 2e-3,
        "batch_tokens": 32768,
        "steps": round(tokens / 32768),
        "gpu_hours": HOURS[kind] * budget * (1 + 1e6 / parameters),
        "loss": loss(kind, parameters, tokens) * (1 + noise),
        "state": "done",
        "excluded": "",
        "code_version": "0.1.0 0123456789ab",
        "began": "2026-01-02T03:04:05+00:00",
        **changes,
    }


def branched(kind="gdn", size="256x8", tokens=(5e7, 1e8, 2e8)):
    """A trunk and its branches, shortest first; budgets are tokens a parameter."""
    family = [
        row(kind, size, each / SIZES[size], tokens=each, cell=f"{kind}-{size}-d{each:.0f}", role="branch")
        for each in tokens
    ]
    family[-1]["role"] = "trunk"
    return [each | {"trunk": family[-1]["run"]} for each in family]


def identity(text):
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def runs(noise=0.001):
    """Every size at every budget, the largest held out, three rates more at the smallest, one diverged, one missing."""
    draw, rows = np.random.default_rng(0), []
    for kind in LAWS:
        for size in SIZES:
            for budget in BUDGETS:
                rows.append(row(kind, size, budget, noise=noise * draw.normal()))
        for seed in (1, 2):
            rows.append(row(kind, "128x4", BUDGETS[0], seed, noise * draw.normal()))
        rows.append(row(kind, "320x10", 8e16, noise=noise * draw.normal(), held_out=1))
        for factor in (0.35, 0.5, 0.7, 1.0, 1.4):
            changes = {"cell": f"{kind}-128x4-tune{factor}", "role": "tune", "excluded": "a run of the tuning grid"}
            worse = 0.02 * np.log(factor / BEST_FACTOR) ** 2
            rows.append(row(kind, "128x4", BUDGETS[1], noise=worse, learning_rate=2e-3 * factor, **changes))
    rows.append(
        row("gdn", "192x6", 3e15, seed=1, state="diverged", excluded="diverged: its final loss is nan", loss="")
    )
    rows.append(row("lalte", "192x6", 1e16, seed=1, state="missing", excluded="missing", loss="", gpu_hours=""))
    return rows


def multiplier(base, kind, flops):
    """How many times `flops` `kind` needs for the loss that `base` has with them, by bisection."""
    wanted, low, high = optimum(base, flops)[2], flops / 100, flops * 100
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if optimum(kind, middle)[2] > wanted else (low, middle)
    return low / flops


def fit(rows):
    compute = np.geomspace(1e15, 1e19, 17)
    return {
        "rule": "Some runs are fitted.",
        "kinds": {kind: fit_of(kind, [each for each in rows if each["kind"] == kind], compute) for kind in LAWS},
        "multipliers": {
            f"{base} vs {kind}": [
                {"flops": c, "multiplier": (m := multiplier(base, kind, c)), "interval": [m * 0.93, m * 1.06]}
                for c in compute
            ]
            for base, kind in itertools.combinations(LAWS, 2)
        },
        "shared_exponents": {"alpha": 0.28, "beta": 0.33, "objective": 4e-4, "objective_of_own_exponents": 3.6e-4},
        "approach2": {kind: {"a_opt": 0.55, "bias": {"flops": 1e17, "tokens": -0.029}} for kind in LAWS}
        | {"lalte": None},
        "rollout": {
            kind: [{"flops": 1e16, "fitted": 10, "predicted": 4, "error": -0.0012, "covered": 3}] for kind in LAWS
        }
        | {"lalte": []},
        "warnings": [],
    }


def fit_of(kind, rows, compute):
    a, b, e, alpha, beta = LAWS[kind]
    law = {"A": a, "B": b, "E": e, "alpha": alpha, "beta": beta, "a_opt": beta / (alpha + beta)}
    made = {
        **law,
        "objective": 1.2e-4,
        "gradient_norm": 3e-14,
        "condition": 5.1e5,
        "delta": {"1e-4": law | {"a_opt": 0.531}, "1e-2": law, "inf": None},
        "intervals": {name: [value * 0.95, value * 1.05] for name, value in law.items()},
        "runs": sum(each["state"] == "done" and not each["held_out"] and not each["excluded"] for each in rows),
        "optimum": [best(kind, flops) for flops in compute],
        "predictions": [prediction(kind, each) for each in rows if each["held_out"]] + [target(kind)],
    }
    return made | {"without_embedding": made | {"a_opt": 0.561} if kind == "gdn" else None}


def best(kind, flops):
    parameters, tokens, expected = optimum(kind, flops)
    ends = [expected * (1 - SPREAD), expected * (1 + SPREAD)]
    return {"flops": flops, "parameters": parameters, "tokens": tokens, "loss": expected, "interval": ends}


def prediction(kind, each):
    expected = loss(kind, each["parameters"], each["tokens"])
    low, high = expected * (1 - SPREAD), expected * (1 + SPREAD)
    made = {name: each[name] for name in ("cell", "parameters", "tokens", "flops")}
    made |= {"loss": expected, "interval": [low, high], "actual": None, "error": None, "covered": None}
    if each["state"] == "done":
        actual = each["loss"]
        made |= {"actual": actual, "error": actual / expected - 1, "covered": low <= actual <= high}
    return made


def target(kind, parameters=50e6, tokens=2e9):
    expected = loss(kind, parameters, tokens)
    flops = 6 * COUNTS[kind] * parameters * tokens
    interval = [expected * (1 - 3 * SPREAD), expected * (1 + 3 * SPREAD)]
    made = {"parameters": parameters, "tokens": tokens, "flops": flops, "loss": expected, "interval": interval}
    return made | {"cell": None, "actual": None, "error": None, "covered": None}


def write(folder: Path, rows=None) -> Path:
    """runs.csv, plan.csv, prediction.json and fit.json of a study into a folder."""
    rows = runs() if rows is None else rows
    folder.mkdir(parents=True, exist_ok=True)
    table(folder / "runs.csv", COLUMNS, rows)
    table(
        folder / "plan.csv",
        ("cell", "gpu_hours", "data"),
        [{"cell": each["cell"], "gpu_hours": each["flops"] / 3e18 * 22, "data": "c0ffee"} for each in rows],
    )
    made = fit(rows)
    (folder / "fit.json").write_text(json.dumps(made))
    frozen = {
        identity(each["cell"]): each | {"frozen": FROZEN}
        for kind in LAWS
        for each in made["kinds"][kind]["predictions"]
        if each["cell"]
    }
    (folder / "prediction.json").write_text(json.dumps(frozen))
    return folder


def table(path, columns, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def results(folder, rows=None, change=lambda made: None, frozen=lambda made: None):
    """Results of a study whose fit.json and prediction.json are changed before they are read."""
    write(folder, rows)
    for name, by in (("fit.json", change), ("prediction.json", frozen)):
        made = json.loads((folder / name).read_text())
        by(made)
        (folder / name).write_text(json.dumps(made))
    return read_results(folder)
