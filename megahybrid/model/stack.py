"""The stack of layers, whole or as pipeline stages, with the embedding before it and the output after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megahybrid.config.schema import Config
from megahybrid.devices import DTYPES
from megahybrid.model.block import Block, RMSNorm
from megahybrid.model.context import Aux, Context, Decision
from megahybrid.model.mixer import check_whole
from megahybrid.model.settings import Settings
from megahybrid.parallel.heads import gather_rows
from megahybrid.parallel.layers import ColumnLinear, VocabEmbedding, enter, vocabulary_argmax
from megahybrid.parallel.parameters import initialize_parameters, materialize
from megahybrid_kernels.linear_cross_entropy import linear_cross_entropy


class StackOutput(NamedTuple):
    """What a pass through the stack gives.

    Attributes:
        hidden: `[tokens, 1, hidden]`, after the final norm where this is the last stage; with sequence parallelism
            `[tokens / tensor, 1, hidden]`.
        loss: of the last stage, when labels were given: the sum of `losses` and `train.z_loss` times that of
            `normalisers` squared, each by its label's weight, at least fp32. Gradients come through it alone, once.
        losses: negative log-likelihood of every label in nats, `[tokens]`, at least fp32, likewise.
        normalisers: log of the softmax's normaliser, `[tokens]`, at least fp32, likewise.
        aux: by-products by layer number, where there are any.
        states: the mixers' next states by layer number, when states were given or are kept.
        likeliest: of the last stage, when places were asked for: the most likely next token at each, int64 `[places]`.
    """

    hidden: Tensor
    loss: Tensor | None
    losses: Tensor | None
    normalisers: Tensor | None
    aux: dict[int, Aux]
    states: dict[int, Any]
    likeliest: Tensor | None = None


class Stack(nn.Module):
    """Consecutive layers: a whole model, or the part of it that a pipeline stage holds.

    The first stage also has the embedding, the last one the final norm and the output layer. Parameter names carry
    global layer numbers, so that they are unique over all stages; but with tied embeddings the last stage has a copy of
    the embedding under the same name; training/reduction.py sums their gradients, which keeps them equal.
    """

    model_type = ModelType.encoder_or_decoder  # read by Megatron-core's schedules

    def __init__(self, config: Config, layers: range | None = None):
        """`layers` are the numbers of the layers this stage holds, all of them when left out."""
        super().__init__()
        self.settings = settings = Settings.of(config)
        self.config, self.z_loss = megatron_config(config), config.train.z_loss
        total, tied = len(settings.pattern.letters), settings.model.tie_embeddings
        layers = range(total) if layers is None else layers
        self.first, self.last = layers.start == 0, layers.stop == total
        if self.first or (self.last and tied):
            self.embedding = VocabEmbedding(
                settings.model.vocab_size, settings.model.hidden_size, settings.projection, self.config
            )
            # Of copies training/reduction.py counts one in the gradient's norm, and saver.py saves one.
            self.embedding.weight.ds_pipe_replicated = not self.first
            self.embedding.weight.tied = tied and self.first != self.last
        self.layers = nn.ModuleDict({str(i): Block(settings, i) for i in layers})
        if self.last:
            self.final_norm = RMSNorm(settings)
            if not tied:
                self.output = ColumnLinear(settings.model.hidden_size, settings.model.vocab_size, settings.projection)
        self._input: Tensor | None = None

    def forward(
        self,
        tokens: Tensor,
        context: Context,
        labels: Tensor | None = None,
        states: dict[int, Any] | None = None,
        weights: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> StackOutput:
        """Hidden states and, on the last stage, losses.

        Args:
            tokens, labels: int64 `[tokens]`.
            context: what every layer sees.
            states: the mixers' by layer number, to go on from; None where all sequences begin here.
            weights: fp32 `[tokens]`, the labels' in the loss; all 1 when left out.
            asked: int64 `[places]` among all tokens, where the last stage also says the most likely next token.

        Raises UserError where there are or would be states, as `check_whole`.
        """
        if states or context.keep_states:
            check_whole(self.settings)
        x, addend = self.embedding(tokens) if self.first else self._input, None
        aux: dict[int, Aux] = {}
        after: dict[int, Any] = {}
        for name, block in self.layers.items():
            layer = int(name)
            if self.settings.pattern.letters[layer] in self.settings.recompute and torch.is_grad_enabled():
                x, each = _recomputed(block, _sum(x, addend), context)
                addend = None
            else:
                x, addend, each, after[layer] = block(x, addend, context, states[layer] if states else None)
            if each is not None:
                aux[layer] = each
        loss = losses = normalisers = likeliest = None
        if not self.last:
            x = _sum(x, addend)
        else:
            x, _ = self.final_norm(x, addend)
            if labels is not None:
                loss, losses, normalisers = self._loss(x, labels, weights)
            if asked is not None:
                likeliest = self._likeliest(x, asked)
        return StackOutput(x, loss, losses, normalisers, aux, after if states or context.keep_states else {}, likeliest)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[tokens, 1, hidden]` → `[tokens, vocabulary of this tensor parallel rank]`."""
        return F.linear(enter(hidden, self.settings.sequence_parallel).squeeze(1), self._output_weight())

    def _loss(self, hidden: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x = enter(hidden, self.settings.sequence_parallel).squeeze(1)
        group = parallel_state.get_tensor_model_parallel_group()
        return linear_cross_entropy(x, self._output_weight(), labels, weights, self.z_loss, group)

    def _likeliest(self, hidden: Tensor, asked: Tensor) -> Tensor:
        x = gather_rows(enter(hidden, self.settings.sequence_parallel).squeeze(1), asked)
        return vocabulary_argmax(F.linear(x, self._output_weight()))

    def _output_weight(self) -> Tensor:
        return self.embedding.weight if self.settings.model.tie_embeddings else self.output.weight

    def initial_states(self, sequences: int) -> dict[int, Any]:
        """The mixers' states before the first token of `sequences` sequences."""
        return {int(name): block.mixer.initial_state(sequences) for name, block in self.layers.items()}

    def set_input_tensor(self, tensor: Any) -> None:
        """Megatron-core's schedules hand every stage its input here; the first one's is None."""
        self._input = tensor[0] if isinstance(tensor, list) else tensor


class Stages(nn.Module):
    """A rank's stages of an interleaved pipeline as one module: the same parameters under the same names."""

    def __init__(self, stages: Sequence[Stack]):
        super().__init__()
        self.layers = nn.ModuleDict({name: block for stage in stages for name, block in stage.layers.items()})
        for stage in stages:
            for name, module in stage.named_children():
                if name != "layers":
                    self.add_module(name, module)


def build(config: Config, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Stack:
    """The whole model with its initial values from (train.seed, parameter name)."""
    (stage,) = build_stages(config, [None], device, dtype)
    initialize_parameters(stage, config.train.seed)
    return stage


def build_stages(
    config: Config,
    layers: Sequence[range | None],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> list[Stack]:
    """This rank's stages, one for each entry of `layers`, their parameters without values."""
    stages = []
    for number, each in enumerate(layers):
        with torch.device("meta"):
            stage = Stack(config, each)
        materialize(stage, device, dtype)
        if len(layers) > 1:
            stage.vp_stage = number  # Megatron-core's interleaved schedule asks for it
        stages.append(stage)
    return stages


def megatron_config(config: Config) -> TransformerConfig:
    """Megatron-core's configuration: what its layers and schedules read."""
    dtype = DTYPES[config.train.dtype]
    parallel = config.parallel
    interleaved = parallel.virtual_pipeline > 1
    return TransformerConfig(
        # Not read by what we use, but checked: it knows no stages of unequal size.
        num_layers=parallel.pipeline * parallel.virtual_pipeline,
        num_attention_heads=parallel.tensor,
        hidden_size=config.model.hidden_size,
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
        pipeline_dtype=dtype,
        bf16=config.train.dtype == "bf16",
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,  # training/schedule.py takes the mean itself
        # With two stages, batched transfers of the interleaved schedule would mix up what is sent in one direction.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,  # the host would wait for the GPU at every transfer, as PyTorch before 2 needed
        # gloo sends in the background: a buffer freed after an overlapped send would be sent damaged.
        deallocate_pipeline_outputs=parallel.pipeline > 1 and (not interleaved or torch.cuda.is_available()),
    )


def _sum(x: Tensor, addend: Tensor | None) -> Tensor:
    return x if addend is None else x + addend


def _recomputed(block: Block, x: Tensor, context: Context) -> tuple[Tensor, Aux | None]:
    """The block's output, its activations recomputed in the backward pass."""

    context = replace(context, decision=Decision())
    names: list[str] = []

    def run(x: Tensor) -> tuple[Tensor, ...]:
        y, addend, aux, _ = block(x, None, context)
        if aux is None:
            return (y + addend,)
        names[:] = aux.counts
        return y + addend, aux.loss, *aux.counts.values()

    y, *rest = tensor_parallel.checkpoint(run, False, x)
    return y, Aux(rest[0], dict(zip(names, rest[1:], strict=True))) if rest else None
