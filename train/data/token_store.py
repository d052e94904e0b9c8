"""Encoded text on disk: written once, read by any number of runs without a copy in memory.

    manifest.json              what follows, with a digest of every file; written last
    tokenizer.json             the vocabulary; empty for bytes
    train-00000.tokens         all tokens of a shard, every document followed by the separator
    train-00000.ends           where each document ends, counted from the shard's start; int64
    held_out-00000.tokens ...  the same for the held-out text

Names of files follow from the manifest's counts, so that no manifest can point elsewhere. The
digest of a store is that of its manifest, and so depends on every byte of it.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.data import tokens

FORMAT = 1
SPLITS = ("train", "held_out")
ENDS = np.dtype("<i8")
_HASH = re.compile("[0-9a-f]{64}")


class Damaged(ValueError):
    """A store that is not as its manifest says, or whose manifest says nothing."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One long row of tokens, in one or more arrays, and where its documents end."""

    arrays: Sequence[np.ndarray]  # unsigned integers [tokens]
    ends: Sequence[np.ndarray]  # for each array, int64 [documents], ascending; the last is its size

    @classmethod
    def of(cls, array: np.ndarray, separator: int) -> "Row":
        """A row in memory, where every document is followed by `separator`."""
        ends = np.flatnonzero(array == separator) + 1
        if len(array) and (not len(ends) or ends[-1] != len(array)):
            ends = np.append(ends, len(array))
        return cls((array,), (ends,))

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        """Where in the row each array begins, and the end."""
        return np.concatenate([[0], np.cumsum([len(a) for a in self.arrays])]).astype(np.int64)

    @functools.cached_property
    def _documents(self) -> np.ndarray:
        """How many documents stand before each array, and in all."""
        return np.concatenate([[0], np.cumsum([len(e) for e in self.ends])]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def documents(self) -> int:
        return int(self._documents[-1])

    def windows(self, start: np.ndarray, length: int) -> np.ndarray:
        """int32 [rows, length]: the tokens from each `start` on, across the borders of arrays."""
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

    def cut(self, document: np.ndarray, length: int, fill: int) -> np.ndarray:
        """int32 [rows, length]: a document each, filled up with `fill`.

        A longer document loses its end but not the separator, as a tokenizer that cuts texts to a
        length puts its end token last.
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
        """All tokens, or about `count` of them in stretches that are spread evenly."""
        stretches = 1000
        if len(self) <= count:
            return np.concatenate([np.asarray(a) for a in self.arrays])
        length = count // stretches
        start = np.linspace(0, len(self) - length, stretches).astype(np.int64)
        return self.windows(start, length).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a manifest says about one shard."""

    tokens: int
    documents: int
    bytes: int  # of text in UTF-8
    tokens_sha256: str
    ends_sha256: str


@dataclasses.dataclass(frozen=True)
class Store:
    """An opened store: its facts, its tokenizer, and its two rows of tokens, mapped into memory."""

    folder: pathlib.Path
    source: str  # what it was made from, for people
    digest: str  # sha256 of the manifest
    tokenizer: tokens.Tokenizer
    shards: dict[str, tuple[Shard, ...]]

    @functools.cached_property
    def train(self) -> Row:
        return self._row("train")

    @functools.cached_property
    def held_out(self) -> Row:
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
        width = tokens.dtype(self.tokenizer.vocab_size).itemsize
        shards = [shard for split in SPLITS for shard in self.shards[split]]
        return sum(width * s.tokens + ENDS.itemsize * s.documents for s in shards)

    def _row(self, split: str) -> Row:
        kind, arrays, ends = tokens.dtype(self.tokenizer.vocab_size), [], []
        for name, shard in named(split, self.shards[split]):
            for suffix, dtype, count, out in (
                (".tokens", kind, shard.tokens, arrays),
                (".ends", ENDS, shard.documents, ends),
            ):
                path = self.folder / (name + suffix)
                out.append(np.memmap(path, dtype, "r") if count else np.zeros(0, dtype))
        return Row(arrays, ends)

    def verify(self, say: Any = lambda text: None) -> None:
        """Reads everything once.

        Raises:
          Damaged: a digest, an order of ends or a token is not as it must be; names the file.
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
                        found = hashlib.file_digest(file, "sha256").hexdigest()
                    if found != digest:
                        raise Damaged(f"{path} is damaged: its sha256 is {found}, not {digest}")
            row = self._row(split)
            for (name, _), array, ends in zip(
                named(split, self.shards[split]), row.arrays, row.ends
            ):
                _check_shard(self.folder / name, array, ends, self.tokenizer.vocab_size)


def named(split: str, shards: Sequence[Any]) -> list[tuple[str, Any]]:
    """The shards of a split with the names of their files, without suffix."""
    return [(shard_name(split, i), shard) for i, shard in enumerate(shards)]


def shard_name(split: str, index: int) -> str:
    return f"{split}-{index:05d}"


def open_store(folder: str | pathlib.Path) -> Store:
    """The store in `folder`, whose files have the sizes that its manifest says.

    Raises:
      FileNotFoundError: there is no manifest.
      Damaged: the manifest is none, or a file is missing, a link to elsewhere or of another size.
    """
    folder = pathlib.Path(folder).expanduser()
    path = folder / "manifest.json"
    if not path.is_file():
        begun = " (it was begun and not finished)" if (folder / "plan.json").is_file() else ""
        raise FileNotFoundError(
            f"{folder} holds no manifest.json and so is no token store{begun}; make one with"
            f" python -m train tokenise --out {folder} --source TEXT"
        )
    content = path.read_bytes()
    facts, shards = _parse(content, path)
    vocabulary = _inside(folder, "tokenizer.json").read_bytes()
    said = facts["tokenizer"]
    if hashlib.sha256(vocabulary).hexdigest() != said["sha256"]:
        raise Damaged(f"{folder / 'tokenizer.json'} is damaged: its sha256 is not {said['sha256']}")
    tokenizer = tokens.restore(said["name"], vocabulary.decode(), said["separator"])
    if (tokenizer.vocab_size, tokenizer.separator) != (said["vocab_size"], said["separator"]):
        raise Damaged(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, not as it says")
    width = tokens.dtype(tokenizer.vocab_size).itemsize
    for split in SPLITS:
        for name, shard in named(split, shards[split]):
            for suffix, size in (
                (".tokens", width * shard.tokens),
                (".ends", ENDS.itemsize * shard.documents),
            ):
                file = _inside(folder, name + suffix)
                if file.stat().st_size != size:
                    raise Damaged(f"{file} has {file.stat().st_size} bytes; {path} says {size}")
    digest = hashlib.sha256(content).hexdigest()
    return Store(folder, facts["source"], digest, tokenizer, shards)


def manifest(source: str, tokenizer: tokens.Tokenizer, shards: dict[str, list[Shard]]) -> bytes:
    """The manifest of a finished store: the same bytes for the same content."""
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
    """Facts and shards of a manifest, every one of the type and range that it must have."""
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is not JSON: {error}") from None

    def need(good: bool, what: str) -> None:
        if not good:
            raise Damaged(f"{path}: {what}")

    def keys(found: Any, wanted: Sequence[str], where: str) -> None:
        need(isinstance(found, dict) and set(found) == set(wanted), f"{where} must have {wanted}")

    keys(facts, ("format", "source", "tokenizer", "shards"), "the manifest")
    need(facts["format"] == FORMAT, f"format {facts['format']!r} is not {FORMAT}")
    need(isinstance(facts["source"], str), "source must be a text")
    said = facts["tokenizer"]
    keys(said, ("name", "vocab_size", "separator", "sha256"), "tokenizer")
    need(isinstance(said["name"], str), "tokenizer.name must be a text")
    for name in ("vocab_size", "separator"):
        need(_count(said[name], 1 << 32), f"tokenizer.{name} = {said[name]!r} is no token count")
    need(_is_hash(said["sha256"]), "tokenizer.sha256 is no digest")
    keys(facts["shards"], SPLITS, "shards")
    fields = [field.name for field in dataclasses.fields(Shard)]
    shards = {}
    for split in SPLITS:
        listed = facts["shards"][split]
        need(isinstance(listed, list), f"shards.{split} must be a list")
        for i, found in enumerate(listed):
            where = f"shards.{split}[{i}]"
            keys(found, fields, where)
            for name, value in found.items():
                good = _is_hash(value) if name.endswith("sha256") else _count(value, 1 << 53)
                need(
                    good,
                    f"{where}.{name} = {value!r} is no {'digest' if '256' in name else 'count'}",
                )
            need(found["documents"] <= found["tokens"], f"{where} has documents without tokens")
            need((found["tokens"] > 0) == (found["documents"] > 0), f"{where} has no documents")
        shards[split] = tuple(Shard(**found) for found in listed)
    return facts, shards


def _count(value: Any, below: int) -> bool:
    return type(value) is int and 0 <= value < below


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """A file of the folder itself."""
    path = folder / name
    if not path.is_file():
        raise Damaged(f"{path} is missing")
    if path.resolve().parent != folder.resolve():
        raise Damaged(f"{path} is a link to {path.resolve()}, outside of the store")
    return path


def _check_shard(path: pathlib.Path, array: np.ndarray, ends: np.ndarray, vocab_size: int) -> None:
    if len(ends) and (ends[0] < 1 or ends[-1] != len(array) or (np.diff(ends) < 1).any()):
        raise Damaged(f"{path}.ends: document ends must ascend from 1 to {len(array)}")
    if len(array) and int(array.max()) >= vocab_size:
        raise Damaged(f"{path}.tokens holds token {int(array.max())} of {vocab_size}")
