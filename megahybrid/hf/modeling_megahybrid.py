"""MegaHybrid language models in plain PyTorch.

Every layer continues from a state of its sequences' earlier tokens and returns the next one; a whole sequence is one
piece that continues from the empty state. So prefill in pieces, decode and a forward without cache are the same
computation.
"""

import copy
import dataclasses
from contextlib import nullcontext

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from megahybrid.hf.cache_megahybrid import MegahybridCache, refuse_other
from megahybrid.hf.configuration_megahybrid import MegahybridConfig
from megahybrid.hf.inference_megahybrid import Inference, modules_below, packs, through_layers
from megahybrid.hf.layers_megahybrid import (
    RMSNorm,
    SwiGLU,
    added,
    as_computed,
    below_autograd,
    kernels,
    linear,
    real_tokens,
)
from megahybrid.hf.mixer_classes import MIXERS
from megahybrid.hf.packing_megahybrid import Documents, several_documents

# Of packed collators and of transformers, beside what forward takes: these follow from it.
_FOLLOWING = {"cu_seq_lens_k", "max_length_q", "max_length_k", "cache_position"}

# transformers 4 calls the cache past_key_values, the newest 5 cache, and gives outputs both names.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class Block(GradientCheckpointingLayer):
    """A layer: the mixer of its letter in the pattern, then a SwiGLU, each behind a norm and added to its input."""

    def __init__(self, config, letter):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = MIXERS[letter](config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, places, state=None, documents=None):
        """`[B, T, hidden]` with positions, or `[tokens, hidden]` with sequences (see Mixer) → (the same, the mixer's
        next state, and what it adds to the loss, if it does)."""
        tracked = x.dim() != 2 or self.training or torch.is_grad_enabled()
        with nullcontext() if tracked else below_autograd():
            return self.sublayers(x, places, state, documents)

    def sublayers(self, x, places, state, documents):
        inputs = as_computed(self.mixer_norm(x))
        if documents is not None:
            inputs = documents.padded(inputs)
        if state is None and isinstance(places, torch.Tensor):
            state = self.mixer.empty_state(inputs)
        y, state = self.mixer(inputs, places, state)
        normalised, x = self.mlp_norm.of_sum(x, y if documents is None else documents.unpadded(y))
        return added(self.mlp, normalised, x), state, None if state is None else state.pop("loss", None)


class MegahybridPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model's class."""

    config_class = MegahybridConfig
    base_model_prefix = "model"
    _no_split_modules = ("Block",)
    supports_gradient_checkpointing = True
    _is_stateful = True  # a token cannot be taken back

    def __init__(self, config):
        super().__init__(config)
        self._keep_in_fp32_modules_strict = {name for letter in config.layers for name in MIXERS[letter].keep_in_fp32}

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    @torch.no_grad()
    def _init_weights(self, module):
        """New weights, for a model that is made from its configuration alone."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(0, self.config.initializer_range)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()


class MegahybridModel(MegahybridPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, letter) for letter in config.layers)
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.made_of = list(map(type, modules_below(self)))
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        position_ids=None,
        cu_seq_lens_q=None,
        seq_idx=None,
        cache=None,
        **kwargs,
    ):
        """input_ids int64 `[B, T]` or inputs_embeds `[B, T, hidden]`; attention_mask `[B, T]`, or as long as all tokens
        so far, 0 for padding on the left; a step of one token a sequence has none. Continues from `past_key_values`, or
        `cache` by its newer name, and updates it; when training none is made unless asked for.

        A row may hold several documents, which do not see each other: one begins where `position_ids` are 0,
        `seq_idx` changes, or `cu_seq_lens_q` says so. What else position_ids say has to follow from the mask."""
        _refuse(kwargs)
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        _refuse_unfit(x, attention_mask, cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        documents = several_documents(x, attention_mask, position_ids, cu_seq_lens_q, seq_idx, cache)
        if documents is not None and (use_cache or cache is not None):
            raise ValueError("Rows of several documents have no cache: give use_cache=False and no past_key_values.")
        if use_cache is None:
            use_cache = self.config.use_cache and documents is None and (cache is not None or not self.training)
        if torch.is_grad_enabled() and (use_cache or cache is not None):
            self._refuse_gradients(x, cache)
        if cache is None and not use_cache and packs(self, x):
            return self._joined(x, attention_mask, documents, output_hidden_states)
        cache = MegahybridCache(len(self.layers)) if cache is None else cache
        if cache.lengths is None:
            cache.lengths = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            # The ops' caches are not made for gradients.
            cache.inference = Inference() if packs(self, x) and not torch.is_grad_enabled() else None
        if cache.inference is not None:
            going_on = cache if use_cache else copy.deepcopy(cache)  # since states are overwritten
            x, hidden_states = going_on.inference.forward(self, x, attention_mask, going_on, output_hidden_states)
            return MegahybridOutput(
                last_hidden_state=x, past_key_values=cache if use_cache else None, hidden_states=hidden_states
            )
        positions = self._positions(x, attention_mask, cache) if documents is None else documents.positions
        x, hidden_states, loss = through_layers(
            self, x, positions, cache.states, output_hidden_states, documents, keep=use_cache
        )
        if use_cache:
            cache.lengths = torch.maximum(cache.lengths, positions.max(1).values + 1)
            cache.seen += x.shape[1]
            if attention_mask is not None or cache.ended is not None:
                cache.ended = (positions[:, -1] < 0) & (cache.lengths > 0)
        return MegahybridOutput(
            last_hidden_state=x,
            past_key_values=cache if use_cache else None,
            hidden_states=hidden_states,
            aux_loss=loss,
        )

    def _refuse_gradients(self, x, cache):
        """Raise ValueError where those through a cache would be wrong or missing."""
        if self.training and self.is_gradient_checkpointing:
            raise ValueError(
                "Layers that are recomputed for gradients take no cache: give use_cache=False and no past_key_values."
            )
        needed = x.requires_grad or any(weight.requires_grad for weight in self.parameters())
        if needed and cache is not None and cache.inference is not None:
            raise ValueError(
                "The cache was made without gradients, and what updates it has none: put torch.no_grad() around, or "
                "make the cache with gradients on."
            )

    def _joined(self, x, attention_mask, documents, output_hidden_states):
        """Whole sequences, laid end to end."""
        documents = Documents(x, attention_mask) if documents is None else documents
        sequences = kernels.Sequences.of(documents.lengths.tolist(), x.device)
        states = [None] * len(self.layers)
        x, hidden_states, loss = through_layers(self, documents.joined(x), sequences, states, output_hidden_states)
        return MegahybridOutput(
            last_hidden_state=documents.in_rows(x),
            hidden_states=hidden_states and tuple(map(documents.in_rows, hidden_states)),
            aux_loss=loss,
        )

    @staticmethod
    def _positions(x, attention_mask, cache):
        """int64 `[B, T]`: each token's place in its sequence, -1 for padding. Windows and convolutions count rows'
        columns, so that nothing may follow padding that follows a token."""
        if attention_mask is None and cache.ended is None:
            return cache.lengths[:, None] + torch.arange(x.shape[1], device=x.device)
        real = (
            torch.ones_like(x[..., 0], dtype=torch.bool) if attention_mask is None else real_tokens(x, attention_mask)
        )
        positions = (cache.lengths[:, None] + real.long().cumsum(1) - 1).masked_fill(~real, -1)
        ended = torch.zeros_like(real[:, 0]) if cache.ended is None else cache.ended
        after_padding = torch.cat([ended[:, None], ~real[:, :-1]], 1)
        if bool((after_padding & (positions > 0)).any()):
            raise ValueError(
                "In plain PyTorch padding may not stand between tokens of a sequence: pad on the left before it, "
                "or give sequences of different lengths one at a time."
            )
        return positions


def _refuse(arguments):
    unknown = [name for name, value in arguments.items() if not (value is None or value is False)]
    if unknown := sorted(set(unknown) - _FOLLOWING):
        raise ValueError(f"MegaHybrid models do not know {', '.join(unknown)}: leave it out.")


def _refuse_unfit(x, attention_mask, cache):
    """Raise ValueError where x `[B, T, hidden]`, its mask and its cache are not of one batch; looks at sizes alone."""
    refuse_other(cache)
    count, length = x.shape[:2]
    if not length:
        raise ValueError("There is no token in input_ids: give one at least.")
    seen, known = (0, None) if cache is None else (cache.seen, cache.lengths)
    if known is not None and len(known) != count:
        raise ValueError(f"The cache has {len(known)} sequences and the batch {count}: give those of the cache.")
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.dim()} dimensions: give one of 2, 0 for padding; documents in one "
                "row are told apart by position_ids."
            )
        rows, columns = attention_mask.shape
        if rows != count or columns not in (length, seen + length):
            raise ValueError(
                f"attention_mask has {rows} rows of {columns} tokens: give {count} of {length}, the new ones, or of "
                f"{seen + length}, those in the cache included."
            )


@dataclasses.dataclass
class MegahybridOutput(BaseModelOutputWithPast):
    """aux_loss: what layers add to the loss, summed over tokens, the mean over those layers that do."""

    aux_loss: torch.Tensor | None = None


class MegahybridForCausalLM(MegahybridPreTrainedModel, GenerationMixin):
    """The language model, with its output layer, loss and generation."""

    # transformers 4 wants the names, transformers 5 what they are tied to; each takes this dictionary.
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = MegahybridModel(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embedding

    def set_input_embeddings(self, value):
        self.model.embedding = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache is not False and model_kwargs.get(_CACHE) is None:
            model_kwargs[_CACHE] = MegahybridCache(self.config.num_hidden_layers)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        use_cache=True,
        logits_to_keep=0,
        cache=None,
        next_sequence_length=None,
        **kwargs,
    ):
        """The tokens that the cache has not seen. Of several documents in a row `generate` knows nothing: its
        position_ids follow from the mask."""
        cache = past_key_values if cache is None else cache
        refuse_other(cache)
        inputs = {
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **{name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs},
        }
        seen = 0 if cache is None else cache.seen
        if inputs_embeds is not None and seen < inputs_embeds.shape[1]:
            return {**inputs, "inputs_embeds": inputs_embeds[:, seen:]}
        # Transformers 4 tells by the mask how many tokens there are in all, 5 how many are new, if not all given ones.
        count = input_ids.shape[1] if next_sequence_length is None else next_sequence_length
        if attention_mask is not None:
            count = attention_mask.shape[1] - seen
        if count < 1:
            raise ValueError(
                f"The cache has {seen} tokens and the text no more ({seen + count}): give all of it, those in the "
                "cache included, and no prefill_chunk_size, or another cache."
            )
        return {**inputs, "input_ids": input_ids[:, -count:]}

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        logits_to_keep=0,
        position_ids=None,
        num_items_in_batch=None,
        shift_labels=None,
        **kwargs,
    ):
        """As `MegahybridModel`; logits `[B, T, vocabulary]`, of the last `logits_to_keep` tokens where that is not 0.

        The loss, where labels `[B, T]` are given (-100 is left out, and what follows padding, which predicts nothing)
        or `shift_labels`, each its own token's: the mean, or the sum over `num_items_in_batch`, the labels of a batch
        of which this is a part. To it is added `config.router_aux_loss_coef` times what layers add, over the same
        number of tokens.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            position_ids=position_ids,
            return_dict=True,
            **kwargs,
        )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, rows])
        loss = None
        if labels is not None and attention_mask is not None:
            labels = labels.masked_fill(nn.functional.pad(attention_mask[:, :-1] == 0, (1, 0)), -100)
        if labels is not None or shift_labels is not None:
            counted = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
            loss = self.loss_function(logits, labels, self.config.vocab_size, **counted)
            if out.aux_loss is not None and self.config.router_aux_loss_coef:
                count = num_items_in_batch
                if count is None:
                    count = ((labels[:, 1:] if shift_labels is None else shift_labels) != -100).sum()
                loss = loss + self.config.router_aux_loss_coef * (out.aux_loss / count).to(loss)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
