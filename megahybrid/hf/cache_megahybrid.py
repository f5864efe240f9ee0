"""What a MegaHybrid model keeps of the tokens so far."""


class MegahybridCache:
    """The states of all layers: a dictionary of tensors `[B, ...]` a layer.

    Attributes:
        states: one dictionary a layer, None before the first token.
        lengths: int64 `[B]`, tokens of each sequence so far, padding not counted; None before the first token.
        seen: tokens so far, padding counted.
        ended: bool `[B]`, of the plain form: whether padding follows what a sequence has; None where nobody looked.
        inference: what else there is where the states are those of the layers' packed form; None where they are not.
    """

    # What transformers asks of a cache.
    is_compileable = False
    is_croppable = False
    is_linear = (False,)

    def __init__(self, layers):
        self.states = [None] * layers
        self.reset()

    def reset(self):
        """Forget all tokens."""
        self.states = [None] * len(self.states)
        self.lengths = self.ended = self.inference = None
        self.seen = 0

    def crop(self, *_):
        raise NotImplementedError(
            "The last tokens cannot be taken back from a MegahybridCache, whose states hold sums of all: keep a "
            "copy.deepcopy of one that was made under torch.no_grad(), or read the text anew."
        )

    def get_seq_length(self, layer_idx=0):
        """Tokens so far, padding counted."""
        return self.seen

    def reorder_cache(self, beam_idx):
        """Replace every sequence by the sequence `beam_idx[n]`; beam search asks for it."""
        if self.inference is not None:
            self.inference.select(self, beam_idx.tolist())
            return
        rows = beam_idx.to(self.lengths.device)
        self.lengths, self.ended = self.lengths[rows], None if self.ended is None else self.ended[rows]
        self.states = [{name: x[beam_idx.to(x.device)] for name, x in state.items()} for state in self.states]


def refuse_other(cache):
    """Raise ValueError for a cache of another class."""
    if not (cache is None or isinstance(cache, MegahybridCache)):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, whose keys and values are not all that these layers keep: "
            "leave it out, and the model makes a MegahybridCache."
        )
