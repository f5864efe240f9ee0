"""Launches of a layer of the exported model by the ops, counted without a GPU: as many as our own engine's."""

import pytest
import torch

import megahybrid.hf.inference_megahybrid as inference
import megahybrid.hf.layers_megahybrid as layers
from megahybrid.config import load_config
from megahybrid.hf.configuration_megahybrid import MegahybridConfig
from megahybrid.hf.modeling_megahybrid import MegahybridForCausalLM
from megahybrid.hf.naming import exported_config
from tests.doctor.launched import kernels_without_memory
from tests.inference.test_launches import TOKENS, Launches, launches_of

pytestmark = pytest.mark.usefixtures("process_group")


@torch.no_grad()
def launches_of_export(pattern):
    """Of a prompt's prefill, and of the second token after it, in a model that has read before."""
    config = load_config("recipes/lalte-1.4b.yaml", [f"model.pattern={pattern}"])
    with torch.device("meta"):
        model = MegahybridForCausalLM(MegahybridConfig(**exported_config(config))).to(torch.bfloat16).eval()
    cache, counted = None, []
    with kernels_without_memory():
        for count in (9, TOKENS, 1, 1):
            cache = None if count > 1 else cache
            tokens = torch.zeros(1, count, dtype=torch.int64, device="meta")
            with Launches() as launches:
                cache = model(tokens, past_key_values=cache, use_cache=True).past_key_values
            counted.append(launches.found)
    return [counted[1], counted[3]]


@pytest.mark.parametrize("letter", "GLN")
def test_as_many_as_our_own_engine(letter, monkeypatch):
    for module in (layers, inference):
        monkeypatch.setattr(module, "takes_kernels", lambda x: x.is_meta)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # which knows no meta device
    own, export = ([two - one for one, two in zip(count(letter), count(2 * letter), strict=True)]
                   for count in (launches_of, launches_of_export))  # fmt: skip
    # Its products do not make a single token's norms and SwiGLU themselves.
    apart = sum(count for kernel, count in own[1].items() if kernel.startswith("gemv"))
    for ours, theirs, more in zip(own, export, (0, apart), strict=True):
        assert theirs.total() == ours.total() + more, (theirs - ours, ours - theirs)
