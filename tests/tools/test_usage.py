"""Every tool in Python starts and says how it is used; what the slow tests of this folder run is more."""

import os
import subprocess
from pathlib import Path

import pytest

from tools.workers import environment, python

ROOT = Path(__file__).parents[2]
TOOLS = [path for path in sorted((ROOT / "tools").iterdir()) if path.is_file() and os.access(path, os.X_OK)]
IN_PYTHON = [path for path in TOOLS if path.read_text().startswith("#!/usr/bin/env python3\n")]


def run(tool, folder, option):
    command = [python(), str(tool), option]
    return subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("tool", IN_PYTHON, ids=lambda path: path.name)
def test_it_starts(tool, tmp_path):
    done = run(tool, tmp_path, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {tool.name} ") and len(done.stdout.splitlines()) > 5
    done = run(tool, tmp_path, "--no-such-option")
    assert done.returncode == 2 and done.stderr.startswith(f"usage: {tool.name} "), done.stderr
