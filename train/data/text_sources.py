"""Sources of documents to tokenise, in parts that can be read independently: text files, tfds, Hugging Face folders."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any, Protocol

from train import disk
from train.data import corpus, datasets, hugging_face_sets, zipf
from train.errors import UserError

TFDS = "tfds:"
SHARDS = 99_999  # names of shards have five digits
SEARCHED = 1 << 20  # bytes that are searched for the end of a line


class Part(Protocol):
    """The part of a source that becomes one shard."""

    @property
    def size(self) -> int:
        """Size in the unit of its source."""
        ...

    def documents(self) -> Iterator[tuple[str, int]]:
        """Every document, and its share of `size`."""
        ...


@dataclasses.dataclass(frozen=True)
class Source:
    """Training and held-out parts; the same for the same files and arguments."""

    name: str
    unit: str  # of the sizes
    parts: dict[str, list[Part]]
    facts: dict[str, Any]  # identify the source when a command is restarted; JSON values only


@dataclasses.dataclass(frozen=True)
class Files:
    """Byte ranges of text files. Each range is one document, or an empty one if it contains a zero byte."""

    stretches: tuple[tuple[str, int, int], ...]  # path, first byte, byte after the last

    @property
    def size(self) -> int:
        return sum(stop - start for _, start, stop in self.stretches)

    def documents(self) -> Iterator[tuple[str, int]]:
        for path, start, stop in self.stretches:
            with open(path, "rb") as file:
                file.seek(start)
                content = file.read(stop - start)
            if len(content) != stop - start:
                raise UserError(f"{path} became shorter while it was being read.")
            text = "" if b"\0" in content else content.decode("utf-8", errors="replace")
            yield text, stop - start


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples of a prepared tfds data set; the text of one field is a document."""

    ranges: tuple[datasets.FileRange, ...]
    field: str

    @property
    def size(self) -> int:
        return sum(file_range.take for file_range in self.ranges)

    def documents(self) -> Iterator[tuple[str, int]]:
        for file_range in self.ranges:
            for example in datasets.read_examples(file_range, (self.field,)):
                yield example[self.field].decode("utf-8", errors="replace"), 1


def read_source(
    name: str,
    *,
    shard_bytes: int,
    split: str | None = None,
    held_out: str | None = None,
    field: str | None = None,
    data_dir: str | None = None,
) -> Source:
    """Finds the documents of a source, and divides them into parts.

    Args:
        name: "tfds:" and the name of a data set, or a source as for `corpus.read_corpus`; not a synthetic one.
        shard_bytes: approximate size of the source files in a part.
        split: part of a tfds data set to train on; None means train.
        held_out: part of a tfds data set to hold out; None means validation or test, else the end of train.
        field: field of a tfds data set that holds the text; None means the only text field, else "text".
        data_dir: folder of prepared tfds data sets.

    Raises:
        UserError: there is no such source, or an option does not apply to it; the message says how to proceed.
    """
    options = {"split": split, "held_out": held_out, "field": field, "data_dir": data_dir}
    if name.startswith(TFDS):
        return _tfds(name, shard_bytes, options)
    if hugging_face_sets.is_source(name) and data_dir is None:
        return _hugging_face(name, shard_bytes, options)
    if zipf.source(name):
        raise UserError(
            f"{name} is synthetic: each run generates the same text again, so there is nothing to tokenise."
            f" Nearest: python -m train --data.text {name} --data.tokenizer bytes."
        )
    if given := [option for option, value in options.items() if value is not None]:
        raise UserError(
            f"--{given[0]} applies to tfds data sets only, and {name!r} is not one; nearest:"
            f" --source {TFDS}NAME."
        )
    try:
        return _files(name, shard_bytes)
    except (OSError, ValueError) as error:
        raise UserError(f"There is nothing to tokenise: {error}.") from None


def _files(name: str, shard_bytes: int) -> Source:
    paths, searched = corpus.find_files(name)
    readable = {
        key: path
        for key, path in sorted(paths.items())
        if disk.kind(path) == "a file" and os.access(path, os.R_OK)
    }
    status = {key: path.stat() for key, path in readable.items()}
    sizes = {key: stat.st_size for key, stat in status.items() if stat.st_size}
    if not sizes:
        raise ValueError(f"{name!r} contains no text: searched {searched}")
    _check_count(sum(sizes.values()), shard_bytes)
    stretches: dict[str, list[tuple[str, int, int]]] = {"train": [], "held_out": []}
    for key, size in corpus.training_sizes(sizes).items():
        path, whole = str(paths[key].absolute()), sizes[key]
        cut = size if size in (0, whole) else _boundary(path, size, whole)
        for split, start, stop in (("train", 0, cut), ("held_out", cut, whole)):
            count = -(-(stop - start) // shard_bytes)
            edges = {start, stop} | {
                _boundary(path, start + (stop - start) * i // count, stop) for i in range(1, count)
            }
            ordered = sorted(edges)
            stretches[split] += [(path, *pair) for pair in itertools.pairwise(ordered)]
    parts: dict[str, list[Part]] = {
        s: _grouped(ranges, shard_bytes) for s, ranges in stretches.items()
    }
    facts = {key: [stat.st_size, stat.st_mtime_ns] for key, stat in status.items()}
    return Source(name, "bytes", parts, {"files": facts})


def _check_count(total: int, shard_bytes: int) -> None:
    """Raises UserError if a source of `total` bytes would become more shards than there are names for."""
    if total // shard_bytes > SHARDS:
        raise UserError(
            f"The source has {total:,} bytes, which would become {total // shard_bytes:,} shards; allowed are"
            f" {SHARDS:,}. Nearest: --shard_megabytes {max(0.001, total / SHARDS / 1e6):.3g}."
        )


def _grouped(stretches: list[tuple[str, int, int]], shard_bytes: int) -> list[Part]:
    groups: list[list[tuple[str, int, int]]] = []
    room = 0
    for path, start, stop in stretches:
        if not groups or stop - start > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append((path, start, stop))
        room -= stop - start
    return [Files(tuple(group)) for group in groups]


def _boundary(path: str, position: int, stop: int) -> int:
    """The next end of a line after `position`, or of a character if no line ends within `SEARCHED` bytes."""
    with open(path, "rb") as file:
        file.seek(position)
        ahead = file.read(min(SEARCHED, stop - position))
    line = ahead.find(b"\n") + 1
    if line:
        return position + line
    return position + next((i for i, byte in enumerate(ahead) if byte & 0xC0 != 0x80), len(ahead))


def _hugging_face(name: str, shard_bytes: int, options: dict[str, Any]) -> Source:
    chosen = (options["field"], options["split"], options["held_out"])
    rows, facts = hugging_face_sets.find(name, *chosen)
    parts: dict[str, list[Part]] = {
        key: [*hugging_face_sets.in_parts(found, shard_bytes)] for key, found in rows.items()
    }
    return Source(name, "documents", parts, facts)


def _tfds(name: str, shard_bytes: int, options: dict[str, Any]) -> Source:
    builder = datasets.builder(name.removeprefix(TFDS), options["data_dir"])
    splits = list(builder.info.splits)
    split, held_out = options["split"] or "train", options["held_out"]
    if held_out is None:
        other = next((s for s in ("validation", "test") if s in splits), None)
        if other is None and options["split"] is None:
            split, other = "train[:95%]", "train[95%:]"
        if other is None:
            raise UserError(
                f"{name} has no split validation or test; hold out a part of another, for example with"
                f" --split '{splits[0]}[:95%]' --held_out '{splits[0]}[95%:]'."
            )
        held_out = other
    texts = [f for f, kind in builder.info.features.items() if type(kind).__name__ == "Text"]
    field = options["field"] or (texts[0] if len(texts) == 1 else "text")
    datasets.check_field(builder, field, "Text")
    datasets.check_disjoint(builder, split, held_out)
    parts: dict[str, list[Part]] = {}
    facts = datasets.describe(builder)
    _check_count(sum(facts["files"].values()), shard_bytes)
    for key, wanted in (("train", split), ("held_out", held_out)):
        ranges = datasets.file_ranges(builder, wanted, shard_bytes)
        parts[key] = [Examples((file_range,), field) for file_range in ranges]
    facts |= {"split": split, "held_out": held_out, "field": field}
    label = f"{TFDS}{facts['name']} {field} ({split}; held out: {held_out})"
    return Source(label, "documents", parts, facts)
