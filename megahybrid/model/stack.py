"""The stack of layers that a pipeline stage holds, with the embedding before it and the output after it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megahybrid.config.schema import Config
from megahybrid.model.block import Block, RMSNorm
from megahybrid.model.context import Aux, Context
from megahybrid.model.loss import attach_loss, cross_entropy
from megahybrid.model.settings import Settings
from megahybrid.parallel.layers import ColumnLinear, VocabEmbedding, enter
from megahybrid.parallel.parameters import initialize_parameters


class StackOutput(NamedTuple):
    """What a pass through the stack gives.

    Attributes:
        hidden: `[tokens, 1, hidden]` after the final norm.
        losses: negative log-likelihood of every label in nats, `[tokens]`, at least fp32, when labels were given.
        normalisers: log of the softmax's normaliser, `[tokens]`, at least fp32, when labels were given.
        aux: by-products by LTE layer number, in training.
        states: the mixers' next states by layer number, when states were given.
    """

    hidden: Tensor
    losses: Tensor | None
    normalisers: Tensor | None
    aux: dict[int, Aux]
    states: dict[int, Any]


class Stack(nn.Module):
    """Embedding, layers, final norm and output layer. Parameter names carry global layer numbers."""

    model_type = ModelType.encoder_or_decoder  # read by Megatron-core's schedules

    def __init__(self, config: Config):
        super().__init__()
        self.settings = settings = Settings.of(config)
        self.config = megatron_config(config)
        self.embedding = VocabEmbedding(
            settings.model.vocab_size, settings.model.hidden_size, settings.projection, self.config
        )
        self.layers = nn.ModuleDict({str(i): Block(settings, i) for i in range(len(settings.pattern.letters))})
        self.final_norm = RMSNorm(settings)
        if not settings.model.tie_embeddings:
            self.output = ColumnLinear(settings.model.hidden_size, settings.model.vocab_size, settings.projection)

    def forward(
        self,
        tokens: Tensor,
        context: Context,
        labels: Tensor | None = None,
        states: dict[int, Any] | None = None,
    ) -> StackOutput:
        """Tokens and labels int64 `[tokens]` → hidden states and losses, the auxiliary losses attached to them."""
        x = self.embedding(tokens)
        aux: dict[int, Aux] = {}
        after: dict[int, Any] = {}
        for name, block in self.layers.items():
            layer = int(name)
            if self.settings.pattern.letters[layer] in self.settings.recompute and torch.is_grad_enabled():
                x, each = _recomputed(block, x, context)
            else:
                x, each, after[layer] = block(x, context, states[layer] if states else None)
            if each is not None:
                aux[layer] = each
        if aux:
            x = attach_loss(x, torch.stack([each.loss for each in aux.values()]).sum(), context.aux_scale)
        hidden = self.final_norm(x)
        losses, normalisers = (None, None) if labels is None else cross_entropy(self.logits(hidden), labels)
        return StackOutput(hidden, losses, normalisers, aux, after if states else {})

    def logits(self, hidden: Tensor) -> Tensor:
        """`[tokens, 1, hidden]` → `[tokens, vocabulary of this tensor parallel rank]`."""
        weight = self.embedding.weight if self.settings.model.tie_embeddings else self.output.weight
        return F.linear(enter(hidden, self.settings.sequence_parallel).squeeze(1), weight)

    def initial_states(self, sequences: int) -> dict[int, Any]:
        """The mixers' states before the first token of `sequences` sequences."""
        return {int(name): block.mixer.initial_state(sequences) for name, block in self.layers.items()}

    def set_input_tensor(self, tensor: Any) -> None:
        """Megatron-core's schedules hand every stage its input here; the first stage, so far the only one, has none."""


def build(config: Config, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Stack:
    """The model with its initial values from (train.seed, parameter name)."""
    model = Stack(config).to(device=device, dtype=dtype)
    initialize_parameters(model, config.train.seed)
    return model


def megatron_config(config: Config) -> TransformerConfig:
    """Megatron-core's configuration: what its layers and schedules read."""
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=len(Settings.of(config).pattern.letters),
        hidden_size=config.model.hidden_size,
        num_attention_heads=config.model.attention.num_heads,
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        sequence_parallel=config.parallel.sequence,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
        pipeline_dtype=dtype,
        bf16=config.train.dtype == "bf16",
        gradient_accumulation_fusion=False,
    )


def _recomputed(block: Block, x: Tensor, context: Context) -> tuple[Tensor, Aux | None]:
    """The block's output, its activations recomputed in the backward pass."""

    def run(x: Tensor) -> tuple[Tensor, ...]:
        y, aux, _ = block(x, context)
        return (y,) if aux is None else (y, *aux)

    y, *rest = tensor_parallel.checkpoint(run, False, x)
    return y, Aux(*rest) if rest else None
