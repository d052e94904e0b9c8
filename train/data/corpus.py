"""Reads a text corpus: the sources of Python's standard library, text files, or a synthetic source of known entropy.

A corpus is a set of named texts, sorted by name. The names and sizes of the files alone decide which part is held
out, so the split is the same on every machine, in every folder and for every seed. Only this file reads text from the
disk.
"""

import dataclasses
import functools
import glob
import hashlib
import math
import os
import pathlib
import shlex
import sysconfig
from collections.abc import Callable

from train import disk, memory
from train.data import zipf

HELD_OUT = 0.05  # fraction of the text
COPIES = 2  # of a text that are in memory at once: its bytes, and the same as text

# Folders and prefixes of files that no person wrote, that some distributions leave out (Debian ships no tests), or
# that differ between two builds of the same Python.
_NOT_STDLIB = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
_NOT_STDLIB |= {"site-packages", "dist-packages", "__pycache__"}
_BUILT = ("_sysconfigdata", "_sysconfig_vars", "config-")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Texts by name, and the number of files that were skipped or repaired."""

    source: str  # as given to `read_corpus`
    train: dict[str, str]  # text by the file's path relative to the source
    held_out: dict[str, str]
    files: int  # files with text
    skipped: (
        int  # unreadable files, FIFOs and devices, and files with a zero byte, which are not text
    )
    repaired: int  # files with bytes that are not UTF-8, each replaced by U+FFFD
    digest: str  # SHA-256 over names and contents, hexadecimal

    @property
    def train_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.train.values())

    @property
    def held_out_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.held_out.values())


def read_corpus(source: str = "stdlib") -> Corpus:
    """Reads the corpus called `source`.

    Args:
      source: "stdlib", the standard library of the running interpreter without its tests and vendored parts (about
        11 MB); "zipf" or "zipf-large", which are synthetic (`zipf.py`); or UTF-8 text in a file, in a folder and its
        subfolders (without hidden files), or in the files that match a glob pattern (`**` for any depth).

    Raises:
      FileNotFoundError: there is no such file or folder, or no file matches.
      ValueError: no file contains text.
      UserError: the text does not fit into memory.
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
            f"{source!r} contains no text: searched {searched} and found {len(files)} files;"
            f" {skipped} are unreadable or not text, {len(files) - skipped} are empty"
        )
    train, held_out = split(texts)
    return Corpus(source, train, held_out, len(texts), skipped, repaired, digest.hexdigest())


def find_files(source: str) -> tuple[dict[str, pathlib.Path], str]:
    """The files of a source by name, and a description of the places that were searched; see `read_corpus`."""
    return _stdlib() if source == "stdlib" else _own(source)


def _files(source: str) -> tuple[dict[str, Callable[[], bytes]], str]:
    """For each file, a function that returns its content; and a description of the places that were searched."""
    if synthetic := zipf.source(source):
        return {
            name: functools.partial(bytes, text) for name, text in synthetic.documents().items()
        }, "nothing, since it is synthetic"
    paths, searched = find_files(source)
    memory.check(
        COPIES * sum(map(_size, paths.values())),
        f"the text {source}",
        f"Nearest: python -m train tokenise --source {shlex.quote(source)} --out FOLDER, which reads a part at a"
        " time, and then --data.text store:FOLDER.",
    )
    return {name: functools.partial(disk.read_file, path) for name, path in paths.items()}, searched


def _size(path: pathlib.Path) -> int:
    """Bytes of a regular file; 0 for everything else, which is not read."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def split(texts: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Splits texts into a training and a held-out part; see `training_sizes`."""
    train, held_out = {}, {}
    for name, size in training_sizes({name: len(text) for name, text in texts.items()}).items():
        text = texts[name]
        train |= {name: text[:size]} if size else {}
        held_out |= {name: text[size:]} if size < len(text) else {}
    return train, held_out


def training_sizes(sizes: dict[str, int]) -> dict[str, int]:
    """The length of the part of each file, from its start, that is trained on; sorted by name.

    Whole files are held out, in an order that depends on their names, until they make up one twentieth of the text.
    Of a file that is longer than that by itself, the end is held out instead.
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
    """Sort key that depends on the name alone, but not alphabetically."""
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
            f"the sources of the standard library are not in {root}; name a text of your own"
        )
    return paths, f"{root} for .py files"


def _own(source: str) -> tuple[dict[str, pathlib.Path], str]:
    if not source.strip():
        raise ValueError(
            'the name of the text is empty; "." is the folder that the program runs in'
        )
    path = disk.user_path(source)
    if path.is_file():
        return {path.name: path}, f"the file {path.absolute()}"
    if path.is_dir():
        return _walk(path), f"the folder {path.absolute()} and the folders in it"
    if (found := disk.kind(path)) is not None:
        raise disk.NotRegular(f"{source!r} is {found}; allowed are regular files and folders")
    if not glob.has_magic(source):
        raise FileNotFoundError(
            f'there is no file or folder {source!r} ({path.absolute()}); name "stdlib", a file, a folder,'
            ' or a pattern such as "texts/**/*.txt"'
        )
    fixed = []
    for part in path.parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    root, pattern = pathlib.Path(*fixed), path.parts[len(fixed) :]
    paths = {match.relative_to(root).as_posix(): match for match in _matches(root, pattern)}
    searched = f"{root.absolute()} for the pattern {source!r}"
    if not paths:
        raise FileNotFoundError(f"no file matches {source!r}: searched {searched}")
    return paths, searched


def _matches(root: pathlib.Path, pattern: tuple[str, ...]) -> list[pathlib.Path]:
    """The files below `root` that match; hidden ones if the pattern says so.

    Unlike `glob.glob`, `**` does not follow links, which may lead in circles.
    """
    hidden = any(part.startswith(".") for part in pattern)
    wanted = [part if part == "**" else part.replace("**", "*") for part in pattern]
    wanted += ["*"] if wanted[-1] == "**" else []
    return [
        match
        for match in root.glob("/".join(wanted))
        if match.is_file()
        and (hidden or not any(part.startswith(".") for part in match.relative_to(root).parts))
    ]


def _walk(
    root: pathlib.Path, without: set[str] | None = None, prefixes: tuple[str, ...] = ()
) -> dict[str, pathlib.Path]:
    """Files below `root` by relative path, without hidden files and without excluded names and prefixes."""

    def wanted(name: str) -> bool:
        return name not in (without or ()) and not name.startswith((".", *prefixes))

    paths = {}
    for folder, folders, names in os.walk(root):
        folders[:] = filter(wanted, folders)
        for name in filter(wanted, names):
            path = pathlib.Path(folder, name)
            paths[path.relative_to(root).as_posix()] = path
    return paths
