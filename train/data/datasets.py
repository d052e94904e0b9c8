"""Data sets that tensorflow-datasets has prepared, found and read without TensorFlow.

A data set is named as tfds names it: `c4/en:3.0.1` is version 3.0.1 of configuration en of c4, in the
folder c4/en/3.0.1 below the data folder. Without a version the highest that is there is taken. Both
forms on disk are read: array_record through tfds's own data source, tfrecord by `tfrecord_file.py`.
"""

import dataclasses
import difflib
import importlib.util
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train.errors import UserError

AGAIN = "Prepare the data set again, or copy its files again."
NAME = re.compile(r"[A-Za-z0-9_]+(/[A-Za-z0-9_.+-]+)?(:\d+\.\d+\.\d+)?")


@dataclasses.dataclass(frozen=True)
class Piece:
    """Examples that follow each other in one file of a prepared data set."""

    folder: str
    file: str
    skip: int  # examples of the file before the first
    take: int
    whole: int  # examples that the file must hold


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Examples of a split that is prepared as array_record, by their number."""

    source: Any  # as tfds opens it
    pieces: tuple[Piece, ...]  # of one file each

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            return self.source[number]
        except (ValueError, RuntimeError, OSError, LookupError) as error:
            raise UserError(f"{self.place(number)} cannot be read: {error}. {AGAIN}") from None

    def place(self, number: int) -> str:
        """Which example of which file that is, in words."""
        for piece in self.pieces:
            if number < piece.take:
                path = pathlib.Path(piece.folder, piece.file)
                return f"Example {piece.skip + number} of {path}"
            number -= piece.take
        raise IndexError(number)


def data_folder(asked: str | None) -> pathlib.Path:
    """Where prepared data sets are: as asked for, or TFDS_DATA_DIR, or tfds's own default."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(asked or default).expanduser()


def builder(name: str, data_dir: str | None = None, flag: str = "--data_dir") -> Any:
    """The tfds builder of a prepared data set, which reads and never downloads; `flag` names its folder.

    Raises:
        UserError: a malformed name, a missing package, or nothing prepared; says what to run where.
    """
    if not all(map(importlib.util.find_spec, ("tensorflow_datasets", "google_crc32c"))):
        raise UserError(
            f"Reading {name} needs the packages tensorflow-datasets and google-crc32c (not TensorFlow):"
            " pip install 'tensorflow-datasets>=4.9.10' google-crc32c into the environment that runs this."
        )
    import tensorflow_datasets as tfds

    if NAME.fullmatch(name) is None:
        raise UserError(
            f"{name!r} is not the name of a data set, which is NAME, NAME/CONFIG or"
            " NAME/CONFIG:VERSION; for example c4/en:3.0.1."
        )
    root = data_folder(data_dir)
    plain, _, version = name.partition(":")
    versions = _versions(root / plain)
    if not versions or (version and version not in versions):
        raise UserError(_missing(name, root, versions, flag))
    folder = root / plain / (version or versions[-1])
    try:
        return tfds.builder_from_directory(str(folder))
    # What the reader of JSON raises is no ValueError of Python's.
    except Exception as error:
        raise UserError(f"{folder} is not what tfds prepares: {error}. {AGAIN}") from None


def describe(source: Any) -> dict[str, Any]:
    """What a builder reads, by the facts that its files give: JSON values only."""
    info = source.info
    folder = pathlib.Path(source.data_path)
    files = sorted(p for p in folder.iterdir() if p.is_file())
    return {
        "name": info.full_name,
        "format": info.file_format.value if info.file_format else "unknown",
        "files": {p.name: p.stat().st_size for p in files},
    }


def pieces(source: Any, split: str, largest: int) -> list[Piece]:
    """A split such as `train` or `train[:99%]` in pieces of at most `largest` bytes, where files allow.

    A tfrecord file can only be read from its start, so there a piece is as large as its file.

    Raises:
        UserError: no such split, nothing in that part of it, or a file that is not there.
    """
    info = source.info
    try:
        instructions = info.splits[split].file_instructions
    except (ValueError, KeyError):
        raise UserError(
            f"{info.full_name} has no split {split!r}; it has {', '.join(info.splits)} and parts of"
            f" them such as '{next(iter(info.splits))}[:99%]'."
        ) from None
    random_access, found = is_random_access(source), []
    for part in instructions:
        path = pathlib.Path(str(part.filename))
        if not path.is_file():
            raise UserError(f"{path} is missing. {AGAIN}")
        take = part.examples_in_shard - part.skip if part.take < 0 else part.take
        count = 1
        if random_access and take:
            share = path.stat().st_size * take / part.examples_in_shard
            count = min(take, max(1, -int(-share // largest)))
        edges = [take * i // count for i in range(count + 1)]
        for start, stop in itertools.pairwise(edges):
            if stop > start:
                found.append(
                    Piece(
                        *(str(source.data_path), path.name, part.skip + start, stop - start),
                        part.examples_in_shard,
                    )
                )
    if not found:
        raise UserError(f"{split!r} of {info.full_name} is empty; name a larger part.")
    return found


def numbered(source: Any, split: str, undecoded: str) -> Numbered:
    """A split that is prepared as array_record; one field of it as the bytes that are stored."""
    import tensorflow_datasets as tfds

    decoders = {undecoded: tfds.decode.SkipDecoding()}
    opened = source.as_data_source(split=split, decoders=decoders)
    return Numbered(opened, tuple(pieces(source, split, 1 << 62)))


def apart(source: Any, split: str, held_out: str) -> None:
    """Refuses parts of a data set that have examples in common, and such as `pieces` refuses."""
    whole = [pieces(source, wanted, 1 << 62) for wanted in (split, held_out)]
    common = sum(
        max(0, min(a.skip + a.take, b.skip + b.take) - max(a.skip, b.skip))
        for a, b in itertools.product(*whole)
        if a.file == b.file
    )
    if common:
        raise UserError(
            f"Of {source.info.full_name}, {split!r} to train on and {held_out!r} to evaluate on have"
            f" {common} examples in common; name parts that have none, such as 'train[:95%]' and"
            " 'train[95%:]'."
        )


def examples(piece: Piece, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The examples of a piece, as tfds decodes them, with `fields` alone.

    Raises:
        UserError: a file that holds more or fewer examples than the data set says, or is torn.
    """
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(piece.folder)
    features = source.info.features
    path = str(pathlib.Path(piece.folder, piece.file))
    try:
        for raw in _records(source, path, piece):
            example = features.deserialize_example_np(raw)
            yield {name: example[name] for name in fields}
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}. {AGAIN}") from None


def _records(source: Any, path: str, piece: Piece) -> Iterator[bytes]:
    """Serialised examples `skip` to `skip + take` of a file."""
    if is_random_access(source):
        from array_record.python import array_record_data_source

        with array_record_data_source.ArrayRecordDataSource([path]) as records:
            if len(records) != piece.whole:
                raise ValueError(f"it holds {len(records)} examples, not {piece.whole}")
            for start in range(piece.skip, piece.skip + piece.take, 256):
                stop = min(start + 256, piece.skip + piece.take)
                yield from records.__getitems__(list(range(start, stop)))
        return
    from train.data import tfrecord_file

    done = 0
    # To the end, whatever is wanted: only so is a file that lost its end noticed.
    for done, raw in enumerate(tfrecord_file.records(path), 1):
        if piece.skip < done <= piece.skip + piece.take:
            yield raw
    if done != piece.whole:
        raise ValueError(f"it holds {done} examples, not {piece.whole}")


def is_random_access(source: Any) -> bool:
    """Whether a data set is prepared as array_record; refuses everything but that and tfrecord."""
    form = source.info.file_format.value if source.info.file_format else "unknown"
    if form not in ("array_record", "tfrecord"):
        raise UserError(
            f"{source.info.full_name} is prepared as {form}; array_record and tfrecord can be read."
        )
    return form == "array_record"


def check_field(source: Any, field: str, kind: str, of: Mapping[str, Any] | None = None) -> None:
    """Refuses a field that is not there or is not of the tfds class `kind`."""
    features = source.info.features if of is None else of
    fitting = sorted(name for name, f in features.items() if type(f).__name__ == kind)
    if field not in fitting:
        near = difflib.get_close_matches(field, fitting, n=1, cutoff=0.0)
        raise UserError(
            f"{source.info.full_name} has no field {field!r} of the kind {kind}; of that kind it has:"
            f" {', '.join(fitting) or 'none'}" + (f"; nearest: {near[0]}." if near else ".")
        )


def _versions(folder: pathlib.Path) -> list[str]:
    """Prepared versions in a folder, the highest last."""
    found = [p.parent.name for p in folder.glob("*/dataset_info.json")]
    # What tfds has not finished is called something else.
    finished = [name for name in found if re.fullmatch(r"\d+\.\d+\.\d+", name)]
    return sorted(finished, key=lambda version: [int(n) for n in version.split(".")])


def _missing(name: str, root: pathlib.Path, versions: list[str], flag: str) -> str:
    """What is not there, what is, and what to run where."""
    there = sorted(
        p.parent.parent.relative_to(root).as_posix()
        for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json")
        for p in root.glob(pattern)
    )
    plain = name.partition(":")[0]
    near = difflib.get_close_matches(plain, there, n=1, cutoff=0.6)
    have = (
        f"its versions there are {', '.join(versions)}"
        if versions
        else f"that folder holds {', '.join(there) or 'no prepared data set'}"
        + (f" (nearest: {near[0]})" if near else "")
    )
    manual = (
        " ImageNet's archives have to be fetched by hand first, into DATA/downloads/manual."
        if plain == "imagenet2012"
        else ""
    )
    return (
        f"The data set {name} is not prepared in {root}: {have}.\n"
        "Prepare it once, on any machine with a network and TensorFlow (C4: also a Beam runner, see"
        " the tfds guide on Beam):\n"
        "  pip install tensorflow tensorflow-datasets apache-beam\n"
        f"  tfds build {name} --data_dir DATA --file_format array_record\n"
        f"{manual.strip() + chr(10) if manual else ''}"
        f"Then copy DATA/{plain} to {root / plain} here, or name its place with {flag} or"
        " TFDS_DATA_DIR. Reading it needs no TensorFlow; of texts, tfrecord files are read as well."
    )
