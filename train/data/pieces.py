"""Where long texts are cut: the library `tokenizers` needs about 50 bytes for each character that it encodes at once.

A text is cut at the first end of line after every `PIECE` characters, else at a space, else after `2 * PIECE`. Byte
pairs are learned from words, and a "word" of millions of characters, such as one line of base64, takes the library
hours. So words longer than `LONGEST_WORD` are divided for learning, and an even sample of them is used.
"""

import re
from collections.abc import Iterable, Iterator

PIECE = 1_000_000  # characters encoded at once
LONGEST_WORD = 1_000  # characters
PART = 100  # characters of the parts that longer words are divided into
PARTS = 20_000  # that are learned from, about
_LONG = re.compile(rf"(?<!\S)\S{{{LONGEST_WORD},}}|(?<!\s)\s{{{LONGEST_WORD},}}")


def pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Divides a text; yields (piece, whether it is last)."""
    start = 0
    while len(text) - start > PIECE:
        first, last = start + PIECE, start + 2 * PIECE
        stop = text.find("\n", first, last) + 1
        if not stop and last < len(text):
            space = text.find(" ", first, last)
            stop = last if space < 0 else space
        if not stop or stop == len(text):
            break
        yield text[start:stop], False
        start = stop
    yield text[start:], True


def batches(divided: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Groups pieces for the threads of the library."""
    batch, size = [], 0
    for piece in divided:
        batch.append(piece)
        size += len(piece[0])
        if size > 4 * PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def learnable(texts: Iterable[str], long: int) -> Iterator[str]:
    """The pieces of texts, in which overlong words are divided.

    Args:
      texts: to learn from.
      long: characters in overlong words, from `overlong`.
    """
    every, number = 1 + long // PART // PARTS, 0
    for text in texts:
        for piece, _ in pieces(text):
            done = 0
            for word in _LONG.finditer(piece) if long else ():
                yield piece[done : word.start()]
                done = word.end()
                for begin in range(word.start(), done, PART):
                    if number % every == 0:
                        yield piece[begin : min(begin + PART, done)]
                    number += 1
            yield piece[done:]


def overlong(texts: Iterable[str]) -> int:
    """Characters in words longer than `LONGEST_WORD`."""
    return sum(
        word.end() - word.start()
        for text in texts
        for piece, _ in pieces(text)
        for word in _LONG.finditer(piece)
    )
