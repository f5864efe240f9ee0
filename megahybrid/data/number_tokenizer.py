"""The tokenizer of models that know bare tokens: token 17 is the text 17."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megahybrid.data.tokenizer import END_OF_TEXT, Tokenizer


def number_tokenizer(vocab_size: int) -> Tokenizer:
    """`17 4 9` ↔ [17, 4, 9], for all ids below `vocab_size` but 0, which is `<|endoftext|>`.

    A token has its space before it, so that a text can be continued: [17, 4, 9] decode to ` 17 4 9`.
    """
    backend = Backend(models.WordLevel({END_OF_TEXT: 0} | {f" {number}": number for number in range(1, vocab_size)}))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(END_OF_TEXT, " "),  # written out in a text it is no document token
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Prepend(" "),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(backend)
