"""A submission's copy of the code, and that it is what its job runs."""

import json
import os
import subprocess
import sys

import megahybrid
from megahybrid.cli import main
from megahybrid.launch import pinned
from tests.launch.conftest import ROOT
from tests.launch.test_submit import stub_slurm

SAYS_WHERE = """
import importlib.util, sys
import megahybrid
print(megahybrid.__file__)
print(importlib.util.find_spec("megahybrid_kernels").origin)
print(megahybrid.code_version())
sys.exit({code})
"""


def test_the_copy_is_the_code_with_its_version(tmp_path):
    """In a repository of another commit, too."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    pinned.pin(tmp_path / "code")
    for source in (ROOT / "megahybrid", ROOT / "kernels" / "megahybrid_kernels"):
        for file in source.rglob("*.py"):
            assert (tmp_path / "code" / file.relative_to(source.parent)).read_bytes() == file.read_bytes()
    code = "import megahybrid; print(megahybrid.__file__, megahybrid.code_version(), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "code"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    where, version = done.stdout.splitlines()
    assert where.startswith(str(tmp_path / "code")) and version == megahybrid.code_version()


def test_what_python_keeps_beside_its_code_stays_behind(tmp_path, monkeypatch):
    package = tmp_path / "megahybrid"
    (package / "inner" / "__pycache__").mkdir(parents=True)
    for name in ("__init__.py", "inner/data.json", "inner/__pycache__/x.cpython-311.pyc"):
        (package / name).write_text("")
    monkeypatch.setattr(megahybrid, "__file__", str(package / "__init__.py"))
    pinned.pin(tmp_path / "code")
    copy = tmp_path / "code" / "megahybrid"
    found = sorted(str(path.relative_to(copy)) for path in copy.rglob("*"))
    assert found == ["__init__.py", megahybrid.PINNED_VERSION, "inner", "inner/data.json"]


def test_a_job_runs_the_copy_whatever_else_python_would_find(recipe, tmp_path, monkeypatch):
    """Not what lies in the folder where it was submitted, nor in a PYTHONPATH of the profile."""
    stub_slurm(tmp_path, refused=9)
    for name, body in {"srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"', "scontrol": "echo n1"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    checkout = tmp_path / "checkout"  # what has become of it when the job begins
    for package in ("megahybrid", "megahybrid_kernels"):
        (checkout / package).mkdir(parents=True)
        (checkout / package / "__init__.py").write_text("raise SystemExit('the checkout is run')")
    profile = tmp_path / "profile.yaml"
    profile.write_text(f"environment: {json.dumps({'PYTHONPATH': str(checkout)})}\n")
    options = ["--gpus-per-node", "2", "--profile", str(profile)]
    assert main(["submit", str(recipe), *options, f"run.dir={tmp_path}/a run 100%"]) == 0
    (folder,) = (tmp_path / "a run 100%" / "submit").iterdir()
    facts = json.loads((folder / "job.json").read_text())
    for module, code in {"task": 0, "verdict": 75}.items():
        (folder / "code/megahybrid/launch" / f"{module}.py").write_text(SAYS_WHERE.format(code=code))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    done = subprocess.run(
        ["bash", folder / "job.sbatch"], env={**os.environ, **slurm}, cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    where = [str(folder / "code" / package / "__init__.py") for package in ("megahybrid", "megahybrid_kernels")]
    assert done.stdout.splitlines()[1:] == [*where, facts["code_version"]] * 2 + ["n1"]  # scontrol requeue


def test_no_checkout_has_the_version_of_a_copy():
    """It would be said in place of the commit, by every run of it."""
    tracked = subprocess.run(["git", "ls-files", "megahybrid"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"megahybrid/{megahybrid.PINNED_VERSION}" not in tracked.stdout.split()
