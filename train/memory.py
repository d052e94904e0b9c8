"""How much memory there is, and a check of sizes against it before anything is allocated."""

import pathlib

from train.errors import UserError

# What the system lets this process have: the machine's memory, or less in a container.
MACHINE = pathlib.Path("/proc/meminfo")
LIMITS = (
    pathlib.Path("/sys/fs/cgroup/memory.max"),
    pathlib.Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def of_host() -> int | None:
    """Bytes of memory of this machine or container; None if the system does not say."""
    found = [
        *_machine("MemTotal:"),
        *(int(text) for path in LIMITS if (text := _text(path)).isdecimal()),
    ]
    return min(found, default=None)


def free() -> int | None:
    """Bytes of memory that programs can still get, those of caches included; None if the system does not say."""
    return next(iter(_machine("MemAvailable:")), None)


def _machine(name: str) -> list[int]:
    lines = [line.split() for line in _text(MACHINE).splitlines()]
    return [1024 * int(words[1]) for words in lines if words[:1] == [name]]


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def check(needed: int, what: str, advice: str = "") -> None:
    """Raises UserError if `what` needs more bytes than this machine has."""
    there = of_host()
    if there is not None and needed > there:
        raise UserError(too_large(needed, there, what, advice))


def too_large(needed: int, there: int, what: str, advice: str = "", where: str = "") -> str:
    """The message for something that does not fit; `where` names the memory, else it is this machine's."""
    return (
        f"{what[0].upper()}{what[1:]} needs {gigabytes(needed)}; there are {gigabytes(there)}"
        f" {where or 'in this machine'}." + (f" {advice}" if advice else "")
    )


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.3g} GB" if count < 1e12 else f"{count / 1e9:,.0f} GB"
