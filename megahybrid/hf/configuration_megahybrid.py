"""Configuration of MegaHybrid language models: layers of Gated DeltaNet, learnable token eviction and attention."""

from transformers import PretrainedConfig


class MegahybridConfig(PretrainedConfig):
    """The architecture.

    Args:
        vocab_size, hidden_size, intermediate_size: rows of the embedding, residual width, width inside the SwiGLU.
        layers: one letter a layer: G Gated DeltaNet, L learnable token eviction, S sliding window, F full attention.
        gdn: `num_heads`, `head_dim`, `value_head_dim`, `conv_size` of G.
        attention: `num_heads`, `num_kv_heads`, `head_dim`, `rope_theta` of L, S and F; `window_size` of S, the keys
            that a query sees, itself included.
        lte: of L: `window_size` w (a query sees itself and the w tokens before it), `buffer_size` (older tokens that a
            head holds, sinks included), `sink_size` (first tokens, always held), `conv_size` and `conv_dilation` of
            the router.
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
        layers="GL",
        gdn=None,
        attention=None,
        lte=None,
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
        self.gdn = gdn or {"num_heads": 8, "head_dim": 128, "value_head_dim": 128, "conv_size": 4}
        self.attention = attention or {
            "num_heads": 16, "num_kv_heads": 16, "head_dim": 64, "window_size": 1024, "rope_theta": 10000.0
        }  # fmt: skip
        self.lte = lte or {
            "window_size": 768, "buffer_size": 512, "sink_size": 4, "conv_size": 3, "conv_dilation": 2
        }  # fmt: skip
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        kwargs.pop("num_hidden_layers", None)  # follows from `layers`
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
