"""The model card of an exported checkpoint: what it is, how to use it, and the facts of its training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megahybrid.config.schema import Config
from megahybrid.config.task_sources import bare_tokens
from megahybrid.mixers import KINDS
from megahybrid.model.settings import Settings
from megahybrid.training.metrics_file import lines_backwards
from megahybrid.training.run_directory import RunDirectory

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [megahybrid]
---

# {name}

A language model of {count:,} parameters, pretrained with megahybrid. Its layers, `{letters}`: {legend}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

| training | |
| --- | --- |
{facts}
"""


def model_card(name: str, config: Config, facts: dict[str, Any], checkpoint: Path) -> str:
    """README.md of the checkpoint in folder `checkpoint` with this configuration and checkpoint.json."""
    letters = Settings.of(config).pattern.letters
    rows = {"version of megahybrid": facts["megahybrid"], **_training_facts(config, facts, checkpoint)}
    return _CARD.format(
        name=name,
        count=sum(math.prod(each["shape"]) for each in facts["parameters"].values()),
        letters=letters,
        legend=", ".join(f"{letter} is {KINDS[letter].title}" for letter in sorted(set(letters))),
        prompt="17 4 9" if bare_tokens(config) else "Once upon a time",
        facts="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
    )


def _training_facts(config: Config, facts: dict[str, Any], checkpoint: Path) -> dict[str, str]:
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
    }
    for line in _until(step, RunDirectory(checkpoint.parent.parent).metrics):
        rows.setdefault("training loss", f"{line['loss']:.4f} nats a token")
        if line.get("validation_loss") is not None:
            rows["validation loss"] = f"{line['validation_loss']:.4f} nats a token"
            break
    return rows


def _until(step: int, metrics: Path) -> Iterator[dict[str, Any]]:
    """The lines up to `step`, the last one first; none of a checkpoint that was copied out of its run directory."""
    with contextlib.suppress(OSError):
        yield from (line for line in lines_backwards(metrics) if line["step"] <= step)
