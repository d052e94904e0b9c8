"""Texts of which a run sees only some, many times.

`reference` is the second text of the regimes: the English reference of the Python language, which the standard
library holds as `pydoc_data.topics`. Any other name is a text as for --data.text.
"""

import functools
import hashlib
import pydoc_data.topics

from train.data import corpus, tokens
from train.data.batches import TokenBatches
from train.data.token_store import TokenSequence
from train.data.unique import spread
from train.study.small_runs import SmallTask

HELD_OUT_EVERY = 8  # topics of `reference`


@functools.lru_cache(maxsize=8)
def read(task: SmallTask, text: str, unique: int) -> TokenBatches:
    """A text, cut to `unique` training tokens; 0 leaves it whole. The held-out part stays whole.

    Raises:
        UserError: there is no such text, or it has fewer tokens.
    """
    data = _reference(task) if text == "reference" else task.read_text(text)
    return spread(data, unique) if unique else data


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
