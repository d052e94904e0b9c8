"""A tiny comparison on repeated text that several tests look at."""

import pathlib
from typing import NamedTuple

import pytest

from tests.support.runs import write_text
from train.study.regimes import main as command

SHAPE = {
    "width": 16,
    "mlp_width": 24,
    "layers": 1,
    "heads": 2,
    "length": 12,
    "batch_size": 4,
    "eval_batches": 2,
    "chunk": 4,
}
FIELDS = {"unique": 600, "steps": 4, "trials": 9, "seeds": 4, "processes": 1, "arms": "huber"}


class Finished(NamedTuple):
    """Its folder, its command line, the lines when it was stopped, and all of them."""

    folder: pathlib.Path
    arguments: list[str]
    stopped_at: int
    lines: int


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    flags = [x for name, value in SHAPE.items() for x in (f"--task.{name}", str(value))]
    flags += [x for name, value in FIELDS.items() for x in (f"--{name}", str(value))]
    where = ["--texts", str(write_text(folder)), "--folder", str(folder / "repeated")]
    arguments = ["repeated", "smoke", *flags, *where]
    path = folder / "repeated" / "results.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        # The time is over when some runs are there.
        def now():
            return 1e9 if path.exists() and len(path.read_text().splitlines()) >= 12 else 0.0

        patch.setattr(command.time, "monotonic", now)
        command.main([*arguments, "--minutes", "1"])
    stopped_at = len(path.read_text().splitlines())
    command.main(arguments)
    return Finished(path.parent, arguments, stopped_at, len(path.read_text().splitlines()))
