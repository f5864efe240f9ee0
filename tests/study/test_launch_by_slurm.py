"""Launching a study through Slurm: an array a class of runs, with limits and in an order that works."""

import os
import shutil
import types
from pathlib import Path

import pytest

from megahybrid.study import launch as launching
from megahybrid.study.design import design
from tests.study.running import launch, leave

pytestmark = pytest.mark.usefixtures("small")

WHICH = shutil.which


@pytest.mark.parametrize(
    ("hours", "most", "limit"),
    [
        (0.1, "24:00:00", "1:00:00"),
        (0.7, "24:00:00", "2:00:00"),
        (5.0, "24:00:00", "8:00:00"),
        (20.0, "24:00:00", "24:00:00"),
        (20.0, "2-00:00:00", "32:00:00"),
        (0.1, "30", "30"),
        (0.1, "90", "1:00:00"),
        (0.1, "UNLIMITED", "1:00:00"),
        (float("inf"), "24:00:00", "24:00:00"),
    ],
)
def test_a_job_has_a_limit_of_the_time_that_it_needs(hours, most, limit):
    assert launching.time_limit(hours, most) == limit


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands: sbatch notes its options and gives the numbers 101, 102, …; squeue tells what queue.json has,
    by default what was submitted as pending."""
    bodies = {
        "squeue": "cat queue.json",
        "scancel": "true",
        "sbatch": """
[[ $1 == --test-only ]] && exit 0
script="${@: -1}"
echo "$(grep -oP '^#SBATCH --\\K(nodes|time|array)=.*' "$script" | paste -sd' ') ${*:2:$#-2}" >>sbatch.txt
number=$((100 + $(wc -l <sbatch.txt)))
comment=$(grep -o 'comment=.*' "$script" | cut -d= -f2)
sed -i 's/]}$/, {"job_id": '$number', "job_state": "PENDING", "comment": "'$comment'"}]}/; s/\\[, /[/' queue.json
echo $number""",
    }
    (tmp_path / "bin").mkdir()
    for name, body in bodies.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "queue.json").write_text('{"jobs": []}\n')
    (tmp_path / "cluster.yaml").write_text("gpus_per_node: 1\ntime: '12:00:00'\n")
    monkeypatch.setattr("megahybrid.launch.runs.shutil.which", WHICH)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("megahybrid.launch.pinned.pin", lambda folder: folder.mkdir(parents=True))
    return lambda: (tmp_path / "sbatch.txt").read_text().splitlines()


def test_slurm_gets_an_array_a_class_and_branches_after_their_trunk(make_study, slurm, fit, monkeypatch):
    cells = design(make_study("limits: {profile: cluster.yaml}"))
    hours = {"(G)*1": 0.1, "(G)*2": 3.0}
    monkeypatch.setattr(
        launching, "tabled_estimate", lambda config: types.SimpleNamespace(hours=hours[config.model.pattern])
    )
    assert launch() == 0
    trunks, branches = slurm()[:2], slurm()[2:]
    # Those of an hour, and those of eight; the four branches each wait for the element that is their trunk.
    assert sorted(trunks) == ["nodes=1 time=1:00:00 array=0-1 ", "nodes=1 time=8:00:00 array=0-1 "]
    one, eight = (101 + trunks.index(f"nodes=1 time={limit}:00:00 array=0-1 ") for limit in (1, 8))
    after = " --dependency=afterok:{} --kill-on-invalid-dep=yes"
    assert sorted(branches) == sorted(
        [f"nodes=1 time=1:00:00 array=0-1{after.format(f'{one}_{element}')}" for element in (0, 1)]
        + [f"nodes=1 time=8:00:00{after.format(f'{eight}_{element}')}" for element in (0, 1)]
    )
    # What waits is left alone; what has left the queue without a word is submitted again.
    assert launch() == 0 and len(slurm()) == 6
    Path("queue.json").write_text('{"jobs": []}\n')
    for cell in cells:
        if cell.size == "32x2" and not cell.held_out:
            leave(cell)
    assert launch() == 0
    assert sorted(line.split("=")[2][:4] for line in slurm()[6:]) == ["1:00", "1:00", "1:00"]
    # All but the held-out runs have ended: they are predicted, and go on from trunks that are there.
    monkeypatch.setattr("megahybrid.launch.submit.check_start", lambda *_: None)  # the checkpoints are made up
    Path("queue.json").write_text('{"jobs": []}\n')
    for cell in cells:
        if not cell.held_out:
            leave(cell)
    assert launch() == 0
    assert slurm()[9:] == ["nodes=1 time=8:00:00 array=0-1 "] and Path("studies/small/prediction.json").exists()


def test_a_launch_that_waits_submits_what_the_last_runs_allow(make_study, slurm, fit, monkeypatch, capsys):
    cells = design(make_study("kinds: {one: '(G)*{layers}'}", "limits: {profile: cluster.yaml}"))
    monkeypatch.setattr("megahybrid.launch.submit.check_start", lambda *_: None)

    def pass_time(seconds):
        for cell in cells:
            if not cell.held_out or Path("studies/small/prediction.json").exists():
                leave(cell)
        Path("queue.json").write_text('{"jobs": []}\n')

    monkeypatch.setattr(launching, "time", types.SimpleNamespace(sleep=pass_time))
    assert launch("--wait") == 0
    assert slurm()[-1] == "nodes=1 time=1:00:00 " and "100.0%" in capsys.readouterr().out.splitlines()[-1]
