"""MegaHybrid language models in plain PyTorch.

Every layer continues from a state of its sequences' earlier tokens and returns the next one; a whole sequence is one
piece that continues from the empty state. So prefill in pieces, decode and a forward without cache are the same
computation.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from megahybrid.hf.configuration_megahybrid import MegahybridConfig
from megahybrid.hf.inference_megahybrid import Inference, applies, modules_below
from megahybrid.hf.layers_megahybrid import RMSNorm, SwiGLU, linear
from megahybrid.hf.mixer_classes import MIXERS


class MegahybridCache:
    """The states of all layers: a dictionary of tensors `[B, ...]` a layer.

    Attributes:
        states: one dictionary a layer, None before the first token.
        lengths: int64 `[B]`, tokens of each sequence so far, padding not counted; None before the first token.
        seen: tokens so far, padding counted.
        inference: what else there is where the states are those of the layers' packed form; None where they are not.
    """

    def __init__(self, layers):
        self.states = [None] * layers
        self.lengths = self.inference = None
        self.seen = 0

    def get_seq_length(self, layer_idx=0):
        """Tokens so far, padding counted."""
        return self.seen

    def reorder_cache(self, beam_idx):
        """Replace every sequence by the sequence `beam_idx[n]`; beam search asks for it."""
        if self.inference is not None:
            self.inference.select(self, beam_idx.tolist())
            return
        self.lengths = self.lengths[beam_idx.to(self.lengths.device)]
        self.states = [{name: x[beam_idx.to(x.device)] for name, x in state.items()} for state in self.states]


class Block(nn.Module):
    def __init__(self, config, letter):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = MIXERS[letter](config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, places, state):
        """`[B, T, hidden]` with positions, or `[tokens, hidden]` with sequences, see Mixer."""
        inputs = self.mixer_norm(x)
        if state is None and isinstance(places, torch.Tensor):
            state = self.mixer.empty_state(inputs)
        y, state = self.mixer(inputs, places, state)
        normalised, x = self.mlp_norm.of_sum(x, y)
        return x + self.mlp(normalised), state


class MegahybridPreTrainedModel(PreTrainedModel):
    config_class = MegahybridConfig
    base_model_prefix = "model"
    _no_split_modules = ("Block",)
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

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        **kwargs,
    ):
        """input_ids int64 `[B, T]` or inputs_embeds `[B, T, hidden]`; attention_mask `[B, T]`, or as long as all tokens
        so far, 0 for padding on the left. Continues from `past_key_values` and updates it."""
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = MegahybridCache(len(self.layers)) if past_key_values is None else past_key_values
        if cache.lengths is None:
            cache.lengths = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            cache.inference = Inference() if applies(self, x) else None
        if cache.inference is not None:
            x, hidden_states = cache.inference.forward(self, x, attention_mask, cache, use_cache, output_hidden_states)
            return BaseModelOutputWithPast(
                last_hidden_state=x, past_key_values=cache if use_cache else None, hidden_states=hidden_states
            )
        positions = self._positions(x, attention_mask, cache)
        hidden_states = [x]
        for number, block in enumerate(self.layers):
            x, state = block(x, positions, cache.states[number])
            if use_cache:
                cache.states[number] = state
            hidden_states.append(x)
        if use_cache:
            cache.lengths = torch.maximum(cache.lengths, positions.max(1).values + 1)
            cache.seen += x.shape[1]
        x = self.final_norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache if use_cache else None,
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
        )

    @staticmethod
    def _positions(x, attention_mask, cache):
        """int64 `[B, T]`: each token's place in its sequence, -1 for padding."""
        if attention_mask is None:
            return cache.lengths[:, None] + torch.arange(x.shape[1], device=x.device)
        real = attention_mask[:, -x.shape[1] :].to(x.device).bool()
        return (cache.lengths[:, None] + real.long().cumsum(1) - 1).masked_fill(~real, -1)


class MegahybridForCausalLM(MegahybridPreTrainedModel, GenerationMixin):
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

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, use_cache=True, **kwargs
    ):
        if use_cache and past_key_values is None:
            past_key_values = MegahybridCache(self.config.num_hidden_layers)
        inputs = {"attention_mask": attention_mask, "past_key_values": past_key_values, "use_cache": use_cache}
        if past_key_values is None:
            return {**inputs, "input_ids": input_ids}
        if inputs_embeds is not None and past_key_values.seen == 0:
            return {**inputs, "inputs_embeds": inputs_embeds}
        return {**inputs, "input_ids": input_ids[:, past_key_values.seen :]}

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
        **kwargs,
    ):
        """As `MegahybridModel`; logits `[B, T, vocabulary]`, of the last `logits_to_keep` tokens where that is not 0,
        and the mean loss where labels `[B, T]` are given (-100 is left out)."""
        out = self.model(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, output_hidden_states, **kwargs
        )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, rows])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values, hidden_states=out.hidden_states
        )
