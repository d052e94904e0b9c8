"""Reads data sets that tensorflow-datasets (tfds) has prepared, without TensorFlow.

A data set has its tfds name: `c4/en:3.0.1` is version 3.0.1 of configuration en of c4, in the folder c4/en/3.0.1 below
the data folder. A name without a version means the highest version in that folder; a name without a configuration means
the only one that is prepared. Both file formats are supported: array_record through tfds's data source and the reader
below it, which verify the checksum of every chunk, and tfrecord through `tfrecord_file.py`, since tfds's own reader of
tfrecord needs TensorFlow.
"""

import dataclasses
import hashlib
import importlib.util
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train import disk
from train.data.prepared_features import check_features
from train.errors import UserError, nearest

PREPARE_AGAIN = "Prepare the data set again, or copy its files again."
NAME = re.compile(r"[A-Za-z0-9_]+(/[A-Za-z0-9_.+-]+)?(:\d+\.\d+\.\d+)?")


@dataclasses.dataclass(frozen=True)
class FileRange:
    """Consecutive examples in one file of a prepared data set."""

    folder: str
    file: str
    skip: int  # examples in the file before the first
    take: int  # number of examples
    whole: int  # examples that the file must hold


@dataclasses.dataclass(frozen=True)
class RandomAccessSplit:
    """The examples of a split that is prepared as array_record, indexed by number."""

    source: Any  # tfds's data source
    ranges: tuple[FileRange, ...]  # one for each file

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            return self.source[number]
        except (ValueError, RuntimeError, OSError, LookupError) as error:
            raise UserError(
                f"{self.place(number)} cannot be read: {error}. {PREPARE_AGAIN}"
            ) from None

    def place(self, number: int) -> str:
        """Names an example by its number and its file, for error messages."""
        for file_range in self.ranges:
            if number < file_range.take:
                path = pathlib.Path(file_range.folder, file_range.file)
                return f"Example {file_range.skip + number} of {path}"
            number -= file_range.take
        raise IndexError(number)


def data_folder(data_dir: str | None) -> pathlib.Path:
    """The folder of prepared data sets: `data_dir`, else TFDS_DATA_DIR, else the default of tfds."""
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return disk.user_path(data_dir or default)


def builder(name: str, data_dir: str | None = None, flag: str = "--data_dir") -> Any:
    """The tfds builder of a prepared data set. It reads, and never downloads.

    Args:
        name: tfds name of the data set.
        data_dir: folder of prepared data sets; see `data_folder`.
        flag: the command-line flag that sets `data_dir`, for error messages.

    Raises:
        UserError: the name is malformed, a package is missing, or the data set is not prepared; the message says
            which commands prepare it.
    """
    if not all(map(importlib.util.find_spec, ("tensorflow_datasets", "google_crc32c"))):
        raise UserError(
            f"Reading {name} needs the packages tensorflow-datasets and google-crc32c (not TensorFlow):"
            " pip install 'tensorflow-datasets>=4.9.10' google-crc32c into the environment that runs this."
        )
    import tensorflow_datasets as tfds

    if NAME.fullmatch(name) is None:
        raise UserError(
            f"{disk.shortened(name)!r} is not the name of a tfds data set. Allowed are NAME, NAME/CONFIG and"
            " NAME/CONFIG:VERSION, for example c4/en:3.0.1."
        )
    root = data_folder(data_dir)
    plain, _, version = name.partition(":")
    if "/" not in plain and not _versions(root / plain):
        plain = _only_configuration(name, root / plain)
    versions = _versions(root / plain)
    if not versions or (version and version not in versions):
        raise UserError(_missing(name, root, versions, flag))
    folder = root / plain / (version or versions[-1])
    check_features(folder)
    try:
        return tfds.builder_from_directory(str(folder))
    # tfds's JSON parser raises an exception of its own type.
    except Exception as error:
        raise UserError(
            f"{folder} is not a data set that tfds has prepared: {error}. {PREPARE_AGAIN}"
        ) from None


def describe(source: Any) -> dict[str, Any]:
    """Name, format, files with their sizes and digests of those that describe the others; JSON values only."""
    info = source.info
    folder = pathlib.Path(source.data_path)
    files = sorted(p for p in folder.iterdir() if p.is_file())
    return {
        "name": info.full_name,
        "format": info.file_format.value if info.file_format else "unknown",
        "files": {p.name: p.stat().st_size for p in files},
        "described": {
            p.name: hashlib.sha256(disk.read_file(p)).hexdigest()
            for p in files
            if p.suffix == ".json"
        },
    }


def file_ranges(source: Any, split: str, largest: int) -> list[FileRange]:
    """Divides a split such as `train` or `train[:99%]` into ranges of at most `largest` bytes.

    A tfrecord file can only be read from its start, so it is not divided.

    Raises:
        UserError: the split does not exist or is empty, or a file is missing.
    """
    info = source.info
    try:
        instructions = info.splits[split].file_instructions
    except (ValueError, KeyError):
        raise UserError(
            f"{info.full_name} has no split {split!r}; it has {', '.join(info.splits)} and parts of"
            f" them such as '{next(iter(info.splits))}[:99%]'."
        ) from None
    random_access, ranges = is_random_access(source), []
    for part in instructions:
        path = pathlib.Path(str(part.filename))
        if not path.is_file():
            raise UserError(f"{path} is missing. {PREPARE_AGAIN}")
        take = part.examples_in_shard - part.skip if part.take < 0 else part.take
        count = 1
        if random_access and take:
            share = path.stat().st_size * take / part.examples_in_shard
            count = min(take, max(1, -int(-share // largest)))
        edges = [take * i // count for i in range(count + 1)]
        for start, stop in itertools.pairwise(edges):
            if stop > start:
                ranges.append(
                    FileRange(
                        *(str(source.data_path), path.name, part.skip + start, stop - start),
                        part.examples_in_shard,
                    )
                )
    if not ranges:
        raise UserError(f"{split!r} of {info.full_name} is empty; name a larger part.")
    return ranges


def open_split(source: Any, split: str, undecoded: str) -> RandomAccessSplit:
    """Opens a split that is prepared as array_record; the field `undecoded` gives the stored bytes."""
    import tensorflow_datasets as tfds

    decoders = {undecoded: tfds.decode.SkipDecoding()}
    opened = source.as_data_source(split=split, decoders=decoders)
    return RandomAccessSplit(opened, tuple(file_ranges(source, split, 1 << 62)))


def check_disjoint(source: Any, split: str, held_out: str) -> None:
    """Raises UserError if two parts of a data set share examples, or if `file_ranges` rejects one of them."""
    whole = [file_ranges(source, wanted, 1 << 62) for wanted in (split, held_out)]
    common = sum(
        max(0, min(a.skip + a.take, b.skip + b.take) - max(a.skip, b.skip))
        for a, b in itertools.product(*whole)
        if a.file == b.file
    )
    if common:
        raise UserError(
            f"The training split {split!r} and the held-out split {held_out!r} of {source.info.full_name}"
            f" share {common} examples; name disjoint parts, such as 'train[:95%]' and 'train[95%:]'."
        )


def read_examples(file_range: FileRange, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The examples in a range, decoded by tfds; only the given fields.

    Raises:
        UserError: the file is damaged, or the number of its examples differs from the one that the data set records.
    """
    import tensorflow_datasets as tfds

    check_features(pathlib.Path(file_range.folder))
    source = tfds.builder_from_directory(file_range.folder)
    features = source.info.features
    path = str(pathlib.Path(file_range.folder, file_range.file))
    try:
        for raw in _records(source, path, file_range):
            example = features.deserialize_example_np(raw)
            yield {name: example[name] for name in fields}
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}. {PREPARE_AGAIN}") from None


def _records(source: Any, path: str, file_range: FileRange) -> Iterator[bytes]:
    """The serialised examples in a range of a file."""
    if is_random_access(source):
        from array_record.python import array_record_data_source

        with array_record_data_source.ArrayRecordDataSource([path]) as records:
            if len(records) != file_range.whole:
                raise ValueError(f"it holds {len(records)} examples instead of {file_range.whole}")
            for start in range(file_range.skip, file_range.skip + file_range.take, 256):
                stop = min(start + 256, file_range.skip + file_range.take)
                yield from records.__getitems__(list(range(start, stop)))
        return
    from train.data import tfrecord_file

    done = 0
    # Reading to the end, even past the range, detects a truncated file.
    for done, raw in enumerate(tfrecord_file.records(path), 1):
        if file_range.skip < done <= file_range.skip + file_range.take:
            yield raw
    if done != file_range.whole:
        raise ValueError(f"it holds {done} examples instead of {file_range.whole}")


def is_random_access(source: Any) -> bool:
    """Whether a data set is prepared as array_record, not tfrecord; raises UserError for other formats."""
    form = source.info.file_format.value if source.info.file_format else "unknown"
    if form not in ("array_record", "tfrecord"):
        raise UserError(
            f"{source.info.full_name} is prepared as {form}; allowed are array_record and tfrecord."
        )
    return form == "array_record"


def check_field(source: Any, field: str, kind: str, of: Mapping[str, Any] | None = None) -> None:
    """Raises UserError unless the data set has the field, with a feature of the tfds class `kind`."""
    features = source.info.features if of is None else of
    fitting = sorted(name for name, f in features.items() if type(f).__name__ == kind)
    if field not in fitting:
        raise UserError(
            f"{source.info.full_name} has no field {field!r} of the kind {kind}; its fields of that kind"
            f" are: {', '.join(fitting) or 'none'}"
            + (f"; nearest: {nearest(field, fitting)}." if fitting else ".")
        )


def _only_configuration(name: str, folder: pathlib.Path) -> str:
    """The name of a data set with its only prepared configuration; without one if there is none.

    Raises:
        UserError: several are prepared.
    """
    plain, _, version = name.partition(":")
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [p.name for p in inside if version in _versions(p) or (_versions(p) and not version)]
    if len(found) > 1:
        end = f":{version}" if version else ""
        raise UserError(
            f"{folder} holds {len(found)} configurations of {plain}; name one of them:"
            f" {', '.join(f'{plain}/{config}{end}' for config in found)}."
        )
    return f"{plain}/{found[0]}" if found else plain


def _versions(folder: pathlib.Path) -> list[str]:
    """Prepared versions in a folder, the highest last."""
    names = [p.parent.name for p in folder.glob("*/dataset_info.json")]
    # tfds gives unfinished versions names of another form.
    finished = [name for name in names if re.fullmatch(r"\d+\.\d+\.\d+", name)]
    return sorted(finished, key=lambda version: [int(n) for n in version.split(".")])


def _missing(name: str, root: pathlib.Path, versions: list[str], flag: str) -> str:
    """The message for a missing data set: which sets are there, and the commands that prepare this one."""
    prepared = sorted(
        p.parent.parent.relative_to(root).as_posix()
        for pattern in ("*/*/dataset_info.json", "*/*/*/dataset_info.json")
        for p in root.glob(pattern)
    )
    plain = name.partition(":")[0]
    have = (
        f"its versions there are {', '.join(versions)}"
        if versions
        else f"that folder holds {', '.join(prepared) or 'no prepared data set'}"
        + (f" (nearest: {nearest(plain, prepared)})" if prepared else "")
    )
    manual = (
        " Download ImageNet's archives by hand first, into DATA/downloads/manual."
        if plain == "imagenet2012"
        else ""
    )
    return (
        f"The data set {name} is not prepared in {root}: {have}.\n"
        "Prepare it once, on any machine with a network connection and TensorFlow (C4 also needs a Beam"
        " runner; see the tfds guide on Beam):\n"
        "  pip install tensorflow tensorflow-datasets apache-beam\n"
        f"  tfds build {name} --data_dir DATA --file_format array_record\n"
        f"{manual.strip() + chr(10) if manual else ''}"
        f"Then copy DATA/{plain} to {root / plain} on this machine, or set {flag} or TFDS_DATA_DIR to"
        " another data folder. Reading needs no TensorFlow; text can also be read from tfrecord files."
    )
