"""What the command line itself refuses."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megahybrid import code_version
from megahybrid.cli import _parser, main

QUICKSTART = str(Path(__file__).parents[1] / "recipes" / "quickstart.yaml")


def test_a_change_with_dashes_is_told_how_to_write_it(capsys):
    with pytest.raises(SystemExit):
        main(["train", QUICKSTART, "--train.steps=3", "optimizer.eps=1e-8"])
    assert "changes to the recipe have no dashes: train.steps=3\n" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", QUICKSTART, "--gpu", "3", "--fast"])
    assert capsys.readouterr().err.endswith("unrecognized arguments: --fast (see megahybrid plan --help)\n")


@pytest.mark.parametrize("count", ["0", "-3"])
def test_a_plan_wants_gpus(count, capsys):
    assert main(["plan", QUICKSTART, "--gpus", count]) == 2
    assert capsys.readouterr().err == "megahybrid: --gpus must be at least 1.\n"


def test_the_help_of_every_verb_says_what_it_does():
    (verbs,) = [each for each in _parser()._actions if isinstance(each, argparse._SubParsersAction)]
    assert len(verbs._choices_actions) == len(verbs.choices) > 10
    for each in verbs._choices_actions:
        assert verbs.choices[each.dest].description == each.help


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"megahybrid {code_version()}\n"


@pytest.mark.parametrize("verb", [["keys"], ["keys", "train.steps"]])
def test_a_reader_that_goes_away_is_no_fault(verb):
    """`| head`: nothing is said, also where all that is printed fits into a buffer."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "megahybrid", *verb], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == 141 and "Broken" not in done.stderr and "Error" not in done.stderr
