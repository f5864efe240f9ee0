"""Whether a step's passes become a CUDA graph."""

from pathlib import Path

import pytest

from megahybrid.config import load_config
from megahybrid.config.recording import replayed, unrecorded

RECIPES = Path(__file__).parents[2] / "recipes"
ASKED = "train.cuda_graph=true"


@pytest.mark.parametrize(
    ("recipe", "keys", "processes", "why"),
    [
        ("recall", [], 1, None),
        ("recall", [], 2, "one process"),
        ("recall", ["parallel.zero_stage=2"], 1, None),
        ("recall", ["parallel.zero_stage=3"], 1, "ZeRO-3"),
        ("quickstart", [], 1, "data.sources."),
        ("quickstart", ["data.document_masking=false"], 1, None),
        ("quickstart", ["data.document_masking=false"], 4, "one process"),
        ("recall/text", [], 1, None),
        ("recall/text", ["data.document_masking=true"], 1, "documents of data.sources.linux"),
        ("recall/text", ["data.document_masking=true", "data.sources.linux.weight=0"], 1, None),
    ],
)
def test_what_is_recorded(recipe, keys, processes, why):
    config = load_config(RECIPES / f"{recipe}.yaml", [ASKED, *keys])
    said = unrecorded(config, processes)
    assert (said is None) == (why is None) == replayed(config, processes)
    assert why is None or why in said
    config.train.cuda_graph = False
    assert not replayed(config, processes)
