r"""Synthetic text with an exactly known entropy rate: a second-order Markov source with Zipf's law and copied spans.

Let x_t be the symbols, p_k ∝ k^-s Zipf's law over V symbols, c_t = (x_{t-1}, class of x_{t-2}) the context, and π_c a
random order of the symbols, close to the order of the alphabet so that the symbol frequencies also follow roughly
Zipf's law. Then::

    with probability q   x_t is one of M marks, all equally likely, and x_{t+1} … x_{t+L} copy the symbols d_mark before
    otherwise            x_t is the symbol at place k of π_c, with probability p_k

Every symbol that is drawn has the same entropy in every context, h = H(q) + q ln M - (1-q) Σ p ln p, and copied symbols
have none. So the entropy rate is exactly h/(1 + qL) nats per symbol, a lower bound on the loss of every predictor.
The number of random draws does not depend on the text, so all documents are generated in parallel, at any length.
"""

import dataclasses
import functools

import numpy as np

ALPHABET = "".join(chr(i) for i in range(ord("!"), ord("~") + 1))  # one byte each
DISTANCES = (8, 12, 16)  # d, one per mark [symbols]
SPAN = 8  # L [symbols]
COPYING = 0.04  # q
EXPONENT = 1.2  # s
BLUR = 0.5  # how far each of the two context symbols moves places from the alphabet's order [nats of place]
SOURCES = {"zipf": (4_000_000, 8), "zipf-large": (256_000_000, 94)}  # symbols, classes


@dataclasses.dataclass(frozen=True)
class Zipf:
    """A source of synthetic text.

    Attributes:
        symbols: total number of symbols, rounded down to whole documents, at least two of them.
        classes: number of classes of x_{t-2} that a context distinguishes.
        seed: of the orders π_c and of the text.
        document: symbols in a document.
    """

    symbols: int
    classes: int
    seed: int = 0
    document: int = 8192

    @functools.cached_property
    def law(self) -> np.ndarray:
        """p_k by place, float64 [V]."""
        weights = np.arange(1, len(ALPHABET) - len(DISTANCES) + 1.0) ** -EXPONENT
        return weights / weights.sum()

    @functools.cached_property
    def orders(self) -> np.ndarray:
        """Symbol by context and place, uint8 [alphabet, classes, V]; marks are the last symbols of the alphabet."""
        rng = np.random.default_rng((self.seed, 1))
        V = len(self.law)

        def gumbel(classes: int) -> np.ndarray:
            return -np.log(-np.log(rng.random((len(ALPHABET), classes, V))))

        moved = np.log(np.arange(1, V + 1)) - BLUR * (gumbel(1) + gumbel(self.classes))
        return np.argsort(moved, axis=-1).astype(np.uint8)

    @property
    def drawn_entropy(self) -> float:
        """h, the entropy of a symbol that is drawn [nats]."""
        q, p = COPYING, self.law
        choice = -q * np.log(q) - (1 - q) * np.log(1 - q)
        return float(choice + q * np.log(len(DISTANCES)) - (1 - q) * np.sum(p * np.log(p)))

    @property
    def entropy_rate(self) -> float:
        """Entropy rate of an infinite document [nats per symbol]."""
        return self.drawn_entropy / (1 + COPYING * SPAN)

    @property
    def document_entropy(self) -> float:
        """Entropy of a document [nats per symbol]. Its first symbols, up to the largest distance, contain no marks."""
        first = max(DISTANCES)
        drawn = np.ones(self.document)  # probability that a symbol is drawn and not copied
        for t in range(first, self.document):
            drawn[t] = 1 - COPYING * drawn[max(first, t - SPAN) : t].sum()
        p = self.law
        start = -first * np.sum(p * np.log(p))
        return float((start + self.drawn_entropy * drawn[first:].sum()) / self.document)

    def documents(self) -> dict[str, bytes]:
        """Documents by name, as ASCII."""
        count = max(2, self.symbols // self.document)
        text = np.frombuffer(ALPHABET.encode(), np.uint8)[self.numbers(count)]
        return {f"{i:06d}": document.tobytes() for i, document in enumerate(text)}

    def numbers(self, count: int) -> np.ndarray:
        """The first `count` documents as symbol numbers, uint8 [count, document]; the documents are independent."""
        places = len(self.law)
        edges = np.cumsum(self.law)[:-1]
        out = np.zeros((self.document, count), np.uint8)
        last, before = np.zeros(count, np.intp), np.zeros(count, np.intp)
        left, distance = np.zeros(count, np.intp), np.ones(count, np.intp)
        column = np.arange(count)
        for t in range(self.document):
            uniform = np.random.default_rng((self.seed, 2, t)).random((3, count))
            place = np.searchsorted(edges, uniform[0], side="right")
            symbol = self.orders[last, before % self.classes, place].astype(np.intp)
            mark = np.minimum((uniform[1] * len(DISTANCES)).astype(np.intp), len(DISTANCES) - 1)
            marked = (uniform[2] < COPYING) & (left == 0) & (t >= max(DISTANCES))
            symbol = np.where(marked, places + mark, symbol)
            symbol = np.where(left > 0, out[t - distance, column], symbol)
            distance = np.where(marked, np.array(DISTANCES)[mark], distance)
            left = np.where(marked, SPAN, np.maximum(left - 1, 0))
            out[t] = symbol
            before, last = last, symbol
        return np.ascontiguousarray(out.T)


def source(name: str) -> Zipf | None:
    """The source with a name in `SOURCES`; None for other names."""
    return Zipf(*SOURCES[name]) if name in SOURCES else None
