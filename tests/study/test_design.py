"""From a study file to its runs."""

from pathlib import Path

import pytest

from megahybrid.scaling.flops import flops_per_token
from megahybrid.study.design import design
from megahybrid.study.file import load_study

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
FILE = """
study: small
base: {base}
kinds: {{transformer: "(F)*{{layers}}", lalte: {{pattern: "(GL)*{{layers/2}}"}}}}
sizes: [{{width: 64, layers: 2}}, {{width: 96, layers: 4}}]
overrides: {{model.intermediate_size: "{{3*width}}", model.attention.num_heads: "{{width/32}}", model.gdn.num_heads: 2}}
budgets: {{flops: [2.0e12, 4.0e12, 8.0e12]}}
schedule: {{warmup_tokens: 2.0e4}}
"""


@pytest.fixture
def study(tmp_path):
    """A study by its file, with lines that replace the file's of the same key."""

    def make(*lines: str):
        kept = [line for line in FILE.format(base=QUICKSTART).splitlines() if line]
        for line in lines:
            kept = [each for each in kept if each.split(":")[0] != line.split(":")[0]] + [line]
        path = tmp_path / "study.yaml"
        path.write_text("\n".join(kept))
        return load_study(path)

    return make


def cells_of(study, **keywords):
    return design(study, needs_data=False, **keywords)


def test_flops_are_those_asked_for_by_the_models_own_count(study):
    cells = cells_of(study())
    assert len(cells) == 2 * 2 * 3
    for cell in cells:
        train = cell.config.train
        flops = train.steps * train.global_batch_size * train.seq_length * flops_per_token(cell.config).training
        assert flops == cell.flops == pytest.approx(cell.budget, rel=0.01)
        assert cell.asked == pytest.approx(cell.budget)
