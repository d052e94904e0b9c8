"""A part of a text that stands for all of it: U training tokens, in pieces that are spread over the whole."""

import dataclasses

import numpy as np

from train.data import tokens
from train.data.batches import TokenBatches
from train.data.token_store import TokenSequence
from train.errors import UserError

PIECE = 1024  # tokens of the text that stay together


def spread(data: TokenBatches, unique: int) -> TokenBatches:
    """A text cut to `unique` training tokens. The held-out part stays whole.

    Raises:
        UserError: the text has fewer tokens, or a window needs more.
    """
    whole, least = len(data.train), data.length + 2
    if not least <= unique <= whole:
        raise UserError(
            f"{unique} unique tokens of {data.corpus.source!r}: its training part has {whole}, and a window needs"
            f" {least}; nearest: {min(max(unique, least), whole)}."
        )
    pieces = -(-unique // PIECE)
    starts = np.linspace(0, whole - min(PIECE, unique), pieces).astype(np.int64)
    kept = data.train.windows(starts, min(PIECE, unique)).reshape(-1)[:unique]
    array = kept.astype(tokens.token_dtype(data.vocab_size))
    return dataclasses.replace(
        data,
        train=TokenSequence.from_array(array, data.tokenizer.separator),
        digests=data.digests | {"unique tokens": str(unique)},
    )
