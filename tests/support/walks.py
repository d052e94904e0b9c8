"""How far a reader walks: the files that a call enters, and how often it changes from one to another.

    python -m tests.support.walks

Counted are calls of Python functions of `optax_decay/`, `models/` and `train/`: from an assembled run to its first
batch (one traced step of a toy run), and from a config to an assembled run, on the way that `weight_decay` takes.
"""

import collections
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
OWN = tuple(f"{ROOT / folder}/" for folder in ("optax_decay", "models", "train"))


class Walk(NamedTuple):
    """The files of all calls, in their order."""

    files: list[str]

    @property
    def changes(self) -> int:
        return sum(a != b for a, b in zip(self.files, self.files[1:]))

    def __str__(self) -> str:
        steps = collections.Counter(pair for pair in zip(self.files, self.files[1:]))
        often = [(pair, n) for pair, n in steps.most_common() if pair[0] != pair[1]][:12]
        lines = [f"  {n:3d} times {a} -> {b}" for (a, b), n in often]
        head = f"{len(set(self.files))} files, {self.changes} changes, {len(self.files)} calls"
        return "\n".join([head, *lines])


def walk(function: Callable[[], Any]) -> tuple[Any, Walk]:
    """The result of a call, and its walk."""
    files: list[str] = []

    def note(frame: Any, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(OWN):
            files.append(name.removeprefix(f"{ROOT}/"))

    sys.setprofile(note)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return result, Walk(files)


def main() -> None:
    from tests.support.runs import flags
    from train import main as trainer
    from train.cli import parse

    with tempfile.TemporaryDirectory() as folder:
        config = parse(flags(pathlib.Path(folder)))
        data = trainer.read_data(config)
        run, assembly = walk(lambda: trainer.assemble(config, data))
        step, batch, shapes = run.program.update, run.batch(0), run.program.placed_shapes()
        _, traced = walk(lambda: step.trace(shapes, batch))
    print(f"weight_decay through assembly: {assembly}\n\none batch through a traced step: {traced}")


if __name__ == "__main__":
    main()
