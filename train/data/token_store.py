"""Token stores: encoded text on disk, which is written once and which any number of runs map into memory.

    manifest.json              sizes and digests of all other files; written last
    tokenizer.json             the vocabulary; empty for bytes
    train-00000.tokens         all tokens of a shard, with the separator after every document
    train-00000.ends           end of each document, counted from the start of the shard; int64
    held_out-00000.tokens ...  the same for the held-out text

File names follow from the manifest's counts, so a manifest cannot point to files elsewhere. The digest of a store is
that of its manifest, and so depends on every byte of the store.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from train import disk
from train.data import tokens

FORMAT = 1
SPLITS = ("train", "held_out")
ENDS = np.dtype("<i8")
_HASH = re.compile("[0-9a-f]{64}")


class Damaged(ValueError):
    """The files of a store contradict its manifest, or the manifest is malformed."""


@dataclasses.dataclass(frozen=True)
class TokenSequence:
    """A long sequence of tokens in one or more arrays, and the ends of its documents."""

    arrays: Sequence[np.ndarray]  # unsigned integers [tokens]
    ends: Sequence[np.ndarray]  # for each array, int64 [documents], ascending; the last is its size

    @classmethod
    def from_array(cls, array: np.ndarray, separator: int) -> "TokenSequence":
        """A sequence in memory, in which `separator` follows every document."""
        ends = np.flatnonzero(array == separator) + 1
        if len(array) and (not len(ends) or ends[-1] != len(array)):
            ends = np.append(ends, len(array))
        return cls((array,), (ends,))

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """Start of each array in the sequence, and the end of the last."""
        return np.concatenate([[0], np.cumsum([len(a) for a in self.arrays])]).astype(np.int64)

    @functools.cached_property
    def _documents(self) -> np.ndarray:
        """Number of documents before each array, and in total."""
        return np.concatenate([[0], np.cumsum([len(e) for e in self.ends])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def documents(self) -> int:
        return int(self._documents[-1])

    def windows(self, start: np.ndarray, length: int) -> np.ndarray:
        """The `length` tokens from each `start` on, also across arrays; int32 [rows, length]."""
        if len(self.arrays) == 1:
            return self.arrays[0][start[:, None] + np.arange(length)].astype(np.int32)
        out = np.empty((len(start), length), np.int32)
        first = np.searchsorted(self._starts, start, side="right") - 1
        for row, (begin, shard) in enumerate(zip(start.tolist(), first.tolist())):
            done = 0
            while done < length:
                offset = begin + done - int(self._starts[shard])
                part = self.arrays[shard][offset : offset + length - done]
                out[row, done : done + len(part)] = part
                done, shard = done + len(part), shard + 1
        return out

    def padded_documents(self, document: np.ndarray, length: int, fill: int) -> np.ndarray:
        """One document per row, padded with `fill`; int32 [rows, length].

        A longer document is truncated, but keeps the separator as its last token, like the output of a tokenizer
        that truncates.
        """
        out = np.full((len(document), length), fill, np.int32)
        shards = np.searchsorted(self._documents, document, side="right") - 1
        for row, (number, shard) in enumerate(zip(document.tolist(), shards.tolist())):
            ends = self.ends[shard]
            number -= int(self._documents[shard])
            start, end = int(ends[number - 1]) if number else 0, int(ends[number])
            part = self.arrays[shard][start : min(end, start + length)]
            out[row, : len(part)] = part
            if end - start > length:
                out[row, -1] = self.arrays[shard][end - 1]
        return out

    def sample(self, count: int) -> np.ndarray:
        """All tokens, or about `count` of them in evenly spread stretches."""
        stretches = 1000
        if len(self) <= count:
            return np.concatenate([np.asarray(a) for a in self.arrays])
        length = count // stretches
        start = np.linspace(0, len(self) - length, stretches).astype(np.int64)
        return self.windows(start, length).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Shard:
    """The manifest's facts about one shard."""

    tokens: int
    documents: int
    bytes: int  # of text in UTF-8
    tokens_sha256: str
    ends_sha256: str


@dataclasses.dataclass(frozen=True)
class Store:
    """An opened store. Its training and held-out tokens are mapped into memory."""

    folder: pathlib.Path
    source: str  # description of the text that it was made from
    digest: str  # SHA-256 of the manifest
    tokenizer: tokens.Tokenizer
    shards: dict[str, tuple[Shard, ...]]

    @functools.cached_property
    def train(self) -> TokenSequence:
        return self._row("train")

    @functools.cached_property
    def held_out(self) -> TokenSequence:
        return self._row("held_out")

    @property
    def train_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards["train"])

    @property
    def held_out_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards["held_out"])

    @property
    def size(self) -> int:
        """Bytes of tokens and ends."""
        width = tokens.token_dtype(self.tokenizer.vocab_size).itemsize
        shards = [shard for split in SPLITS for shard in self.shards[split]]
        return sum(width * s.tokens + ENDS.itemsize * s.documents for s in shards)

    def _row(self, split: str) -> TokenSequence:
        kind, arrays, ends = tokens.token_dtype(self.tokenizer.vocab_size), [], []
        for name, shard in named(split, self.shards[split]):
            for suffix, dtype, count, out in (
                (".tokens", kind, shard.tokens, arrays),
                (".ends", ENDS, shard.documents, ends),
            ):
                path = self.folder / (name + suffix)
                out.append(np.memmap(path, dtype, "r") if count else np.zeros(0, dtype))
        return TokenSequence(arrays, ends)

    def verify(self, say: Any = lambda text: None) -> None:
        """Reads every file once, and compares it with its digest.

        Raises:
          Damaged: a digest differs, document ends are not in order, or a token is not in the vocabulary; the message
            names the file.
        """
        for split in SPLITS:
            for name, shard in named(split, self.shards[split]):
                say(name)
                for suffix, digest in (
                    (".tokens", shard.tokens_sha256),
                    (".ends", shard.ends_sha256),
                ):
                    path = self.folder / (name + suffix)
                    with path.open("rb") as file:
                        actual = hashlib.file_digest(file, "sha256").hexdigest()
                    if actual != digest:
                        raise Damaged(
                            f"{path} is damaged: its SHA-256 is {actual} instead of {digest}"
                        )
            row = self._row(split)
            for (name, _), array, ends in zip(
                named(split, self.shards[split]), row.arrays, row.ends
            ):
                _check_shard(self.folder / name, array, ends, self.tokenizer.vocab_size)


def named(split: str, shards: Sequence[Any]) -> list[tuple[str, Any]]:
    """The shards of a split, each with its file name without suffix."""
    return [(shard_name(split, i), shard) for i, shard in enumerate(shards)]


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}"


def open_store(folder: str | pathlib.Path) -> Store:
    """Opens the store in `folder`, and checks that its files have the sizes in the manifest.

    Raises:
      FileNotFoundError: there is no manifest.
      Damaged: the manifest is malformed, or a file is missing, has another size, or is a link out of the folder.
    """
    folder = disk.user_path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        begun = " (it was begun and not finished)" if (folder / "plan.json").is_file() else ""
        raise FileNotFoundError(
            f"{folder} holds no manifest.json, so it is not a token store{begun}; make one with"
            f" python -m train tokenise --out {shlex.quote(str(folder))} --source TEXT"
        )
    content = disk.read_file(path, disk.JSON_FILE)
    facts, shards = _parse(content, path)
    vocabulary = disk.read_file(_inside(folder, "tokenizer.json"), disk.JSON_FILE)
    expected = facts["tokenizer"]
    if hashlib.sha256(vocabulary).hexdigest() != expected["sha256"]:
        raise Damaged(
            f"{folder / 'tokenizer.json'} is damaged: its SHA-256 is not {expected['sha256']}"
        )
    try:
        tokenizer = tokens.tokenizer_from_json(
            expected["name"], vocabulary.decode(), expected["separator"]
        )
    except ValueError as error:
        raise Damaged(f"{folder / 'tokenizer.json'} cannot be used: {error}") from None
    actual = (tokenizer.vocab_size, tokenizer.separator)
    if actual != (expected["vocab_size"], expected["separator"]):
        raise Damaged(
            f"{path} lists a tokenizer of {expected['vocab_size']} tokens with separator"
            f" {expected['separator']}, but the vocabulary has {actual[0]} and {actual[1]}"
        )
    width = tokens.token_dtype(tokenizer.vocab_size).itemsize
    for split in SPLITS:
        for name, shard in named(split, shards[split]):
            for suffix, size in (
                (".tokens", width * shard.tokens),
                (".ends", ENDS.itemsize * shard.documents),
            ):
                file = _inside(folder, name + suffix)
                if file.stat().st_size != size:
                    raise Damaged(f"{file} has {file.stat().st_size} bytes instead of {size}")
    digest = hashlib.sha256(content).hexdigest()
    return Store(folder, facts["source"], digest, tokenizer, shards)


def manifest(source: str, tokenizer: tokens.Tokenizer, shards: dict[str, list[Shard]]) -> bytes:
    """The manifest of a finished store; the same bytes for the same content."""
    facts = {
        "format": FORMAT,
        "source": source,
        "tokenizer": tokenizer_facts(tokenizer),
        "shards": {split: [vars(s) for s in shards[split]] for split in SPLITS},
    }
    return (json.dumps(facts, indent=1) + "\n").encode()


def tokenizer_facts(tokenizer: tokens.Tokenizer) -> dict[str, Any]:
    return {
        "name": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
        "sha256": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
    }


def _parse(
    content: bytes, path: pathlib.Path
) -> tuple[dict[str, Any], dict[str, tuple[Shard, ...]]]:
    """Facts and shards of a manifest. Raises Damaged unless every value has its type and range."""
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not JSON: {error}") from None

    def need(good: bool, what: str) -> None:
        if not good:
            raise Damaged(f"{path}: {what}")

    def keys(value: Any, wanted: Sequence[str], where: str) -> None:
        need(isinstance(value, dict) and set(value) == set(wanted), f"{where} must have {wanted}")

    keys(facts, ("format", "source", "tokenizer", "shards"), "the manifest")
    need(facts["format"] == FORMAT, f"format = {facts['format']!r} must be {FORMAT}")
    need(isinstance(facts["source"], str), "source must be a string")
    described = facts["tokenizer"]
    keys(described, ("name", "vocab_size", "separator", "sha256"), "tokenizer")
    need(isinstance(described["name"], str), "tokenizer.name must be a string")
    for name in ("vocab_size", "separator"):
        value = described[name]
        need(_is_count(value, 1 << 32), f"tokenizer.{name} = {value!r} must be 0 to 2^32 - 1")
    need(_is_digest(described["sha256"]), "tokenizer.sha256 must be 64 hexadecimal digits")
    keys(facts["shards"], SPLITS, "shards")
    fields = [field.name for field in dataclasses.fields(Shard)]
    shards = {}
    for split in SPLITS:
        listed = facts["shards"][split]
        need(isinstance(listed, list), f"shards.{split} must be a list")
        for i, shard in enumerate(listed):
            where = f"shards.{split}[{i}]"
            keys(shard, fields, where)
            for name, value in shard.items():
                if name.endswith("sha256"):
                    need(_is_digest(value), f"{where}.{name} must be 64 hexadecimal digits")
                else:
                    need(_is_count(value, 1 << 53), f"{where}.{name} = {value!r} is not a count")
            need(shard["documents"] <= shard["tokens"], f"{where} has documents without tokens")
            need((shard["tokens"] > 0) == (shard["documents"] > 0), f"{where} has no documents")
        shards[split] = tuple(Shard(**shard) for shard in listed)
    return facts, shards


def _is_count(value: Any, below: int) -> bool:
    return type(value) is int and 0 <= value < below


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A file of the folder, which must not be a link to a file elsewhere."""
    path = folder / name
    if not path.is_file():
        raise Damaged(f"{path} is missing")
    if path.resolve().parent != folder.resolve():
        raise Damaged(f"{path} is a link to {path.resolve()}, outside the store")
    return path


def _check_shard(path: pathlib.Path, array: np.ndarray, ends: np.ndarray, vocab_size: int) -> None:
    if len(ends) and (ends[0] < 1 or ends[-1] != len(array) or (np.diff(ends) < 1).any()):
        raise Damaged(f"{path}.ends: document ends must ascend from 1 to {len(array)}")
    if len(array) and int(array.max()) >= vocab_size:
        raise Damaged(
            f"{path}.tokens holds token {int(array.max())}, but the vocabulary ends at {vocab_size - 1}"
        )
