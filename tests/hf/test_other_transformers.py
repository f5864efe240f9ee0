"""The same exported folder under the installed transformers and under the newest 5.x, in an environment of its own."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from tests.hf import other_transformers
from tests.hf.test_kinds import round_trip

REQUIREMENT = "transformers>=5,<6"


@pytest.fixture(scope="session")
def other_python():
    """An interpreter with another transformers before everything that this one has."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megahybrid"
    version = f"py{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"
    folder = cache / f"transformers-5-{version}"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "-q", REQUIREMENT], check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        (folder / "complete").touch()
    return folder / "bin" / "python"


@pytest.mark.slow
def test_both_versions_give_the_same(prepared, other_python, tmp_path):
    exported = round_trip("GLSFN", tmp_path, prepared)
    (tmp_path / "other").mkdir()
    other = round_trip("F", tmp_path / "other", prepared)
    rows = torch.randint(0, 384, (3, 90), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(90) >= torch.tensor([0, 15, 84])[:, None]).long()
    save_file({"rows": rows, "mask": mask}, tmp_path / "inputs")
    command = [other_python, other_transformers.__file__, exported, tmp_path / "inputs", tmp_path / "outputs", other]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path)
    expected = other_transformers.outputs(exported, rows, mask)
    with safe_open(tmp_path / "outputs", "pt") as found:
        version = found.metadata()["transformers"]
        assert version.split(".")[0] == "5" != transformers.__version__.split(".")[0]
        for name, value in expected.items():
            if value.is_floating_point():
                real = mask.bool()
                assert torch.allclose(found.get_tensor(name)[real], value[real], rtol=0, atol=1e-12), name
            else:
                assert torch.equal(found.get_tensor(name), value), name
    real = mask.bool()
    assert torch.allclose(expected["steps"][real], expected["whole"][real], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_the_tests_of_this_version(other_python):
    """All but those that look into transformers 4 itself."""
    names = ("beside", "generation", "inference", "kinds", "modeling", "training")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
    subprocess.run([str(other_python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], check=True)
