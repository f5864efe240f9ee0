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
        kwargs.pop("num_hidden_layers", None)  # follows from `layers`
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
