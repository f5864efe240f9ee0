import os
import tempfile

# Before transformers is imported: where it puts its copies of model files.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="megahybrid-hf-")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from megahybrid.cli import main
from megahybrid.config.schema import ParallelConfig
from megahybrid.parallel import groups
from tests.training.conftest import prepared, recipe, reference, text

__all__ = ["prepared", "recipe", "reference", "text"]


@pytest.fixture(scope="module")
def process_group():
    """A process group of one, which Megatron-core's layers need."""
    groups.initialize(ParallelConfig())
    yield
    groups.shut_down()


@pytest.fixture(scope="session")
def exported(tmp_path_factory, reference):
    """A trained run in Hugging Face format, fp32, in several shards."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert main(["export", str(reference), str(folder), "--dtype", "fp32", "--shard-size", "100KB", "--verify"]) == 0
    return folder
