"""Checkpoints that a run once saved and that are not there any more: nothing is overwritten without a word.

`saved.json` in the run folder says of which step the newest checkpoint is. Where it names a checkpoint that is gone,
a run does not begin again unless `--run.restart True` asks for it, and then its records are kept aside.
"""

import json
import pathlib
import shlex

from train import disk
from train.display import say
from train.errors import UserError
from train.run.folder import write
from train.run.records import read_records

SAVED = "saved.json"


def note_saved(run: pathlib.Path, step: int) -> None:
    """Writes down that the checkpoint of a step is on the disk."""
    write(run / SAVED, json.dumps({"step": step}) + "\n")


def newest_saved(run: pathlib.Path) -> int | None:
    """The step of the newest checkpoint that the run has saved; None if it has saved none, or the note is damaged."""
    try:
        step = json.loads(disk.read_json_text(run / SAVED))["step"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int and step >= 0 else None


def check_restart(run: pathlib.Path, steps: list[int], restart: bool) -> None:
    """Raises UserError if `--run.restart True` is given for a run that has checkpoints."""
    if restart and steps:
        raise UserError(
            f"{run} has a checkpoint of step {steps[-1]}, so --run.restart True would throw away what was trained;"
            " leave it out to go on, or begin a new run in another --run.folder."
        )


def check_restored(run: pathlib.Path, start: int | None, restart: bool) -> None:
    """Reports and keeps what is lost, before a run goes on after step `start`, or begins (None).

    Raises:
        UserError: the run has saved checkpoints, and none is there.
    """
    saved, metrics = newest_saved(run), run / "metrics.jsonl"
    if start is not None:
        told = any((run / "checkpoints").glob(f"unreadable-{saved}*"))
        if saved is not None and saved > start and not told:
            say(
                f"The checkpoint of step {saved}, the newest that this run saved, is gone; it goes on after step"
                f" {start}."
            )
        return
    last = max((record["step"] for record in read_records(metrics)), default=0)
    if not restart and saved is not None:
        raise UserError(
            f"{run} has saved a checkpoint of step {saved}, but {run / 'checkpoints'} holds none; put them back to"
            f" go on. To train again from the start: --resume {shlex.quote(str(run))} --run.restart True, which"
            f" keeps the records of its {last} steps aside."
        )
    if restart or last > 0:
        why = "As asked" if restart else "It was ended before its first checkpoint"
        kept = ""
        if metrics.exists():
            aside = disk.free_path(metrics, "earlier")
            metrics.replace(aside)
            kept = f" Its records up to step {last} are kept in {aside.name}."
        say(f"{why}, {run} begins again at step 0.{kept}")
    (run / SAVED).unlink(missing_ok=True)
