"""What a model card says of training."""

import json

from megahybrid.config import load_config
from megahybrid.hf.card import model_card


def test_a_card_names_the_parts_of_a_mixture(reference, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step_00000020"
    folder.mkdir(parents=True)
    line = {"step": 20, "loss": 3.0, "validation_loss": 2.5, "validation_loss_code": 2.0, "validation_loss_a_b": 3.25}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    mixed = [
        f"data.sources.{name}={{path: x, weight: {weight}}}" for name, weight in (("code", 2), ("a_b", 1), ("c", 0))
    ]
    config = load_config(reference / "config.yaml", [*mixed, "data.sources.python.weight=1"])
    facts = json.loads((reference / "checkpoints" / "step_00000020" / "checkpoint.json").read_text())
    card = model_card("name", config, facts, folder, None, [])
    assert f"| data | python 25.0%, code 50.0%, a_b 25.0%; identity {facts['position']['data']} |" in card
    rows = ["| validation loss | 2.5000 nats a token |", "| validation loss of code | 2.0000 nats a token |"]
    assert all(row in card for row in [*rows, "| validation loss of a_b | 3.2500 nats a token |"])
