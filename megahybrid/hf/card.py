"""The model card of an exported checkpoint: what it is, how to use it, how it was trained, what it recalls."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from megahybrid.config.schema import Config
from megahybrid.config.task_sources import bare_tokens
from megahybrid.files import read_json
from megahybrid.mixers import KINDS
from megahybrid.mixers.kind import LEARNED
from megahybrid.model.settings import Settings
from megahybrid.training import checkpoint, checkpoint_folder
from megahybrid.training.metrics_file import lines_backwards
from megahybrid.training.run_directory import RunDirectory

_CARD = """---
{metadata}---

# {name}

A language model of {count:,} parameters, pretrained with megahybrid. Its layers, `{letters}`: {legend}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{place}", trust_remote_code=True)
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

| training | |
| --- | --- |
{facts}
"""
_RECALL = """
| recall | tokens | answers | accuracy | 95 % interval | beyond the window | recency null |
| --- | ---: | ---: | ---: | --- | ---: | ---: |
{rows}

Of samples made by `megahybrid eval`. The null is what a window alone would score.
"""

Results = Sequence[dict[str, Any]]


def model_card(
    name: str, config: Config, facts: dict[str, Any], folder: Path, license_: str | None, results: Results
) -> str:
    """README.md of the checkpoint in this folder with this configuration and checkpoint.json.

    name: the folder's, or the repository's as USER/NAME. results: as of `evaluated`.
    """
    letters = Settings.of(config).pattern.letters
    rows = {"version of megahybrid": facts["megahybrid"], **_training_facts(config, facts, folder)}
    card = _CARD.format(
        metadata=yaml.safe_dump(_metadata(name, license_, results), sort_keys=False),
        name=name.rpartition("/")[2],
        place=name if "/" in name else "FOLDER",
        count=sum(math.prod(each["shape"]) for each in facts["parameters"].values()),
        letters=letters,
        legend=", ".join(f"{letter} is {KINDS[letter].title}" for letter in sorted(set(letters))),
        prompt="17 4 9" if bare_tokens(config) else "Once upon a time",
        facts="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
    )
    return card + _RECALL.format(rows="\n".join(map(_row, results))) if results else card


def evaluated(folder: Path, facts: dict[str, Any], report: Callable[[str], None]) -> Results:
    """What `megahybrid eval` has found of the checkpoint in this folder, with what the model has learnt itself.

    Results of other weights lie at the same place where checkpoints of the same step have stood in one folder.
    """
    step = checkpoint_folder.name(facts["position"]["step"])
    for home in (folder.parent.parent, folder.parent):  # a run directory, or where a checkpoint was copied to
        file = home / "evaluations" / step / "results.json"
        if not (found := read_json(file)):
            continue
        if found["model"]["weights"] == checkpoint.weights_name(facts):
            return [each for each in found["results"] if each["policy"] == LEARNED and each["n"]]
        report(f"The model card leaves out '{file}', which is of other weights.")
    return []


def _metadata(name: str, license_: str | None, results: Results) -> dict[str, Any]:
    """What the hub reads, https://huggingface.co/docs/hub/model-cards."""
    metadata = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["megahybrid"]}
    if license_ is not None:
        metadata["license"] = license_
    if results:
        found = [
            {
                "task": {"type": "text-generation"},
                "dataset": {"type": each["task"], "name": f"{each['task']}, {each['length']} tokens"},
                "metrics": [{"type": "accuracy", "name": f"accuracy ({each['mode']})", "value": each["accuracy"]}],
            }
            for each in results
        ]
        metadata["model-index"] = [{"name": name.rpartition("/")[2], "results": found}]
    return metadata


def _row(entry: dict[str, Any]) -> str:
    low, high = entry["interval"]
    share = [entry["accuracy"], low, high, entry["beyond"]["accuracy"], entry["recency_null"]]
    accuracy, low, high, beyond, null = ("-" if each is None else f"{100 * each:.1f}" for each in share)
    return (
        f"| {entry['task']} ({entry['mode']}) | {entry['length']:,} | {entry['n']:,} | {accuracy} | {low} to {high} | "
        f"{beyond} | {null} |"
    )


def _training_facts(config: Config, facts: dict[str, Any], folder: Path) -> dict[str, str]:
    step = facts["position"]["step"]
    if step == 0:
        return {"steps": "none since its weights were imported"}
    tokens = step * config.train.global_batch_size * config.train.seq_length
    rows = {
        "steps": f"{step:,} of {config.train.steps:,}",
        "tokens": f"{tokens:,}",
        "tokens a sequence": f"{config.train.seq_length:,}",
        "tokens a step": f"{config.train.global_batch_size * config.train.seq_length:,}",
        "peak learning rate": f"{config.optimizer.learning_rate:g} ({config.optimizer.schedule})",
        "precision": config.train.dtype,
        "data": f"{_sources(config)}; identity {facts['position']['data']}",
    }
    for line in _until(step, RunDirectory(folder.parent.parent).metrics):
        rows.setdefault("training loss", f"{line['loss']:.4f} nats a token")
        if line.get("validation_loss") is not None:
            found = {key: nats for key, nats in line.items() if key.startswith("validation_loss")}
            of = {key: key.removeprefix("validation_loss").replace("_", " of ", 1) for key in found}
            rows |= {f"validation loss{of[key]}": f"{nats:.4f} nats a token" for key, nats in found.items()}
            break
    return rows


def _sources(config: Config) -> str:
    """Their names and parts of the samples; a branch's are those of its own steps."""
    weights = {name: source.weight for name, source in config.data.sources.items()}
    if None in weights.values():
        return f"{', '.join(weights)}, by size"
    used = {name: weight for name, weight in weights.items() if weight}
    return ", ".join(f"{name} {weight / sum(used.values()):.1%}" for name, weight in used.items())


def _until(step: int, metrics: Path) -> Iterator[dict[str, Any]]:
    """The lines up to `step`, the last one first; none of a checkpoint that was copied out of its run directory."""
    with contextlib.suppress(OSError):
        yield from (line for line in lines_backwards(metrics) if line["step"] <= step)
