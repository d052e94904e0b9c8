"""Documents to tokenise, in parts that can be read on their own: text files, or a prepared tfds data set."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import Any, Protocol

from train.data import corpus, datasets, zipf
from train.errors import UserError

TFDS = "tfds:"
SEARCHED = 1 << 20  # bytes in which a cut looks for the end of a line


class Part(Protocol):
    """What becomes one shard."""

    @property
    def size(self) -> int:
        """In the unit of its source."""
        ...

    def documents(self) -> Iterator[tuple[str, int]]:
        """Every document, and how much of `size` it is."""
        ...


@dataclasses.dataclass(frozen=True)
class Source:
    """Parts to train on and parts held out; the same for the same files and arguments."""

    name: str
    unit: str  # of the sizes
    parts: dict[str, list[Part]]
    facts: dict[str, Any]  # by which a restarted command knows its source again: JSON values


@dataclasses.dataclass(frozen=True)
class Files:
    """Stretches of text files; each stretch is a document. Files with a zero byte are no text."""

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
                raise UserError(f"{path} has become shorter while it was read.")
            text = "" if b"\0" in content else content.decode("utf-8", errors="replace")
            yield text, stop - start


@dataclasses.dataclass(frozen=True)
class Examples:
    """Examples of a prepared tfds data set; the text of one field is a document."""

    pieces: tuple[datasets.Piece, ...]
    field: str

    @property
    def size(self) -> int:
        return sum(piece.take for piece in self.pieces)

    def documents(self) -> Iterator[tuple[str, int]]:
        for piece in self.pieces:
            for example in datasets.examples(piece, (self.field,)):
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
    """The source called `name`: "tfds:" and a data set's name, or what `corpus.read` takes.

    Args:
        name: of the source; none that is made up.
        shard_bytes: of source files in a part, about.
        split: of a tfds data set, to train on; None: train.
        held_out: of a tfds data set; None: validation or test, or the end of the split train.
        field: of a tfds data set, that holds the text; None: text, or the only one.
        data_dir: where data sets are prepared.

    Raises:
        UserError: nothing there, or options that the source does not have; says what to do.
    """
    options = {"split": split, "held_out": held_out, "field": field, "data_dir": data_dir}
    if name.startswith(TFDS):
        return _tfds(name, shard_bytes, options)
    if zipf.source(name):
        raise UserError(
            f"{name} is made by the run that learns from it, each time the same: there is nothing to"
            f" tokenise. Nearest: python -m train --data.text {name} --data.tokenizer bytes."
        )
    if given := [option for option, value in options.items() if value is not None]:
        raise UserError(
            f"--{given[0]} belongs to a tfds data set, and {name!r} is none; nearest:"
            f" --source {TFDS}NAME."
        )
    try:
        return _files(name, shard_bytes)
    except (OSError, ValueError) as error:
        raise UserError(f"There is nothing to tokenise: {error}.") from None


def _files(name: str, shard_bytes: int) -> Source:
    paths, searched = corpus.find(name)
    status = {key: path.stat() for key, path in sorted(paths.items()) if os.access(path, os.R_OK)}
    sizes = {key: found.st_size for key, found in status.items() if found.st_size}
    if not sizes:
        raise ValueError(f"no text in {name!r}: searched {searched}")
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
        s: _grouped(found, shard_bytes) for s, found in stretches.items()
    }
    facts = {key: [found.st_size, found.st_mtime_ns] for key, found in status.items()}
    return Source(name, "bytes", parts, {"files": facts})


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
    """The end of a line after `position`; of a character where no line ends soon."""
    with open(path, "rb") as file:
        file.seek(position)
        ahead = file.read(min(SEARCHED, stop - position))
    line = ahead.find(b"\n") + 1
    if line:
        return position + line
    return position + next((i for i, byte in enumerate(ahead) if byte & 0xC0 != 0x80), len(ahead))


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
                f"{name} has no split validation or test; name what to hold out of it, for example"
                f" --split '{splits[0]}[:95%]' --held_out '{splits[0]}[95%:]'."
            )
        held_out = other
    texts = [f for f, kind in builder.info.features.items() if type(kind).__name__ == "Text"]
    field = options["field"] or (texts[0] if len(texts) == 1 else "text")
    datasets.check_field(builder, field, "Text")
    datasets.apart(builder, split, held_out)
    parts: dict[str, list[Part]] = {}
    for key, wanted in (("train", split), ("held_out", held_out)):
        found = datasets.pieces(builder, wanted, shard_bytes)
        parts[key] = [Examples((piece,), field) for piece in found]
    facts = datasets.describe(builder) | {"split": split, "held_out": held_out, "field": field}
    label = f"{TFDS}{facts['name']} {field} ({split}; held out: {held_out})"
    return Source(label, "documents", parts, facts)
