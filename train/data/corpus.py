"""Where text comes from: the standard library's sources, files of one's own, or a random source of known entropy.

A corpus is a sorted list of named texts, split into a training and a held-out part by the names
and sizes of the files, so that the split is the same on every machine, in every folder, with every
seed. Only this file reads text from the disk.
"""

import dataclasses
import functools
import glob
import hashlib
import math
import os
import pathlib
import sysconfig
from collections.abc import Callable

from train.data import zipf

HELD_OUT = 0.05  # fraction of the text

# What is not prose or code a person wrote, what is not everywhere (Debian ships no tests), and
# what differs between two builds of the same Python.
_NOT_STDLIB = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
_NOT_STDLIB |= {"site-packages", "dist-packages", "__pycache__"}
_BUILT = ("_sysconfigdata", "_sysconfig_vars", "config-")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text by name, and what was left out of it."""

    source: str  # what was asked for
    train: dict[str, str]  # text by the file's path relative to the source
    held_out: dict[str, str]
    files: int  # that were read
    skipped: int  # files that could not be read, or are not text (they contain a zero byte)
    repaired: int  # files with bytes that are not UTF-8, now U+FFFD
    digest: str  # sha256 over names and contents, hexadecimal

    @property
    def train_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.train.values())

    @property
    def held_out_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.held_out.values())


def read(source: str = "stdlib") -> Corpus:
    """The corpus called `source`.

    Args:
      source: "stdlib", the standard library of the running interpreter without its tests and
        vendored parts (about 11 MB); "zipf" or "zipf-large", made up (`zipf.py`); or a file, a
        folder (searched through, hidden files left out) or a glob pattern (`**` for any depth) of
        text in UTF-8.

    Raises:
      FileNotFoundError: there is no such file, folder or match.
      ValueError: what was found holds no text.
    """
    digest = hashlib.sha256()
    texts: dict[str, str] = {}
    skipped = repaired = 0
    files, searched = _files(source)
    for name, read_bytes in sorted(files.items()):
        try:
            content = read_bytes()
        except OSError:
            skipped += 1
            continue
        if b"\0" in content:
            skipped += 1
            continue
        text = content.decode("utf-8", errors="replace")
        repaired += text.encode() != content
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
        if text:
            texts[name] = text
    if not texts:
        raise ValueError(
            f"no text in {source!r}: searched {searched}, found {len(files)} files, of which "
            f"{skipped} are unreadable or not text and {len(files) - skipped} are empty"
        )
    train, held_out = split(texts)
    return Corpus(source, train, held_out, len(texts), skipped, repaired, digest.hexdigest())


def find(source: str) -> tuple[dict[str, pathlib.Path], str]:
    """The files of a source by name, and in words where they were looked for; see `read`."""
    return _stdlib() if source == "stdlib" else _own(source)


def _files(source: str) -> tuple[dict[str, Callable[[], bytes]], str]:
    """What gives the content of each file by its name, and where files were looked for."""
    if made := zipf.source(source):
        return {
            name: functools.partial(bytes, text) for name, text in made.documents().items()
        }, "nowhere: it is made"
    paths, searched = find(source)
    return {name: path.read_bytes for name, path in paths.items()}, searched


def split(texts: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Training and held-out text; see `training_sizes`."""
    train, held_out = {}, {}
    for name, size in training_sizes({name: len(text) for name, text in texts.items()}).items():
        text = texts[name]
        train |= {name: text[:size]} if size else {}
        held_out |= {name: text[size:]} if size < len(text) else {}
    return train, held_out


def training_sizes(sizes: dict[str, int]) -> dict[str, int]:
    """How much of each file, from its start, is to train on; sorted by name.

    Files are held out whole, in an order that their names decide, until they are one part in
    twenty of the text. A file that alone is more than that gives its end instead: so does a
    single file.
    """
    total = sum(sizes.values())
    train, whole = {}, {}
    for name, size in sizes.items():
        if size > HELD_OUT * total:
            train[name] = size - math.ceil(HELD_OUT * size)
        else:
            whole[name] = size
    missing = HELD_OUT * sum(whole.values())
    for name in sorted(whole, key=_rank):
        train[name] = 0 if missing > 0 else whole[name]
        missing -= whole[name]
    return dict(sorted(train.items()))


def _rank(name: str) -> bytes:
    """Where a file stands in the order that depends on names alone."""
    return hashlib.sha256(name.encode()).digest()


def _stdlib() -> tuple[dict[str, pathlib.Path], str]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = {
        name: path
        for name, path in _walk(root, _NOT_STDLIB, _BUILT).items()
        if path.suffix == ".py"
    }
    if not paths:
        raise FileNotFoundError(
            f"this interpreter has no standard library sources in {root}; give a text of your own"
        )
    return paths, f"{root} for .py files"


def _own(source: str) -> tuple[dict[str, pathlib.Path], str]:
    path = pathlib.Path(source).expanduser()
    if path.is_file():
        return {path.name: path}, f"the file {path.absolute()}"
    if path.is_dir():
        return _walk(path), f"the folder {path.absolute()} and the folders in it"
    if not glob.has_magic(source):
        raise FileNotFoundError(
            f"no file or folder {source!r} (looked for {path.absolute()}); "
            'give "stdlib", a file, a folder, or a pattern such as "texts/**/*.txt"'
        )
    fixed = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    root = pathlib.Path(*fixed)
    matches = map(pathlib.Path, glob.glob(str(path), recursive=True))
    paths = {match.relative_to(root).as_posix(): match for match in matches if match.is_file()}
    searched = f"{root.absolute()} for the pattern {source!r}"
    if not paths:
        raise FileNotFoundError(f"no file matches {source!r}: searched {searched}")
    return paths, searched


def _walk(
    root: pathlib.Path, without: set[str] | None = None, prefixes: tuple[str, ...] = ()
) -> dict[str, pathlib.Path]:
    """Files below `root` by relative path, without hidden ones and names that are left out."""

    def wanted(name: str) -> bool:
        return name not in (without or ()) and not name.startswith((".", *prefixes))

    paths = {}
    for folder, folders, names in os.walk(root):
        folders[:] = filter(wanted, folders)
        for name in filter(wanted, names):
            path = pathlib.Path(folder, name)
            paths[path.relative_to(root).as_posix()] = path
    return paths
