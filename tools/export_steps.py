"""What `bench_generate --export` measures: the exported form of a model in transformers, by `generate`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from prefill_steps import PASSES, read_prompts, sequences_at_once
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
    """Seconds of each step of generation, and of a call of `beside` after each: in turns, so that a busy host slows
    both alike. Ends generation after `limit` seconds, but not before the sixth step."""

    def __init__(self, limit: float, beside: Callable[[], object]):
        self.seconds: list[float] = []
        self.seconds_beside: list[float] = []
        self._limit, self._beside = limit, beside
        self._began = self._since = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        input_ids[:, -1].tolist()  # the step is over when the host has its tokens
        after = time.perf_counter()
        self.seconds.append(after - self._since)
        self._beside()
        self._since = time.perf_counter()
        self.seconds_beside.append(self._since - after)
        over = len(self.seconds) > 5 and self._since - self._began > self._limit
        return torch.full((len(input_ids),), over, device=input_ids.device)


def prompts(model: GenerationMixin, count: int, context: int) -> Tensor:
    """int64 `[count, context]`, the same at every call."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(model.config.vocab_size, (count, context), generator=generator).to(model.device)


def read(model: GenerationMixin, own: Stack, context: int, batch: int, together: int, limit: float) -> dict:
    """`generate` of one token after prompts of `context` tokens, as many of `batch` at once as have `together` tokens,
    in turns with our `own` engine's prefill of as many: `PASSES` times as far as `limit` seconds go and three times at
    least, after once for compilation."""
    count = sequences_at_once(context, batch, together)
    tokens, began, seconds, engine_seconds = prompts(model, count, context), time.perf_counter(), [], []
    while len(seconds) < 1 + PASSES and (len(seconds) < 4 or time.perf_counter() - began < limit):
        before = time.perf_counter()
        read_prompts(own, context, count, context)
        between = time.perf_counter()
        model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=1, **_GREEDY).tolist()
        engine_seconds.append(between - before)
        seconds.append(time.perf_counter() - between)
    median, engine = (statistics.median(each[1:]) for each in (seconds, engine_seconds))
    result = {"tokens_per_second": round(count * context / median), "pass_ms": round(1e3 * median, 2)}
    result |= {"engine_ms": round(1e3 * engine, 2), "by_engine": round(engine / median, 3)}
    return result | {"pass_sequences": count, "passes": len(seconds) - 1}


@torch.no_grad()
def write(
    model: GenerationMixin,
    context: int,
    batch: int,
    graph: bool,
    engine: Callable[[], Callable[[], object]],
    plain: dict,
    limit: float,
) -> dict:
    """Greedy steps of `generate` after one prompt, read once, that `batch` sequences share, in turns with those of our
    own engine, which `engine` makes. `plain` hands the tokens without a graph on to the case with one."""
    prompt = prompts(model, 1, context)
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    cache.reorder_cache(torch.zeros(batch, dtype=torch.int64, device=prompt.device))
    first = torch.arange(batch, device=prompt.device)[:, None] % model.config.vocab_size
    tokens, clock = torch.cat([prompt.expand(batch, -1), first], 1), Clock(limit, engine())
    # A model that somebody watches is not recorded.
    watch = None if graph else model.model.layers[0].register_forward_pre_hook(lambda *_: None)
    options = {"attention_mask": torch.ones_like(tokens), "past_key_values": cache}
    options |= {"max_new_tokens": STEPS, "stopping_criteria": [clock]}
    found = model.generate(tokens, **options, **_GREEDY)[:, context + 1 :].tolist()
    if watch is not None:
        watch.remove()
    ms, engine_ms = (1e3 * statistics.median(each[3:]) for each in (clock.seconds, clock.seconds_beside))
    result = {"ms": round(ms, 4), "tokens_per_second": round(batch / ms * 1e3, 1), "steps": len(clock.seconds)}
    result |= {"engine_ms": round(engine_ms, 4), "by_engine": round(engine_ms / ms, 3)}
    result["kernels"] = cache.inference is not None
    result["recorded"] = result["kernels"] and cache.inference.graph is not None
    if "tokens" in plain:
        result["same_tokens"] = all(
            one[: len(other)] == other[: len(one)] for one, other in zip(found, plain["tokens"], strict=True)
        )
    plain["tokens"] = found
    return result
