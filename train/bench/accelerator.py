"""`python -m train bench accelerator`: an accelerator, measured in a few minutes.

    python -m train bench accelerator --minutes 8 --out results/h200

Each part (`PARTS`) runs in a process of its own, the most valuable one first. A part that takes longer than its budget,
or than the minutes that are left, is ended, and the rows that it has measured until then are kept. The folder then
holds results.json and report.md, which are written anew after every row.
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from typing import Any

import tyro

from train.bench.table import format_value
from train.display import say
from train.errors import UserError, nearest

ROOT = pathlib.Path(__file__).parents[2]
NEEDED = ("jax", "numpy", "scipy", "optax", "flax", "tyro")
PEERS = ("torch", "transformers")


@dataclasses.dataclass(frozen=True)
class Part:
    """A group of measurements with a table of its own.

    Attributes:
        title: of its table.
        seconds: its budget.
        needs: packages without which it is left out.
    """

    title: str
    seconds: float
    needs: tuple[str, ...] = ()


# Most valuable first. The functions of the same names are in accelerator_parts.py.
PARTS = {
    "limits": Part("Limits of the device", 40),
    "step-60M": Part("Training step, 60M", 60),
    "step-1B": Part("Training step, 1B", 80),
    "step-350M": Part("Training step, 350M", 70),
    "repeatable": Part("The same command twice", 100),
    "peer-60M": Part("PyTorch, 60M", 70, PEERS),
    "optimizers": Part("Optimizer steps, 350M in stacks", 50),
    "spectra": Part("Spectra of all hidden matrices", 60),
    "population": Part("Many runs as one program", 50),
    "step-130M": Part("Training step, 130M", 50),
    "step-gpt2-124M": Part("Training step, gpt2-124M", 60),
    "peer-350M": Part("PyTorch, 350M", 80, PEERS),
    "peer-1B": Part("PyTorch, 1B", 80, PEERS),
    "peer-130M": Part("PyTorch, 130M", 70, PEERS),
    "contract": Part("Every row of the contract table, against the CPU", 240),
}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Options of the measurement."""

    minutes: float = 8.0
    """Time for everything, in minutes. Parts for which none is left are named in the report."""
    out: str = "results/accelerator"
    """Folder for results.json and report.md; made if it is absent."""
    parts: tuple[str, ...] = tuple(PARTS)
    """Parts to measure, in this order."""
    small: bool = False
    """Tiny sizes, to try the command out on a CPU."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < float("inf"):
            raise UserError(f"--minutes {self.minutes}: allowed is a number above 0; nearest: 1.")
        for name in self.parts:
            if name not in PARTS:
                raise UserError(
                    f"--parts {name} is not a part; nearest: {nearest(name, list(PARTS))}. Allowed are"
                    f" {', '.join(PARTS)}."
                )


def missing(packages: tuple[str, ...]) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def facts() -> dict[str, Any]:
    """What was measured with what. JAX is not started, because it would take the memory of the device."""
    known = ("jax", "jaxlib", "optax", "flax", "numpy", "torch", "transformers")
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "commit": said("git", "rev-parse", "HEAD"),
        "uncommitted changes": bool(said("git", "status", "--porcelain")),
        "versions": ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in known if not missing((name,))
        ),
        "device": said(
            "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
        ),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def said(*words: str) -> str:
    """What a command prints; nothing if it cannot run."""
    try:
        return subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def main(arguments: list[str]) -> int:
    name = "python -m train bench accelerator"
    options = tyro.cli(Accelerator, args=arguments, prog=name, description=__doc__)
    if absent := missing(NEEDED):
        raise UserError(f"Not installed: pip install {' '.join(absent)}")
    folder = pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(folder, {"environment": facts(), "options": dataclasses.asdict(options)})
    end = time.monotonic() + 60 * options.minutes
    for part in options.parts:
        left = end - time.monotonic()
        report.note(
            part, *measure(part, folder, min(PARTS[part].seconds, left), options.small, report)
        )
    say(f"\n{folder / 'report.md'} and {folder / 'results.json'} hold the results.")
    return 0


def measure(
    part: str, folder: pathlib.Path, seconds: float, small: bool, report: "Report"
) -> tuple[str, float]:
    """Runs a part in its own process, and adds its rows to the report as they come.

    Returns:
        how it ended, and its time [s].
    """
    if absent := missing(PARTS[part].needs):
        return f"left out: pip install {' '.join(absent)}", 0.0
    if seconds < 1:
        return "left out: no time was left", 0.0
    say(f"\n{PARTS[part].title} (at most {seconds:.0f} s)")
    rows, log = folder / f"{part}.jsonl", folder / f"{part}.log"
    rows.unlink(missing_ok=True)
    words = [sys.executable, "-m", "train.bench.accelerator_parts", part, str(rows.resolve())]
    start, seen = time.monotonic(), 0
    with log.open("w") as said:
        process = subprocess.Popen(
            [*words, *(["small"] if small else [])], cwd=ROOT, stdout=said, stderr=said
        )
        try:
            while (running := process.poll() is None) or seen < count(rows):
                for row in read(rows)[seen:]:
                    seen += 1
                    report.add(part, row)
                if running and time.monotonic() - start > seconds:
                    process.kill()
                    process.wait()
                    return f"ended after its {seconds:.0f} s", time.monotonic() - start
                if running:
                    time.sleep(0.2)
        finally:
            if process.poll() is None:
                process.kill()
    last = (log.read_text().strip().splitlines() or ["no message"])[-1][:300]
    ended = "complete" if process.returncode == 0 else f"failed, see {log.name}: {last}"
    return ended, time.monotonic() - start


def read(rows: pathlib.Path) -> list[dict[str, Any]]:
    """The complete lines of a file of rows."""
    text = rows.read_text() if rows.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def count(rows: pathlib.Path) -> int:
    return len(read(rows))


class Report:
    """results.json and report.md; both are whole after every row."""

    def __init__(self, folder: pathlib.Path, facts: dict[str, Any]):
        self.folder, self.facts = folder, facts
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.ends: dict[str, tuple[str, float]] = {}
        self.write()

    def add(self, part: str, row: dict[str, Any]) -> None:
        self.rows.setdefault(part, []).append(row)
        say("  " + "  ".join(f"{key} {format_value(value)}" for key, value in row.items()))
        self.write()

    def note(self, part: str, ended: str, seconds: float) -> None:
        self.ends[part] = ended, seconds
        say(f"  {part}: {ended}" + (f" ({seconds:.0f} s)" if seconds else ""))
        self.write()

    def write(self) -> None:
        whole = {**self.facts, "rows": self.rows, "ended": self.ends}
        put(self.folder / "results.json", json.dumps(whole, indent=1) + "\n")
        put(self.folder / "report.md", self.markdown())

    def markdown(self) -> str:
        facts = self.facts["environment"]
        lines = ["# An accelerator, measured", ""]
        lines += [f"* {key}: {value}" for key, value in facts.items() if value]
        for part in dict.fromkeys([*self.rows, *self.ends]):
            ended, seconds = self.ends.get(part, ("running", 0.0))
            lines += ["", f"## {PARTS[part].title}", "", f"`{part}`: {ended}, {seconds:.0f} s.", ""]
            lines += markdown(self.rows.get(part, []))
        return "\n".join(lines) + "\n"


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """Rows as a table; those with other columns begin a new one."""
    lines: list[str] = []
    columns: list[str] = []
    for row in rows:
        if list(row) != columns:
            columns = list(row)
            lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        cells = (format_value(value).replace("|", "/") for value in row.values())
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def put(path: pathlib.Path, text: str) -> None:
    """Replaces a file at once, so that it is never half written."""
    fresh = path.with_suffix(path.suffix + ".new")
    fresh.write_text(text)
    fresh.replace(path)
