"""Keeps compiled programs on disk, so that the next start of the same run does not compile them again.

Every command of `python -m train` keeps them in `.cache/jax`, beside `runs`, except `bench`, which measures compiling:

    python -m train --compilation_cache FOLDER ...    another folder, such as one on a fast local disk
    python -m train --compilation_cache None ...      no cache

JAX's own variables JAX_COMPILATION_CACHE_DIR and JAX_ENABLE_COMPILATION_CACHE have the same effect; a flag wins over
them. Anyone who can write into the folder can run code in your programs, so share it only with people you trust.

JAX's cache writes an entry in place and never replaces one. A process that is killed while it writes therefore leaves a
damaged entry that every later start reads in vain and compiles again. Here an entry appears whole or not at all, and a
damaged one is replaced. Several processes may use one folder at the same time.
"""

import contextlib
import hashlib
import os
import pathlib
import platform
import time
import uuid
from typing import Any

from train import disk
from train.errors import UserError

FLAG = "--compilation_cache"
DEFAULT = ".cache/jax"
OFF = ("none", "off")
CACHE_DIR = "jax_compilation_cache_dir"  # JAX's name for the folder
SECONDS = 0.2  # programs that compile faster are not kept
LARGEST = (
    4 << 30
)  # bytes; at a start, the entries that were not used for longest are removed above this
ABANDONED = 3600.0  # seconds after which an unfinished file belongs to no process any more


def start(arguments: list[str]) -> list[str]:
    """Switches the cache on, unless the arguments or JAX's variables say otherwise.

    Args:
        arguments: of the command line.

    Returns:
        The arguments without the flag of the cache.

    Raises:
        UserError: the flag has no value, or its folder cannot be written.
    """
    given, rest = _take(arguments)
    if {"-h", "--help"} & set(rest):
        return rest  # without the seconds of importing JAX
    import jax

    if given is not None and given.lower() in OFF:
        jax.config.update("jax_enable_compilation_cache", False)
    elif given is not None:
        jax.config.update("jax_enable_compilation_cache", True)
        _switch_on(_folder(pathlib.Path(given)))
    elif own := getattr(jax.config, CACHE_DIR):  # set by the user, for JAX itself
        if "://" not in own:
            _write_whole_entries()
    else:
        # A folder that cannot be written costs the time of compiling, never the run.
        with contextlib.suppress(UserError):
            _switch_on(_folder(pathlib.Path(DEFAULT)))
    return rest


def _folder(given: pathlib.Path) -> pathlib.Path:
    """The folder for the programs of this machine, which is created."""
    # A program may use instructions that another processor lacks, and a shared disk may serve several kinds.
    folder = disk.user_path(given).absolute() / machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{uuid.uuid4().hex}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{FLAG} {given}: {folder} cannot be written ({error.strerror or error}); name another folder, or None"
            " for no cache."
        ) from None
    return folder


def _switch_on(folder: pathlib.Path) -> None:
    import jax

    with contextlib.suppress(OSError):
        prune(folder)
    _write_whole_entries()
    jax.config.update(CACHE_DIR, str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS)


def machine() -> str:
    """A name for kinds of processor that can run each other's programs."""
    facts = [platform.system(), platform.machine()]
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        facts += sorted({line for line in lines if line.startswith(("flags", "Features"))})
    return f"{platform.machine()}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}"


def prune(folder: pathlib.Path, largest: int = LARGEST, now: float | None = None) -> None:
    """Removes what killed processes left unfinished, and the least recently used entries above `largest` bytes."""
    now = time.time() if now is None else now
    entries = []
    for entry in os.scandir(folder):
        try:
            facts = entry.stat()
            if entry.name.endswith(".part") and now - facts.st_mtime > ABANDONED:
                os.unlink(entry.path)
            elif entry.name.endswith("-cache"):
                entries.append((facts.st_mtime, facts.st_size, entry.path))
        except FileNotFoundError:
            continue  # another process was faster
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= largest:
            return
        pathlib.Path(path).unlink(missing_ok=True)
        total -= size


def _write_whole_entries() -> None:
    """Makes JAX use `WholeEntries`; a version of JAX that is built differently keeps its own cache."""
    try:
        from jax._src import compilation_cache, lru_cache

        kind, decompress = lru_cache.LRUCache, compilation_cache.decompress_executable
        if compilation_cache.LRUCache is not kind:  # done before
            return
    except (ImportError, AttributeError):
        return

    class WholeEntries(kind):
        """JAX's cache of files, with entries that are written atomically and replaced if they are damaged."""

        def get(self, key: str) -> bytes | None:
            path = pathlib.Path(str(self.path), f"{key}-cache")
            try:
                value = super().get(key)
            except FileNotFoundError:  # removed by another process since
                return None
            if value is None:
                return None
            try:
                decompress(value)
            except Exception:  # each compression raises its own
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                return None
            with contextlib.suppress(OSError):
                os.utime(path)  # `prune` removes the entries that were not used for longest
            return value

        def put(self, key: str, value: bytes) -> None:
            if self.eviction_enabled:  # the user's own jax_compilation_cache_max_size
                return super().put(key, value)
            path = pathlib.Path(str(self.path), f"{key}-cache")
            if path.exists():
                return
            part = path.with_name(f"{uuid.uuid4().hex}.part")
            try:
                part.write_bytes(value)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)

    changed: Any = compilation_cache
    changed.LRUCache = WholeEntries


def _take(arguments: list[str]) -> tuple[str | None, list[str]]:
    given, rest, words = None, [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name.replace("-", "_") != FLAG.replace("-", "_"):
            rest.append(word)
            continue
        given = value if equals else next(words, "")
        if not given:
            raise UserError(f"{FLAG} needs a value: a folder, or None for no cache.")
    return given, rest
