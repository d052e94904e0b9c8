"""The source of known entropy: its text obeys its rule, and the entropy that it states is that of its text."""

import dataclasses
import lzma
import math

import numpy as np
import pytest

from train.data import batches, corpus, zipf

LENGTH = 120


@pytest.fixture(scope="module")
def short():
    """Source and documents so short that their first symbols, without marks, weigh."""
    source = zipf.Zipf(LENGTH * 2500, classes=5, seed=3, document=LENGTH)
    return source, source.numbers(2500)


def read(source, document):
    """(nats per symbol, places of drawn symbols, marks, symbols that could have been marks) by the rule."""
    nats, places, marks, chances, left, distance = 0.0, [], 0, 0, 0, 0
    V = len(source.law)
    for t, symbol in enumerate(document.tolist()):
        if left:
            assert symbol == document[t - distance]
            left -= 1
            continue
        last, before = (int(document[t - i]) if t >= i else 0 for i in (1, 2))
        may_copy = t >= max(zipf.DISTANCES)
        chances += may_copy
        if symbol >= V:
            assert may_copy
            marks += 1
            distance, left = zipf.DISTANCES[symbol - V], zipf.SPAN
            nats -= math.log(zipf.COPYING / len(zipf.DISTANCES))
        else:
            place = source.orders[last, before % source.classes].tolist().index(symbol)
            places.append(place)
            nats -= math.log((1 - zipf.COPYING * may_copy) * source.law[place])
    return nats / len(document), places, marks, chances


def test_the_entropy_is_that_of_the_text(short):
    source, documents = short
    nats, places, marks, chances = zip(*(read(source, document) for document in documents))
    error = np.std(nats) / math.sqrt(len(nats))
    assert np.mean(nats) == pytest.approx(source.document_entropy, abs=4 * error)
    # Short documents copy less: the check could tell their entropy from the rate of endless ones.
    assert source.document_entropy - source.entropy_rate > 8 * error
    # Marks and places of drawn symbols come as often as stated (binomial, 4 deviations).
    q, n = zipf.COPYING, sum(chances)
    assert sum(marks) / n == pytest.approx(q, abs=4 * math.sqrt(q * (1 - q) / n))
    drawn = np.concatenate(places)
    for place, p in enumerate(source.law[:40]):
        deviation = math.sqrt(p * (1 - p) / len(drawn))
        assert np.mean(drawn == place) == pytest.approx(p, abs=4.5 * deviation), place


def test_long_documents_come_close_to_the_rate():
    source = zipf.Zipf(0, classes=5)
    # Only 16 of 8192 symbols are drawn from another law.
    assert 0 < source.document_entropy - source.entropy_rate < 16 / 8192 * source.drawn_entropy


def test_no_compressor_beats_the_entropy(short):
    source, documents = short
    text = np.frombuffer(zipf.ALPHABET.encode(), np.uint8)[documents].tobytes()
    counts = np.bincount(documents.ravel()) / documents.size
    unigram = -np.sum(counts * np.log(np.maximum(counts, 1e-300)))
    packed = 8 * math.log(2) * len(lzma.compress(text, preset=9)) / len(text)
    assert source.document_entropy < packed < 1.1 * unigram
    # Most of what can be learned is in the order of the symbols.
    assert source.document_entropy < 0.75 * unigram
    # As in a text by Zipf's law, few symbols make most of it.
    assert np.sort(counts)[::-1][:10].sum() > 0.5


def test_contexts_differ_in_both_symbols():
    orders = zipf.Zipf(0, classes=8).orders
    assert orders.shape == (94, 8, 91)
    assert np.array_equal(np.sort(orders, axis=-1), np.broadcast_to(np.arange(91), orders.shape))
    assert (orders[3] != orders[4]).any() and (orders[3, 1] != orders[3, 2]).any()


def test_the_text_follows_from_the_fields_alone(short):
    source, documents = short
    again = dataclasses.replace(source).numbers(2500)
    np.testing.assert_array_equal(again, documents)
    other = dataclasses.replace(source, seed=4).numbers(2500)
    assert np.mean(other == documents) < 0.2
    assert len({document.tobytes() for document in documents}) == len(documents)


def test_it_is_a_text_to_train_on(monkeypatch, tmp_path):
    monkeypatch.setitem(zipf.SOURCES, "zipf", (40 * 8192 + 100, 8))
    found = corpus.read_corpus("zipf")
    assert found.files == 40 and found.train_bytes + found.held_out_bytes == 40 * 8192
    assert not set(found.train) & set(found.held_out)
    data = batches.load_text("zipf", "bytes", length=33, batch_size=3, seed=1, cache=tmp_path)
    assert len(data.train) + len(data.held) == 40 * (8192 + 1)  # and a separator each
    assert set(data.decode(data.batch(2)[1])) <= set(zipf.ALPHABET)
    assert corpus.read_corpus("zipf").digest == data.digests["text"]
    monkeypatch.setitem(zipf.SOURCES, "zipf", (40 * 8192, 9))
    assert corpus.read_corpus("zipf").digest != data.digests["text"]
