"""What a config.json says becomes a recipe, and what it cannot say is refused in a sentence."""

import pytest

from megahybrid.config import load_config
from megahybrid.errors import UserError
from megahybrid.hf.naming import exported_config, imported_config
from tests.config.test_load import QUICKSTART


def test_a_model_comes_back():
    found = exported_config(load_config(QUICKSTART))
    assert exported_config(imported_config(found)) == found


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", "wide", "model.hidden_size"),
        ("layers", 5, "5"),
        ("max_position_embeddings", "far", "train.seq_length"),
        ("lte", {"window_size": "wide"}, "model.lte.window_size"),
        ("lte", {"windows": 5}, "windows"),
        ("tie_word_embeddings", "perhaps", "model.tie_embeddings"),
        ("norm_eps", None, "model.norm_eps"),
    ],
)
def test_values_of_another_type_are_refused(key, value, said):
    found = exported_config(load_config(QUICKSTART))
    found[key] = found[key] | value if isinstance(value, dict) else value
    with pytest.raises(UserError, match=said) as caught:
        imported_config(found)
    assert "\n" not in str(caught.value)
