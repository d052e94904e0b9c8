"""Checkpoints of a run: the state of the step and what it takes to know that it fits.

    checkpoints/STEP/state    every array of {"params", "optimizer", "step"} (Orbax)
    checkpoints/STEP/meta     JSON: step, config, digest of the text, path, shape and dtype of every array

Written in the background and made visible by one rename, so that a kill leaves the one before. A
checkpoint that cannot be read is set aside as `unreadable-STEP`, never deleted, and the one before
is used. Arrays are trusted as Orbax returns them; `Checkpoints._read` is where their digests will
be compared with a manifest.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from optax_decay.paths import leaf_paths
from train.arguments import from_json
from train.config import MAY_CHANGE, Config, UserError, differences


def structure(state: Any) -> dict[str, str]:
    """Path to "dtype[shape]" of every array in a state."""
    texts = [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(state)]
    return dict(zip(leaf_paths(state), texts, strict=True))


def describe(config: Config, text: str, state: Any) -> dict[str, Any]:
    """The meta of a run's checkpoints; `text` is the digest of the corpus."""
    return {"config": dataclasses.asdict(config), "text": text, "structure": structure(state)}


class Checkpoints:
    """The folder of checkpoints of one run. At most `keep` are kept, the newest ones."""

    def __init__(self, folder: pathlib.Path, keep: int):
        # Failures are told in our words; Orbax and its abandoned reads log them too, at length.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.folder = folder.resolve()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state: Any, meta: dict[str, Any], step: int) -> None:
        """Starts writing and returns; the state may be overwritten at once. Waits for the save before it."""
        if step in self.steps:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave({"step": step, **meta})
        )
        self._manager.save(step, args=items)

    def wait(self) -> None:
        """Until the last save is on disk."""
        self._manager.wait_until_finished()

    def restore(
        self, abstract: Any, meta: dict[str, Any], say: Callable[[str], None]
    ) -> tuple[Any, int] | None:
        """The newest state that can be read, and its step; None if nothing was ever saved.

        Args:
            abstract: tree of ShapeDtypeStruct with shardings: where to put what.
            meta: of the run that goes on; see `describe`.
            say: told about checkpoints that had to be passed over.

        Raises:
            UserError: the checkpoint belongs to another config, text or structure, or none of those
                that there are can be read.
        """
        for step in reversed(self.steps):
            try:
                found = self._read(step, meta=ocp.args.JsonRestore())["meta"]
            except Exception as error:
                self._set_aside(step, error, say)
                continue
            compare(found, meta, self.folder)
            try:
                return self._read(step, state=ocp.args.StandardRestore(abstract))["state"], step
            except Exception as error:
                self._set_aside(step, error, say)
        if any(self.folder.glob("unreadable-*")):
            raise UserError(
                f"No checkpoint in {self.folder} can be read. To train again from the start, remove"
                f" {self.folder.parent} or name another --run.folder."
            )
        return None

    def _read(self, step: int, **items: Any) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _set_aside(self, step: int, error: Exception, say: Callable[[str], None]) -> None:
        reason = str(error).strip().split("\n")[0][:200]
        place = self.folder / f"unreadable-{step}"
        (self.folder / str(step)).rename(place)
        self._manager.reload()
        say(
            f"The checkpoint of step {step} cannot be read and was moved to {place}; trying the one"
            f" before it. ({type(error).__name__}: {reason})"
        )


def compare(old: dict[str, Any], new: dict[str, Any], where: pathlib.Path) -> None:
    """Raises UserError if a run described by `new` cannot go on from a checkpoint described by `old`."""
    before, now = (
        from_json(json.dumps(meta["config"]), f"the config in {where}") for meta in (old, new)
    )
    refuse_changes(before, now, str(where.parent))
    if old["text"] != new["text"]:
        raise UserError(
            f"The text has changed since {where} was written: its digest was {old['text'][:16]},"
            f" now it is {new['text'][:16]}. Train on the old text, or start a new run."
        )
    a, b = old["structure"], new["structure"]
    changed = [path for path in {**a, **b} if a.get(path) != b.get(path)]
    if changed:
        lines = [f"  {p}: {a.get(p, 'absent')} -> {b.get(p, 'absent')}" for p in changed[:8]]
        more = [f"  and {len(changed) - 8} more"] if len(changed) > 8 else []
        raise UserError(
            f"The arrays in {where} do not fit this program (of {len(b)}, {len(changed)} differ); it was"
            " written by another version of it:\n" + "\n".join(lines + more)
        )


def refuse_changes(before: Config, now: Config, where: str) -> None:
    """Raises UserError, with the fields, if a run may not continue as `now` what it began as `before`."""
    changed = {n: v for n, v in differences(before, now).items() if n not in MAY_CHANGE}
    if changed:
        lines = "\n".join(f"  {name}: {old} -> {new}" for name, (old, new) in changed.items())
        raise UserError(
            f"{where} holds a run with another config; it cannot go on with these changes:\n{lines}\n"
            f"To go on as it was: --resume {where}. To start anew: another --run.folder, or none."
        )
