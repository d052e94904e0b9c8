"""Reads the text of data sets as Hugging Face's package datasets keeps them: folders of parquet or arrow files.

    hf:FOLDER    `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, a folder of parquet files as the Hub has it
                 (data/train-00000-of-00002.parquet, ...), or a single file

The package datasets is not needed: pyarrow reads the files, and verifies the checksums of parquet pages that have them.
An arrow file that does not end with the mark of its end has been cut off, and is refused. A split is named by the
folder or by the file's name, as the Hub does it: train, validation or test. Rows without text are left out.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from train import disk
from train.data import corpus
from train.errors import UserError, nearest

PREFIX = "hf:"
ENDINGS = (".parquet", ".arrow")
BESIDE = (".json", ".md", ".yaml", ".lock", "")  # files that lie beside those
ROWS = 256  # read at a time
LARGEST = 1 << 30  # bytes of files that a run reads at its start; larger sets are tokenised once
HELD_OUT = 0.05  # share of the rows that is held out where no split is
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
STREAM_END, FILE_END = b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Consecutive rows of one file; the text of one column is a document."""

    path: str
    column: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def documents(self) -> Iterator[tuple[str, int]]:
        """Every document, and its share of `size`; an empty one for a row without text.

        Raises:
            UserError: the file is damaged, or has fewer rows than before.
        """
        import pyarrow as pa

        seen = self.start
        try:
            for values in _chunks(pathlib.Path(self.path), self.column, self.start, self.stop):
                if pa.types.is_dictionary(values.type):
                    values = values.dictionary_decode()
                # As bytes, because arrow does not check that a text is valid UTF-8.
                for content in values.cast(pa.large_binary()).to_pylist():
                    seen += 1
                    yield "" if content is None else content.decode("utf-8", "replace"), 1
        except (pa.ArrowException, OSError, EOFError) as error:
            raise UserError(f"{self.path} cannot be read: {error}. Copy it again.") from None
        if seen != self.stop:
            raise UserError(
                f"{self.path} holds {seen} rows instead of at least {self.stop}. Copy it again."
            )


def is_source(text: str) -> bool:
    """Whether a text is named `hf:...`, or is a folder or file that only this module can read."""
    if text.startswith(PREFIX):
        return True
    path = disk.user_path(text)
    if path.is_file():
        return path.suffix in ENDINGS
    if not path.is_dir():
        return False
    if (path / "dataset_dict.json").is_file():
        return True
    found = False
    for each in path.rglob("[!.]*"):
        if each.is_file() and each.suffix not in (*ENDINGS, *BESIDE):
            return False
        found = found or each.suffix in ENDINGS
    return found


def find(
    name: str, column: str | None = None, split: str | None = None, held_out: str | None = None
) -> tuple[dict[str, list[Rows]], dict[str, Any]]:
    """The rows to train on and to hold out, file by file.

    Args:
        name: `hf:` and a folder or file.
        column: that holds the text; None: the only one of texts, else "text".
        split: to train on, such as train; None: train, or the only one.
        held_out: None: validation or test, or the last 5 % of the rows.

    Returns:
        {"train": rows, "held_out": rows}, and facts that identify the files.

    Raises:
        UserError: there is no such data set, split or column; the message names those that there are.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"Reading {name} needs the package pyarrow: pip install pyarrow.")
    root = disk.user_path(name.removeprefix(PREFIX))
    splits = _splits(name, root)
    split = split or ("train" if "train" in splits else next(iter(splits)))
    for wanted in filter(None, (split, held_out)):
        if wanted not in splits:
            raise UserError(
                f"{name} has no split {wanted!r}; it has {', '.join(splits)}; nearest:"
                f" {nearest(wanted, list(splits))}."
            )
    if split == held_out:
        raise UserError(f"{name}: the split {split} cannot be trained on and held out as well.")
    if held_out is None:
        held_out = next((s for s in ("validation", "test") if s in splits and s != split), None)
    column = _column(name, splits[split][0], column)
    files = {path: _rows(path, column) for path in splits[split]}
    rows = {"train": _cut(files, column, 0, sum(files.values()))}
    if held_out is None:
        cut = sum(files.values()) - max(1, round(HELD_OUT * sum(files.values())))
        rows = {
            "train": _cut(files, column, 0, cut),
            "held_out": _cut(files, column, cut, sum(files.values())),
        }
    else:
        others = {path: _rows(path, column) for path in splits[held_out]}
        rows["held_out"] = _cut(others, column, 0, sum(others.values()))
        files |= others
    for part, found in rows.items():
        if not found:
            raise UserError(f"{name} has no rows for the {part.replace('_', '-')} part.")
    status = {str(path.relative_to(_base(root))): path.stat() for path in files}
    facts: dict[str, Any] = {"split": split, "held_out": held_out, "column": column}
    facts["files"] = {key: [s.st_size, s.st_mtime_ns] for key, s in sorted(status.items())}
    return rows, facts


def read_corpus(name: str) -> corpus.Corpus:
    """All documents of a data set, for a run that tokenises them itself.

    Raises:
        UserError: as in `find`; the data set is too large to be read at every start.
    """
    rows, facts = find(name)
    size = sum(stat[0] for stat in facts["files"].values())
    if size > LARGEST:
        raise UserError(
            f"{name} has {size / 1e9:.1f} GB. Tokenise it once, with python -m train tokenise --source {name} --out"
            " FOLDER, and then train with --data.text store:FOLDER"
        )
    digest = hashlib.sha256(repr(facts["column"]).encode())
    parts: dict[str, dict[str, str]] = {}
    for part, found in rows.items():
        texts = (text for each in found for text, _ in each.documents() if text)
        parts[part] = {f"{part}/{number:012d}": text for number, text in enumerate(texts)}
        for key, text in parts[part].items():
            digest.update(f"{key}\0{len(text)}\0".encode() + text.encode())
    if not (parts["train"] and parts["held_out"]):
        raise UserError(f"{name} contains no text in its column {facts['column']!r}.")
    total = sum(map(len, parts.values()))
    return corpus.Corpus(name, parts["train"], parts["held_out"], total, 0, 0, digest.hexdigest())


def in_parts(rows: list[Rows], bytes_each: int) -> list[Rows]:
    """The same rows, in parts of about so many bytes of a file."""
    found = []
    for row in rows:
        path = pathlib.Path(row.path)
        share = path.stat().st_size * row.size / max(1, _rows(path, row.column))
        count = min(row.size, max(1, -int(-share // bytes_each)))
        edges = [row.start + row.size * i // count for i in range(count + 1)]
        pairs = itertools.pairwise(edges)
        found += [dataclasses.replace(row, start=start, stop=stop) for start, stop in pairs]
    return found


def _base(root: pathlib.Path) -> pathlib.Path:
    return root if root.is_dir() else root.parent


def _splits(name: str, root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The files of each split, train first."""
    if root.is_file() and root.suffix in ENDINGS:
        return {"train": [root]}
    hint = "name a folder that save_to_disk wrote, a folder of parquet files, or one such file"
    if not root.is_dir():
        raise UserError(f"{name}: there is no folder {root.absolute()}; {hint}.")
    if (root / "dataset_dict.json").is_file():
        return {
            split: _saved(root / split) for split in _json(root / "dataset_dict.json", "splits")
        }
    if (root / "state.json").is_file():
        return {"train": _saved(root)}
    paths = sorted(p for p in root.rglob("*") if p.suffix in ENDINGS and p.is_file())
    # datasets keeps results of `map` and `filter` beside the data.
    paths = [p for p in paths if not p.name.startswith("cache-")]
    if not paths:
        raise UserError(f"{name}: {root.absolute()} holds no parquet or arrow file; {hint}.")
    found: dict[str, list[pathlib.Path]] = {}
    folders: dict[str, set[str]] = {}
    for path in paths:
        *above, last = path.relative_to(root).parts
        split = next(filter(None, map(_split, (last, *reversed(above)))), "train")
        found.setdefault(split, []).append(path)
        own = [part for part in above if part != "data" and _split(part) is None]
        folders.setdefault("/".join(own), set()).add(split)
    if len(folders) > 1:
        raise UserError(
            f"{name} holds {len(folders)} data sets; name one of them:"
            f" {', '.join(f'{name}/{folder}' for folder in sorted(folders) if folder)}."
        )
    return dict(sorted(found.items(), key=lambda item: list(SPLITS).index(item[0])))


def _split(part: str) -> str | None:
    """The split that a file or folder is named after."""
    words = set(re.split(r"[^a-z]+", part.lower()))
    return next((split for split, names in SPLITS.items() if words & set(names)), None)


def _saved(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that `Dataset.save_to_disk` wrote, in their order."""
    paths = [folder / one["filename"] for one in _json(folder / "state.json", "_data_files")]
    for old in ("_indices_files", "_indices_data_files"):
        if _json(folder / "state.json", old, []):
            raise UserError(
                f"{folder} was saved with a selection of rows beside it, as old versions of datasets did; load it,"
                " call flatten_indices() and save it again."
            )
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise UserError(f"{', '.join(missing)} is missing. Copy the data set again.")
    return paths


def _json(path: pathlib.Path, key: str, absent: list[Any] | None = None) -> list[Any]:
    """A list in a file of JSON that save_to_disk wrote."""
    try:
        content = json.loads(path.read_text())
        return list(content[key] if absent is None else content.get(key) or absent)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path.parent} is not complete: its {path.name} cannot be read ({error!r}). Save it again."
        ) from None


def _column(name: str, path: pathlib.Path, wanted: str | None) -> str:
    import pyarrow as pa

    def text(kind: Any) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        views = getattr(pa.types, "is_string_view", lambda kind: False)
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or views(kind)

    texts = [field.name for field in _schema(path) if text(field.type)]
    chosen = wanted or (texts[0] if len(texts) == 1 else "text")
    if chosen not in texts:
        near = f"; nearest: {nearest(chosen, texts)}" if texts else ""
        raise UserError(
            f"{name} has no column {chosen!r} of texts; its columns of texts are: {', '.join(texts) or 'none'}{near}."
            " Choose one with python -m train tokenise --field COLUMN."
        )
    return chosen


def _cut(files: dict[pathlib.Path, int], column: str, start: int, stop: int) -> list[Rows]:
    """The rows from `start` to `stop`, counted over all files."""
    found, before = [], 0
    for path, count in files.items():
        first, last = max(start - before, 0), min(stop - before, count)
        if first < last:
            found.append(Rows(str(path.absolute()), column, first, last))
        before += count
    return found


def _schema(path: pathlib.Path) -> Any:
    return _opened(path)[0]


@functools.lru_cache(maxsize=4096)
def _counted(path: str, size: int, changed: int) -> int:
    return _opened(pathlib.Path(path))[1]


def _rows(path: pathlib.Path, column: str) -> int:
    """The number of rows of a file, which must have the column."""
    if column not in _schema(path).names:
        raise UserError(
            f"{path} has no column {column!r}, unlike the files before it; its columns are:"
            f" {', '.join(_schema(path).names)}."
        )
    stat = path.stat()
    return _counted(str(path), stat.st_size, stat.st_mtime_ns)


def _opened(path: pathlib.Path) -> tuple[Any, int]:
    """The schema and the number of rows of a file."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if path.suffix == ".parquet":
            with parquet.ParquetFile(path) as file:
                return file.schema_arrow, file.metadata.num_rows
        with pa.memory_map(str(path)) as source:
            batches, schema = _batches(source, path)
            return schema, sum(batch.num_rows for batch in batches)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}. Copy it again.") from None


def _batches(source: Any, path: pathlib.Path) -> tuple[Iterator[Any], Any]:
    """The record batches of an arrow file, in the format of streams or of files."""
    import pyarrow as pa

    size = source.size()
    source.seek(max(0, size - 8))
    end = source.read(8)
    source.seek(0)
    if end.endswith(FILE_END):
        file = pa.ipc.open_file(source)
        return (file.get_batch(i) for i in range(file.num_record_batches)), file.schema
    if end != STREAM_END:
        raise UserError(f"{path} cannot be read: it has been cut off. Copy it again.")
    stream = pa.ipc.open_stream(source)
    return iter(stream), stream.schema


def _chunks(path: pathlib.Path, column: str, start: int, stop: int) -> Iterator[Any]:
    """The values of a column in some rows of a file."""
    import pyarrow as pa
    from pyarrow import parquet

    if path.suffix == ".parquet":
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            before = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                if before < stop and before + count > start:
                    batches = file.iter_batches(ROWS, row_groups=[group], columns=[column])
                    yield from _within((b.column(0) for b in batches), before, start, stop)
                before += count
        return
    with pa.memory_map(str(path)) as source:
        batches, _ = _batches(source, path)
        yield from _within((b.column(column) for b in batches), 0, start, stop)


def _within(columns: Iterator[Any], before: int, start: int, stop: int) -> Iterator[Any]:
    """The parts of consecutive columns that lie in the rows from `start` to `stop`; the first is row `before`."""
    for values in columns:
        first, last = max(start - before, 0), min(stop - before, len(values))
        if first < last:
            yield values.slice(first, last - first)
        before += len(values)
