"""Configuration of MegaHybrid language models."""

from transformers import PretrainedConfig


class MegahybridConfig(PretrainedConfig):
    """The architecture.

    Args:
        vocab_size, hidden_size, intermediate_size: rows of the embedding, residual width, width inside the SwiGLU.
        layers: one letter a layer; the table in modeling_megahybrid has their classes, which say what else they read
            here, such as a dictionary `attention`.
        norm_eps: epsilon of every RMSNorm.
        initializer_range: standard deviation of new weights.
        max_position_embeddings: the length that the model was trained with; nothing is limited by it.
        router_aux_loss_coef: weight, in training, of what layers add to the loss: of retention routers the
            L1 term, the mean of their positive scores.
    """

    model_type = "megahybrid"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        layers="",
        norm_eps=1e-6,
        initializer_range=0.02,
        max_position_embeddings=4096,
        use_cache=True,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.0,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.layers = layers
        self.num_hidden_layers = len(layers)
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self.router_aux_loss_coef = router_aux_loss_coef
        kwargs.pop("num_hidden_layers", None)  # follows from `layers`
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    # Names that tools ask for.

    @property
    def num_attention_heads(self):
        return self._of_first_section("num_heads")

    @property
    def num_key_value_heads(self):
        return self._of_first_section("num_kv_heads", "num_heads")

    @property
    def head_dim(self):
        return self._of_first_section("head_dim")

    def _of_first_section(self, *names):
        """From the layers that attend, or where there are none from the others."""
        sections = [each for each in vars(self).values() if isinstance(each, dict) and "num_heads" in each]
        if not sections:
            raise AttributeError(f"There is no {names[0]} without layers; give their sections, such as attention.")
        section = max(sections, key=lambda each: "num_kv_heads" in each)
        return next(section[name] for name in names if name in section)
