"""What a run came to, in numbers: read from its metrics, its configuration and its held-out tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megahybrid.config import load_config
from megahybrid.config.pattern import parse_pattern
from megahybrid.data.loader import validation_batches
from megahybrid.errors import UserError
from megahybrid.model.regulation import filled, regulators
from megahybrid.training.run_directory import Metrics, read_metrics


def unigram_entropy(tokens: Any) -> float:
    """Entropy in nats of the tokens' own frequencies: the loss of the best model that ignores all context.

    Args:
        tokens: integers of any shape, 0 or larger.

    Raises:
        ValueError: there is no token.
    """
    counts = np.bincount(np.asarray(tokens, dtype=np.int64).reshape(-1))
    counts = counts[counts > 0]
    if not counts.size:
        raise ValueError("the entropy of no tokens is not defined")
    frequencies = counts / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum()) + 0.0


def held_out_tokens(run_dir: Path) -> np.ndarray:
    """int64 `[tokens]`: the labels on which the run's validation loss is measured."""
    config = load_config(run_dir / "config.yaml")
    labels = [batch.labels.reshape(-1).numpy() for batch in validation_batches(config, dp_rank=0, dp_size=1)]
    labels = np.concatenate(labels)
    return labels[labels >= 0]  # negative: a label that the loss ignores


def mean_tokens_per_second(metrics: Metrics) -> float:
    """Trained tokens by the seconds that their steps took."""
    before = metrics[0]["tokens"] * (1 - 1 / metrics[0]["step"])  # a trunk's, where the run is a branch
    tokens = np.diff([line["tokens"] for line in metrics], prepend=before)
    return float(tokens.sum() / (tokens / [line["tokens_per_second"] for line in metrics]).sum())


def latest(metrics: Metrics, key: str, steps: int = 32) -> np.ndarray | None:
    """float64 `[layers, members]`: a regulated quantity, mean over the lines of the last steps that have it, if any."""
    lines = [line for line in metrics if line.get(key)]
    values = [line[key] for line in lines if line["step"] > lines[-1]["step"] - steps]
    return np.mean(values, axis=0) if values else None


def summarise(run_dir: Path) -> str:
    """The run in a short table: held-out loss beside the unigram entropy of the same tokens, speed, what is
    regulated."""
    metrics = read_metrics(run_dir)
    rows = _loss_rows(run_dir, metrics)
    last = metrics[-1]
    rows.append(("tokens trained", f"{last['tokens']:,} in {last['step']:,} steps"))
    if (trunk := metrics[0]["step"] - 1) > 0:
        rows.append(("of these by its trunk", f"{trunk * last['tokens'] // last['step']:,} in {trunk:,} steps"))
    rows.append(("mean speed", f"{mean_tokens_per_second(metrics):,.0f} tokens/s"))
    rows += _regulation_rows(run_dir, metrics)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _regulation_rows(run_dir: Path, metrics: Metrics) -> list[tuple[str, str]]:
    config, rows = load_config(run_dir / "config.yaml"), []
    for regulator in regulators(parse_pattern(config.model.pattern)).values():
        for quantity in regulator.quantities(config):
            values = latest(metrics, quantity.key)
            if quantity.summary is not None and values is not None:
                name, text = quantity.summary
                rows.append((name, filled(text, values.tolist())))
    return rows


def _loss_rows(run_dir: Path, metrics: Metrics) -> list[tuple[str, str]]:
    validated = [line for line in metrics if line.get("validation_loss") is not None]
    if not validated:
        return [("training loss", f"{metrics[-1]['loss']:.4f} nats a token"), ("held-out loss", "not measured yet")]
    loss = validated[-1]["validation_loss"]
    rows = [("held-out loss", f"{loss:.4f} nats a token, at step {validated[-1]['step']:,}")]
    each = {key: nats for key, nats in validated[-1].items() if key.startswith("validation_loss_")}
    rows += [(f"  of {key.removeprefix('validation_loss_')}", f"{nats:.4f} nats a token") for key, nats in each.items()]
    try:
        tokens = held_out_tokens(run_dir)
    except (UserError, OSError) as error:  # a run directory that was copied away from its data
        return [*rows, ("unigram entropy", f"unknown without the data ({error})")]
    entropy = unigram_entropy(tokens)
    rows.append(("unigram entropy", f"{entropy:.4f} nats a token, of the same {tokens.size:,} tokens"))
    rows.append(("gained by context", f"{entropy - loss:.4f} nats a token"))
    return rows
