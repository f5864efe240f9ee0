"""What `bench_generate --export` measures: the exported form of a model in transformers, by `generate`."""

from __future__ import annotations

import statistics
import time

import torch
from prefill_steps import PASSES
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteria

from megahybrid.config.schema import Config
from megahybrid.hf.configuration_megahybrid import MegahybridConfig
from megahybrid.hf.modeling_megahybrid import MegahybridForCausalLM
from megahybrid.hf.naming import exported_config, exported_name
from megahybrid.model.stack import Stack

STEPS = 32
_GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def exported_form(model: Stack, config: Config) -> MegahybridForCausalLM:
    """The exported model on the weights of the training model, but for those that an export keeps in fp32."""
    with torch.device("meta"):
        exported = MegahybridForCausalLM(MegahybridConfig(**exported_config(config)))
    kept = exported._keep_in_fp32_modules_strict
    weights = {
        exported_name(name): weight.float() if name.rpartition(".")[2] in kept else weight
        for name, weight in model.named_parameters()
    }
    exported.load_state_dict(weights, strict=False, assign=True)
    exported.tie_weights()
    return exported.eval().requires_grad_(False)


class Clock(StoppingCriteria):
    """When each token was chosen; ends generation after `limit` seconds, but not before the third."""

    def __init__(self, limit: float):
        self.times: list[float] = []
        self._limit = limit

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        self.times.append(time.perf_counter())
        over = len(self.times) > 4 and self.times[-1] - self.times[0] > self._limit
        return torch.full((len(input_ids),), over, device=input_ids.device)


def prompts(model: GenerationMixin, count: int, context: int) -> Tensor:
    """int64 `[count, context]`, the same at every call."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(model.config.vocab_size, (count, context), generator=generator).to(model.device)


def read(model: GenerationMixin, context: int, batch: int, together: int, limit: float) -> dict:
    """`generate` of one token after prompts of `context` tokens, as many of `batch` at once as have `together` tokens;
    three times as far as `limit` seconds go, after once for compilation."""
    count, seconds = max(1, min(batch, together // context)), []
    tokens, began = prompts(model, count, context), time.perf_counter()
    while len(seconds) < 1 + PASSES and (len(seconds) < 2 or time.perf_counter() - began < limit):
        before = time.perf_counter()
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=1, **_GREEDY).tolist()
        seconds.append(time.perf_counter() - before)
    median = statistics.median(seconds[1:])
    result = {"tokens_per_second": round(count * context / median), "pass_ms": round(1e3 * median, 2)}
    return result | {"pass_sequences": count, "passes": len(seconds) - 1}


@torch.no_grad()
def write(model: GenerationMixin, context: int, batch: int, graph: bool, plain: dict, limit: float) -> dict:
    """Greedy steps of `generate` after one prompt, read once, that `batch` sequences share. `plain` hands the tokens
    without a graph on to the case with one."""
    prompt = prompts(model, 1, context)
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    cache.reorder_cache(torch.zeros(batch, dtype=torch.int64, device=prompt.device))
    first = torch.arange(batch, device=prompt.device)[:, None] % model.config.vocab_size
    tokens, clock = torch.cat([prompt.expand(batch, -1), first], 1), Clock(limit)
    # A model that somebody watches is not recorded.
    watch = None if graph else model.model.layers[0].register_forward_pre_hook(lambda *_: None)
    options = {"attention_mask": torch.ones_like(tokens), "past_key_values": cache}
    options |= {"max_new_tokens": STEPS, "stopping_criteria": [clock]}
    found = model.generate(tokens, **options, **_GREEDY)[:, context + 1 :].tolist()
    if watch is not None:
        watch.remove()
    seconds = [after - before for before, after in zip(clock.times[2:], clock.times[3:], strict=False)]
    ms = 1e3 * statistics.median(seconds)
    result = {"ms": round(ms, 4), "tokens_per_second": round(batch / ms * 1e3, 1), "steps": len(clock.times)}
    result["kernels"] = cache.inference is not None
    result["recorded"] = result["kernels"] and cache.inference.graph is not None
    if "tokens" in plain:
        result["same_tokens"] = all(
            one[: len(other)] == other[: len(one)] for one, other in zip(found, plain["tokens"], strict=True)
        )
    plain["tokens"] = found
    return result
