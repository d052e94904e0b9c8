"""How often a text is seen, by the real run and by the small ones. The best decay depends on it."""

import itertools
import math

from train.config.fields import Config, UserError
from train.data import tokens
from train.data.batches import TokenBatches
from train.data.corpus import Corpus
from train.data.unique import spread
from train.study.tune.options import Proxy, Tune, decays

OFTEN = 2.0  # epochs from which a text is repeated, and the ratio of epochs that is told
SAMPLE = 1_000_000  # characters on which another tokenizer is tried


def cut(proxy: Proxy, data: TokenBatches) -> TokenBatches:
    """The text that small runs see, as often as they are told to.

    Raises:
        UserError: the text is too short or too long for these epochs, or sequences are documents.
    """
    if proxy.epochs is None:
        return data
    if data.documents:
        raise UserError(
            "--proxy.epochs cuts a text into pieces, and --data.documents keeps documents whole; leave out one of them."
        )
    seen = _seen(proxy)
    least, most = seen / len(data.train), seen / (data.length + 2)
    if not least <= proxy.epochs <= most:
        nearest = math.ceil(least * 1e3) / 1e3 if proxy.epochs < least else math.floor(most)
        raise UserError(
            f"--proxy.epochs {proxy.epochs:g}: the small runs see {seen:,} tokens, and the text has"
            f" {len(data.train):,}; nearest: {nearest:g}, or other --proxy.steps."
        )
    return spread(data, round(seen / proxy.epochs))


def epochs(tune: Tune, real: Config, data: TokenBatches) -> tuple[float, float]:
    """Times that the real run sees its text, and times that a small run does.

    Args:
        data: the whole text, as small runs read it.
    """
    proxy, here = tune.proxy, tune.proxy.epochs
    rows = real.run.steps * real.data.batch_size
    if data.documents:
        count = data.train.documents
        return rows / count, proxy.steps * proxy.batch_size / count
    often = rows * real.data.length / _tokens_of(real, proxy, data)
    return often, _seen(proxy) / len(data.train) if here is None else here


def advice(tune: Tune, real: Config, data: TokenBatches) -> list[str]:
    """A sentence if small runs see their text much more or less often than the real run."""
    if not decays(real):
        return []
    often, here = epochs(tune, real, data)
    if max(often, here) < OFTEN * max(1.0, min(often, here)):
        return []
    proxy = tune.proxy
    steps = max(1, round(proxy.steps * often / here))
    again = f"--proxy.steps {steps}"
    if not data.documents and _seen(proxy) / len(data.train) <= often:
        again = f"--proxy.epochs {_said(often)}"
    return [
        f"The real run sees its text about {_said(often)} times, the small ones saw it {_said(here)} times. The best"
        f" decay grows with that; search again with {again}."
    ]


def _seen(proxy: Proxy) -> int:
    """Tokens of a small run."""
    return proxy.steps * proxy.batch_size * proxy.length


def _tokens_of(real: Config, proxy: Proxy, data: TokenBatches) -> float:
    """Training tokens of the whole text with the tokenizer of the real run, estimated from the text's beginning."""
    same = real.data.tokenizer == proxy.tokenizer
    if same or not isinstance(data.corpus, Corpus):  # a store holds tokens
        return len(data.train)
    texts = data.corpus.train.values()
    count = 1 + sum(size < SAMPLE for size in itertools.accumulate(map(len, texts)))
    sample = [text[:SAMPLE] for text in itertools.islice(texts, count)]
    learned = tokens.learn_tokenizer(real.data.tokenizer, sample)
    share = len(learned.encode(sample)) / sum(len(text.encode()) for text in sample)
    return share * data.corpus.train_bytes


def _said(epochs: float) -> str:
    return f"{epochs:.0f}" if epochs >= 10 else f"{epochs:.2g}"
