"""A recipe is read, checked and refused in a second: where torch cannot be imported, too."""

import subprocess
import sys
from pathlib import Path

from megahybrid.mixers.lte import LTEConfig
from megahybrid_kernels.retention_router import margin
from tools.workers import environment

RECIPES = Path(__file__).parents[2] / "recipes"
PROGRAM = """
import sys
for name in ("torch", "triton", "megatron", "deepspeed", "megahybrid_kernels"):
    sys.modules[name] = None  # its import fails
from megahybrid.config import load_config
from megahybrid.errors import UserError
for recipe in sys.argv[1:]:
    assert load_config(recipe).model.pattern
for wrong in ("model.lte.window_size=6", "model.attention.num_kv_heads=3", "model.pattern=(GX)*2", "parallel.tensor=3"):
    try:
        load_config(sys.argv[1], [wrong])
    except UserError as error:
        print(error)
"""


def test_recipes_are_read_and_refused_without_torch():
    recipes = sorted(map(str, RECIPES.glob("*.yaml")), key=lambda name: "quickstart" not in name)
    command = [sys.executable, "-c", PROGRAM, *recipes]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    margin, heads, letter, split = done.stdout.splitlines()
    assert "router's margin (6)" in margin and "must be a multiple" in heads
    assert "unknown letter 'X'; use G (Gated DeltaNet), L (LTE), S (sliding window), F (full att" in letter
    assert "does not divide" in split


def test_the_router_looks_as_far_as_its_op_says():
    for size, dilation in ((1, 1), (3, 2), (5, 3)):
        assert LTEConfig(conv_size=size, conv_dilation=dilation).margin == margin(size, dilation)
