"""The check that a conversion kept the model: the training model's logits beside the exported model's, on real text.

Both compute in float64, where two right implementations agree to about 1e-10, so that a difference is an error and not
rounding, and no keep decision falls differently.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from megahybrid.config import Config
from megahybrid.config.schema import ParallelConfig
from megahybrid.data.tokenizer import Tokenizer
from megahybrid.devices import free_memory
from megahybrid.errors import UserError
from megahybrid.hf.configuration_megahybrid import MegahybridConfig
from megahybrid.hf.modeling_megahybrid import MegahybridForCausalLM
from megahybrid.hf.naming import exported_config, exported_name, imported_config
from megahybrid.mixers import KINDS
from megahybrid.model.context import Context
from megahybrid.model.mixer import Mixer
from megahybrid.model.settings import Settings
from megahybrid.model.stack import Stack
from megahybrid.parallel import groups
from megahybrid.scaling.parameters import parameter_specs
from megahybrid.training import checkpoint
from megahybrid_kernels import Sequences

Report = Callable[[str], None]

TOLERANCE = 1e-9
FEWEST_TOKENS = 256
STEPS = 16
_MORE_TOKENS = 128 + STEPS // 2
"""Beyond those after which layers choose what a query sees: with blocks of 16, 32 and 64 tokens a step ends one."""

TEXT = """A recurrent layer reads a text from left to right and keeps what it has read in a state of fixed size. What
does not fit is lost. An attention layer keeps every word, and pays for it: the more it has read, the longer it takes to
read on. A hybrid model has layers of both kinds. On a winter morning in 1896 the physicist Henri Becquerel left a
wrapped photographic plate in a drawer, under a dish of uranium salt, because the sky over Paris was too grey for his
experiment. When he developed it some days later he found the outline of the dish on it. "The rays," he wrote, "do not
come from the sun." Who left the plate in the drawer? How many days did it lie there? def mean(values):
    return sum(values) / len(values)
"""


def wanted(config: Config, check: bool | None, report: Report) -> bool:
    """Whether to verify: as asked for, or where both models fit into host memory."""
    if check is not None:
        return check
    size = sum(math.prod(spec.shape) for spec in parameter_specs(config).values())
    settings, width = Settings.of(config), torch.float64.itemsize
    # Two models in float64, one of which was float32 at first; two sets of logits, one of which is put together.
    needed = size * (2 * width + torch.float32.itemsize) + 3 * width * _length(settings) * settings.model.vocab_size
    available = free_memory(torch.device("cpu"))
    if needed > available:
        report(
            f"Not verified: it needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} are free (--verify tries)."
        )
    return needed <= available


def trained_model(folder: Path, config: Config, types: Mapping[str, torch.dtype] | None = None) -> Stack:
    """The training model of a checkpoint in float64 on the CPU, weights rounded to these types where they are given."""
    if not groups.joined():
        groups.initialize(ParallelConfig())
    model = Stack(replace(config, parallel=ParallelConfig())).double().requires_grad_(False)
    checkpoint.load_weights(folder, model)
    for name, dtype in (types or {}).items():
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.to(dtype))
    return model


def exported_model(description: dict[str, Any], files: Iterable[Path]) -> MegahybridForCausalLM:
    """The model of an exported config.json and its safetensors files, in float64 on the CPU.

    from_pretrained is not for a stranger's folder: some keys of config.json have it load code from the hub, and an
    adapter's file other weights.

    Raises UserError for a tensor that the model has no place for, that has another shape, or that is missing or there
    twice.
    """
    config = exported_config(imported_config(description))
    with torch.device("meta"):
        model = MegahybridForCausalLM(MegahybridConfig(**config))
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for file in files:
        for name, weight in load_file(file).items():
            if list(weight.shape) != shapes.get(name) or name in weights:
                expected = "it is there twice" if name in weights else f"the model has {shapes.get(name, 'no such')}"
                raise UserError(
                    f"'{file.name}' holds {name} {list(weight.shape)}, but {expected}, so nothing was written; export "
                    "or download the model again, and report it if that fails, too."
                )
            weights[name] = weight.double()
    if config["tie_word_embeddings"] and (embedding := exported_name("embedding.weight")) in weights:
        weights[exported_name("output.weight")] = weights[embedding]
    if missing := shapes.keys() - weights.keys():
        raise UserError(
            f"The exported model's files lack {min(missing)}, so nothing was written; export or download it again, and "
            "report it if that fails, too."
        )
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()


def converted_model(trained: Stack, config: Config) -> MegahybridForCausalLM:
    """The exported form of a training model, where no exported folder exists."""
    model = MegahybridForCausalLM(MegahybridConfig(**exported_config(config))).double().eval()
    weights = {exported_name(name): weight for name, weight in trained.named_parameters()}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model


@torch.no_grad()
def verify(
    trained: Stack, exported: MegahybridForCausalLM, config: Config, tokenizer: Tokenizer | None, report: Report
) -> None:
    """Compare both forms of a model with this configuration on TEXT, or random tokens; weights may change.

    At the model's own sizes a text of this length may reach no limit: then once more with close ones, and with routers
    that keep about half. There a limit that, moved by one, leaves the training model's logits as they were is refused:
    of it there was nothing to compare, as where the weights behind its layers are zero. Last the weights themselves, of
    which logits do not show an embedding that the text does not need.

    Raises UserError for sizes or weights that differ, logits that differ by more than TOLERANCE, and limits unseen.
    """
    _require_same_sizes(exported, config)
    written = tokenizer is not None and not tokenizer.of_numbers
    if written:
        read = [tokenizer.document_id, *tokenizer.encode(TEXT)]
    else:
        read = random.Random(0).choices(range(config.model.vocab_size), k=FEWEST_TOKENS)
    expected = _compare(trained, exported, read, "", report)
    if written:
        loss = float(F.cross_entropy(expected[:-1][: len(read) - 1], torch.tensor(read[1 : len(expected)])))
        report(f"{loss:.3f} nats a token of text")
    if limits := _close_limits(config):
        _compare_closely(trained, exported, config, limits, read, report)
    _require_same_weights(trained, exported)


def _compare_closely(
    trained: Stack,
    exported: MegahybridForCausalLM,
    config: Config,
    limits: dict[str, dict[str, int]],
    read: list[int],
    report: Report,
) -> None:
    """With these limits in place of the model's own, which both models leave with weights that are shifted alike."""
    near = _limited(config, limits)
    trained, exported = _resized(trained, near), _resized_export(exported, near)
    _balance(trained, exported, read)
    expected = _compare(trained, exported, read, f" with {_told(limits)}", report)
    tokens = _tokens(read, trained.settings)
    for section, key in ((section, key) for section, values in limits.items() for key in values):
        moved = _limited(config, limits | {section: limits[section] | {key: limits[section][key] + 1}})
        if float((_logits(_resized(trained, moved), tokens) - expected).abs().max()) <= TOLERANCE:
            raise UserError(
                f"It cannot be verified that model.{section}.{key} is kept to, since with one more no logit of this "
                "model changes, so nothing was written; --no-verify converts it as it is."
            )


def _compare(trained: Stack, exported: nn.Module, read: list[int], how: str, report: Report) -> Tensor:
    """The training model's logits, to which those of the exported one, and of both step by step, are compared."""
    tokens = _tokens(read, trained.settings)
    expected = _logits(trained, tokens)
    ways = (
        lambda: exported(tokens[None], use_cache=False).logits[0],
        lambda: _stepwise_exported(exported, tokens),
        lambda: _stepwise_trained(trained, tokens),
    )
    worst, mean = 0.0, 0.0
    for logits in ways:
        difference = logits().sub_(expected).abs_()
        worst = max(worst, float(difference.max()) if difference.isfinite().all() else math.inf)
        mean += float(difference.mean()) / len(ways)
    report(
        f"Logits of {len(tokens):,} tokens{how}, whole and step by step: worst difference {worst:.1e}, mean {mean:.1e}"
    )
    if not worst <= TOLERANCE:
        raise UserError(
            f"The converted model's logits{how} differ by up to {worst:.1e}, more than {TOLERANCE:.0e}, so nothing was "
            "written; please report it with the configuration."
        )
    return expected


def _require_same_sizes(exported: MegahybridForCausalLM, config: Config) -> None:
    for key, value in exported_config(config).items():
        if (found := getattr(exported.config, key, None)) != value:
            raise UserError(
                f"The converted model's config.json has {key} = {found} where the model has {value}, so nothing was "
                "written; please report it with the configuration."
            )


def _require_same_weights(trained: Stack, exported: MegahybridForCausalLM) -> None:
    for name, weight in trained.named_parameters():
        if not torch.equal(exported.get_parameter(exported_name(name)), weight):
            raise UserError(
                f"The converted model's {exported_name(name)} is not what the model has, so nothing was written; "
                "convert it again, and look after the disk and the memory if that fails, too."
            )


def _close_limits(config: Config) -> dict[str, dict[str, int]]:
    """Those of all its kinds of layers, by section and key."""
    settings = Settings.of(config)
    return {
        section: values
        for letter in sorted(set(settings.pattern.letters))
        for section, values in KINDS[letter].close_limits(settings.model).items()
    }


def _told(limits: dict[str, dict[str, int]]) -> str:
    return ", ".join(f"{section}.{key} = {value}" for section, keys in limits.items() for key, value in keys.items())


def _limited(config: Config, limits: dict[str, dict[str, int]]) -> Config:
    sections = {section: replace(getattr(config.model, section), **values) for section, values in limits.items()}
    return replace(config, model=replace(config.model, **sections))


def _resized(trained: Stack, config: Config) -> Stack:
    """A training model with these sizes and the same parameters, which are not copied."""
    with torch.device("meta"):
        model = Stack(replace(config, parallel=ParallelConfig()))
    model.load_state_dict(trained.state_dict(keep_vars=True), assign=True)
    return model


def _resized_export(exported: MegahybridForCausalLM, config: Config) -> MegahybridForCausalLM:
    """Likewise an exported one."""
    with torch.device("meta"):
        model = MegahybridForCausalLM(MegahybridConfig(**exported_config(config)))
    model.load_state_dict(exported.state_dict(keep_vars=True), assign=True)
    return model.eval()


def _balance(trained: Stack, exported: nn.Module, read: list[int]) -> None:
    """Balance what every layer keeps of the tokens, in both models by the same shifts: what differs stays different."""

    def balance(mixer: Mixer, inputs: tuple[Any, ...]) -> None:
        for name, shift in mixer.balance(*inputs[:2]).items():
            name = f"layers.{mixer.layer}.mixer.{name}"
            trained.get_parameter(name).add_(shift)
            exported.get_parameter(exported_name(name)).add_(shift)

    hooks = [block.mixer.register_forward_pre_hook(balance) for block in trained.layers.values()]
    _logits(trained, _tokens(read, trained.settings))
    for hook in hooks:
        hook.remove()


def _tokens(read: list[int], settings: Settings) -> Tensor:
    """What two models with these settings are compared on: of these tokens as many as it takes."""
    length = _length(settings)
    return torch.tensor(_prolonged(read, length)[:length])


def _length(settings: Settings) -> int:
    """Tokens on which two models with these settings are compared."""
    choosing = max(KINDS[letter].chooses_after(settings.model) for letter in settings.pattern.letters)
    return max(FEWEST_TOKENS, choosing + _MORE_TOKENS)


def _prolonged(tokens: list[int], length: int) -> list[int]:
    """At least `length` tokens: these, then again in other orders, so that no two places see nearly the same."""
    draw, prolonged = random.Random(0), list(tokens)
    while len(prolonged) < length:
        prolonged += draw.sample(tokens, len(tokens))
    return prolonged


def _logits(model: Stack, tokens: Tensor, states: dict[int, Any] | None = None, first: int = 0) -> Tensor:
    """`[T]` → `[T, vocabulary]`; `states`, when given, are of the `first` tokens before and are replaced in place."""
    starts = None if states is None else torch.tensor([first])
    out = model(tokens, Context(Sequences.of([len(tokens)], starts=starts)), states=states)
    if states is not None:
        states.update(out.states)
    return model.logits(out.hidden)


def _pieces(tokens: Tensor) -> list[Tensor]:
    """A first piece, then single tokens."""
    steps = min(STEPS, len(tokens) - 1)
    return [tokens[:-steps], *tokens[-steps:].split(1)]


def _stepwise_trained(model: Stack, tokens: Tensor) -> Tensor:
    states, logits, at = model.initial_states(1), [], 0
    for piece in _pieces(tokens):
        logits.append(_logits(model, piece, states, at))
        at += len(piece)
    return torch.cat(logits)


def _stepwise_exported(model: nn.Module, tokens: Tensor) -> Tensor:
    cache, logits = None, []
    for piece in _pieces(tokens):
        out = model(piece[None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits[0])
    return torch.cat(logits)
