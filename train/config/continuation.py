"""Whether a run may go on as something else than it began."""

import json
import pathlib
import shlex
from typing import Any

from train.config.fields import Config, differences
from train.config.rules import MAY_CHANGE, MAY_MIGRATE
from train.config.saved import from_json
from train.errors import UserError
from train.step import tasks


def compare(
    old: dict[str, Any], new: dict[str, Any], where: pathlib.Path, migrating: bool = False
) -> None:
    """Raises UserError if a run described by `new` cannot go on from a checkpoint described by `old`."""
    before, now = (
        from_json(json.dumps(meta["config"]), f"the config in {where}") for meta in (old, new)
    )
    refuse_changes(before, now, str(where.parent), migrating)
    if old["text"] != new["text"]:
        raise UserError(
            f"The {tasks.of(now).noun} to train on changed since {where} was written: the digest was"
            f" {old['text'][:16]}, now it is {new['text'][:16]}. Train on what it was, or start a new run."
        )
    a, b = old["structure"], new["structure"]
    changed = [path for path in {**a, **b} if a.get(path) != b.get(path)]
    if changed and not migrating:
        lines = [f"  {p}: {a.get(p, 'absent')} -> {b.get(p, 'absent')}" for p in changed[:8]]
        more = [f"  and {len(changed) - 8} more"] if len(changed) > 8 else []
        raise UserError(
            f"The arrays in {where} do not fit this program (of {len(b)}, {len(changed)} differ); it was"
            " written by another version of it:\n"
            + "\n".join(lines + more)
            + "\n--run.migrate True"
            " goes on with those whose names and shapes agree, and says which."
        )


def refuse_changes(before: Config, now: Config, where: str, migrating: bool = False) -> None:
    """Raises UserError, with the fields, if a run may not continue as `now` what it began as `before`."""
    changed = {
        name: value
        for name, value in differences(before, now).items()
        if name not in MAY_CHANGE and not (migrating and name.startswith(MAY_MIGRATE))
    }
    if changed:
        lines = "\n".join(f"  {name}: {old} -> {new}" for name, (old, new) in changed.items())
        other = all(name.startswith(MAY_MIGRATE) for name in changed)
        raise UserError(
            f"{where} holds a run with another config; it cannot go on with these changes:\n{lines}\n"
            f"To go on as it was: --resume {shlex.quote(where)}. To start anew: another --run.folder, or none."
            + (
                " To go on with another optimizer all the same: --run.migrate True."
                if other
                else ""
            )
        )
