"""What the command line itself refuses."""

from pathlib import Path

import pytest

from megahybrid.cli import main

QUICKSTART = str(Path(__file__).parents[1] / "recipes" / "quickstart.yaml")


@pytest.mark.parametrize("count", ["0", "-3"])
def test_a_plan_wants_gpus(count, capsys):
    assert main(["plan", QUICKSTART, "--gpus", count]) == 2
    assert capsys.readouterr().err == "megahybrid: --gpus must be at least 1.\n"
