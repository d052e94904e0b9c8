"""Texts of which a run sees only some, many times: U tokens in pieces that are spread over the whole training text.

`reference` is the second text of the regimes: the English reference of the Python language, which the standard
library holds as `pydoc_data.topics`. Any other name is a text as for --data.text.
"""

import dataclasses
import functools
import hashlib
import pydoc_data.topics

import numpy as np

from train.config.fields import UserError
from train.data import corpus, tokens
from train.data.batches import TokenBatches
from train.data.token_store import TokenSequence
from train.study.small_runs import SmallTask

PIECE = 1024  # tokens of the text that stay together
HELD_OUT_EVERY = 8  # topics of `reference`


@functools.lru_cache(maxsize=8)
def read(task: SmallTask, text: str, unique: int) -> TokenBatches:
    """A text, cut to `unique` training tokens; 0 leaves it whole. The held-out part stays whole.

    Raises:
        UserError: there is no such text, or it has fewer tokens.
    """
    data = _reference(task) if text == "reference" else task.read_text(text)
    whole = len(data.train)
    if unique == 0:
        return data
    if unique <= task.length + 1 or unique > whole:
        raise UserError(
            f"{unique} unique tokens of {text!r}: its training part has {whole}, and a window needs"
            f" {task.length + 2}; nearest: {min(max(unique, task.length + 2), whole)}."
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


def _reference(task: SmallTask) -> TokenBatches:
    topics = pydoc_data.topics.topics
    names = sorted(topics)
    held = names[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train = {name: topics[name] for name in names if name not in held}
    held_out = {name: topics[name] for name in held}
    digest = hashlib.sha256(repr([(name, topics[name]) for name in names]).encode()).hexdigest()
    source = corpus.Corpus("reference", train, held_out, len(names), 0, 0, digest)
    learned = tokens.learn_tokenizer(task.tokenizer, train.values())
    first, second = (
        TokenSequence.from_array(learned.encode(part.values()), learned.separator)
        for part in (train, held_out)
    )
    return TokenBatches(
        *(first, second, learned, source),
        length=task.length,
        batch_size=task.batch_size,
        seed=0,
        cache="off",
        digests={"text": digest},
    )
