"""tools/env with stand-ins for an interpreter and for pip: what is made, reused, and made again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Records what it is asked for; `-m venv DIR` makes an environment whose python is this file, `-m pip` fails on demand.
PYTHON = f"""#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo : >"$3/bin/activate" ;;
"-m pip") echo "$@" >>"$FAKE_LOG"; exit "${{FAKE_PIP_STATUS:-0}}" ;;
*) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A folder with what tools/env reads, and a function that runs it there."""
    root = tmp_path / "clone"
    (root / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools/env", root / "tools/env")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    surroundings = os.environ | {
        "PYTHON": str(python),
        "MEGAHYBRID_ENVS": str(tmp_path / "envs"),
        "FAKE_LOG": str(tmp_path / "pip.log"),
    }

    def env(*command: str, **more: str) -> subprocess.CompletedProcess:
        command = command or ("tools/env",)
        return subprocess.run(command, cwd=root, env=surroundings | more, capture_output=True, text=True, timeout=60)

    return root, env, tmp_path / "pip.log"


def installs(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_made_once_with_all_requirements_in_one_call(clone):
    _, env, log = clone
    first, second = env(), env()
    assert first.returncode == second.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert installs(log) == 1
    assert {"torch>=2.11", "torchvision", "pytest>=8", "deepspeed>=0.19.8"} <= set(log.read_text().split())
    assert len(second.stderr.splitlines()) == 1


def test_the_name_follows_constraints_and_requirements_but_not_the_rest_of_pyproject(clone):
    root, env, _ = clone
    folders = [env().stdout]
    (root / "pyproject.toml").write_text((root / "pyproject.toml").read_text() + "\n[tool.other]\nx = 1\n")
    assert env().stdout == folders[0]
    for name, old, new in (
        ("constraints.txt", "numpy==2.1.3", "numpy==2.1.2"),
        ("pyproject.toml", "rich>=13", "rich>=12"),
    ):
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))
        folders.append(env().stdout)
    assert len(set(folders)) == 3


def test_a_failed_install_is_told_and_made_again(clone):
    _, env, log = clone
    failed = env(FAKE_PIP_STATUS="1")
    assert failed.returncode != 0
    assert failed.stdout == ""
    assert "the whole log is" in failed.stderr
    assert env().returncode == 0
    assert installs(log) == 2


def test_sourcing_sets_the_path_and_survives_a_failure(clone):
    root, env, _ = clone
    sourced = env("bash", "-c", 'source tools/env; echo "$PYTHONPATH"')
    assert sourced.stdout.strip() == f"{root}:{root}/kernels"
    lives = env("bash", "-c", "source tools/env || echo still here", PYTHON="no-such-python")
    assert lives.stdout.strip() == "still here"
    assert "is not Python 3.11 or newer" in lives.stderr


def test_two_at_once_install_once(clone):
    _, env, log = clone
    both = env("bash", "-c", "tools/env & tools/env; wait")
    assert both.returncode == 0, both.stderr
    assert installs(log) == 1
    assert len(set(both.stdout.split())) == 1
