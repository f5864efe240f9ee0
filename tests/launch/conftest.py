import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.training.conftest import brief, brief_recipe, brief_reference, prepared, recipe, reference, text  # noqa: F401

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def lab():
    """A real Slurm of four nodes; the folder of its files."""
    tool = ROOT / "tools" / "slurm_lab"
    installed = subprocess.run([sys.executable, tool, "install"], capture_output=True, text=True)
    if installed.returncode != 0:
        pytest.skip(f"no Slurm here: {installed.stderr.strip()}")
    allowed = subprocess.run(["unshare", "--uts", "--pid", "--mount", "--fork", "true"], capture_output=True, text=True)
    if allowed.returncode != 0:
        pytest.skip(f"no Slurm lab here: {allowed.stderr.strip()}")
    folder = Path(tempfile.mkdtemp(prefix="lab-", dir="/tmp"))
    started = subprocess.run([sys.executable, tool, "start", folder], capture_output=True, text=True)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        assert started.returncode == 0, started.stderr
        yield folder
    finally:
        subprocess.run([sys.executable, tool, "stop", folder], check=True)
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)
