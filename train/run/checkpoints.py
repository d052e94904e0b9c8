"""Checkpoints of a run: the training state, and a description that decides whether a run can continue from it.

    checkpoints/STEP/state        every array of {"params", "optimizer", "step"}, by its path (Orbax)
    checkpoints/STEP/meta         JSON: step, config, digest of the data; path, shape, dtype, name and digest of every
                                  array
    checkpoints/STEP/seal.json    size and digest of every file of the two (integrity.py)

A checkpoint is written in the background, and one rename makes it visible, so a kill leaves the previous checkpoint
intact. Restoring compares every array with its digest. A damaged checkpoint is renamed to `unreadable-STEP`, never
deleted, and the previous one is used. The seal is written after the rename. A checkpoint without a seal was interrupted
between the two, and only the digests of its arrays are verified.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from optax_decay.axes import leaf_paths
from train import disk, processes
from train.config.continuation import compare
from train.config.fields import Config
from train.config.tree import as_dict
from train.errors import UserError
from train.run import integrity, migration, relayout
from train.step import replicas

LATE = 60.0  # s that a shared folder may take to show a checkpoint to every process


def structure(state: Any) -> dict[str, str]:
    """Path to "dtype[shape]" of every array in a state."""
    return {path: f"{x.dtype}{list(x.shape)}" for path, x in flat(state).items()}


def flat(state: Any) -> dict[str, Any]:
    """Path to array, for every array in a state."""
    return dict(zip(leaf_paths(state), jax.tree.leaves(state), strict=True))


def describe(config: Config, text: str, state: Any) -> dict[str, Any]:
    """The meta that the checkpoints of a run have in common; `text` is the digest of the data."""
    return {
        "config": as_dict(config),
        "text": text,
        "structure": structure(state),
        "names": migration.leaf_names(state),
    }


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are.
        keep: number of newest checkpoints that are kept; None keeps all.
        keep_every: the checkpoints of every `keep_every`-th step are kept permanently.
        read_only: whether nothing in the folder may change.
        saved: receives the step of every checkpoint once it is on the disk; called in the first process.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        keep: int | None = None,
        keep_every: int | None = None,
        read_only: bool = False,
        saved: Callable[[int], None] = lambda step: None,
    ):
        # Failures are reported by this class. Orbax and the reads that it abandons log them as well, at length.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._quiet = disk.QuietAfterFailedSave()
        self.folder = folder.resolve()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(read_only=True)
            if read_only
            else ocp.CheckpointManagerOptions(
                max_to_keep=keep, keep_period=keep_every, cleanup_tmp_directories=True
            ),
        )
        self._saved = saved
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self._settle()
        self._manager.close()
        self._quiet.end()

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def _agreed_steps(self) -> list[int]:
        """The steps that the first process sees. A shared folder may show the last renames late to other machines."""
        steps = json.loads(processes.from_first(lambda: json.dumps(self.steps)))
        end = time.monotonic() + LATE
        while late := [step for step in steps if not (self.folder / str(step)).is_dir()]:
            if time.monotonic() > end:
                raise UserError(
                    f"Process {jax.process_index()} does not see the checkpoint of step {late[-1]} in {self.folder},"
                    f" which process 0 sees, after {LATE:.0f} s. The run folder must be shared by all processes."
                )
            time.sleep(0.2)
        if jax.process_count() > 1:
            self._manager.reload()
        return steps

    def save(
        self, state: Any, meta: dict[str, Any], step: int, say: Callable[[str], None] = print
    ) -> None:
        """Starts writing a checkpoint, and returns. The state may be overwritten immediately.

        Waits for the previous save. If it failed, this is reported through `say`, and the new checkpoint is written
        nevertheless, because a full disk may have room again.
        """
        try:
            self.wait()
        except OSError as error:
            say(f"{error}. Training continues, and the next checkpoint may fit.")
        if step in self.steps:
            return
        arrays = flat(state)
        more = {"step": step, "digests": integrity.digests(arrays)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            meta=ocp.args.JsonSave(integrity.add_digest({**meta, **more})),
        )
        try:
            self._manager.save(step, args=items)
        except Exception as error:
            self._fail(step, error)
            return
        self._thread = threading.Thread(target=self._finish, args=(step,))
        self._thread.start()

    def wait(self) -> None:
        """Waits until the last save is on disk; raises OSError if it failed."""
        self._settle()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _settle(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        if self._error is not None:
            # Orbax raises the error once in every thread. Raise it here, so that the next save or `close` does not.
            with contextlib.suppress(Exception):
                self._manager.wait_until_finished()

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._fail(step, error)
            return
        if jax.process_index() == 0:
            # The digests of its arrays still protect a checkpoint without a seal.
            with contextlib.suppress(OSError):
                integrity.seal(self.folder / str(step))
            with contextlib.suppress(OSError):
                self._saved(step)

    def _fail(self, step: int, error: Exception) -> None:
        """Removes the incomplete files, and keeps the error for `wait`."""
        disk.remove_matching(self.folder, f"{step}.orbax-checkpoint-tmp*")
        self._manager.reload()
        self._error = OSError(
            f"The checkpoint of step {step} could not be written: {disk.short_reason(error)}"
        )

    def restore(
        self,
        abstract: Any,
        meta: dict[str, Any],
        say: Callable[[str], None],
        fresh: Callable[[Any], Any] | None = None,
    ) -> tuple[Any, int] | None:
        """Restores the newest intact checkpoint.

        Args:
            abstract: the state as a tree of ShapeDtypeStruct with shardings.
            meta: of the run that continues; see `describe`.
            say: receives reports about damaged checkpoints, and about the result of a migration.
            fresh: maps parameters to a new optimizer state. If given, the optimizer may differ from the saved one,
                and keeps the state that has the same names (migration.py).

        Returns:
            The state and its step; None if there is no checkpoint.

        Raises:
            UserError: the checkpoint has another config, text or structure, or no checkpoint can be read.
        """
        for step in reversed(self._agreed_steps()):
            saved, error = processes.in_all_processes(self.meta, step)
            if error is None:
                wanted, finish = replicas.as_saved(abstract, saved, meta, say)
                compare(
                    saved, meta | {"structure": structure(wanted)}, self.folder, fresh is not None
                )
                plan = None
                if fresh:
                    old = _leaves(saved)
                    if wanted is not abstract:  # the compression errors of other workers start anew
                        old = {path: x for path, x in old.items() if not replicas.is_error(x[0])}
                    own, old = _relaid(old, _leaves(meta))
                    plan, wanted = migration.plan_migration(old, _leaves(meta)), abstract
                    plan = dataclasses.replace(plan, pieces=own)
                    migration.refuse_lost_start(plan, meta["names"], meta["config"])
                state, error = processes.in_all_processes(
                    self._state, step, saved, wanted, plan, fresh
                )
                if error is None:
                    if not integrity.is_sealed(self.folder / str(step)):
                        say(
                            f"The checkpoint of step {step} has no {integrity.SEAL}: saving was interrupted"
                            " at the very end, or the file was lost. All arrays match their digests."
                        )
                    if plan and plan.changes:
                        say(f"The optimizer has changed since step {step}:\n{plan}")
                    return state if plan else finish(state), step
            self._set_aside(step, error, say)
        if any(self.folder.glob("unreadable-*")):
            raise UserError(
                f"No checkpoint in {self.folder} can be read. To train again from the start: --run.restart True, which"
                " keeps the records aside, or another --run.folder."
            )
        return None

    def parameters(self, step: int, place: jax.sharding.Sharding) -> tuple[dict[str, Any], Any]:
        """Reads the parameters of one step, and nothing else.

        Args:
            step: of a checkpoint.
            place: sharding of every parameter.

        Returns:
            Parameters by path, and the meta of the checkpoint.

        Raises:
            integrity.Damaged: the parameters do not match their digests.
        """
        meta = self.meta(step)
        wanted = {
            path.removeprefix("params/"): migration.parse_shape(text)
            for path, text in meta["structure"].items()
            if path.startswith("params/")
        }
        placed = {
            f"params/{path}": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
            for path, x in wanted.items()
        }
        arrays = self._arrays(step, meta, placed)
        return {path: arrays[f"params/{path}"] for path in wanted}, meta

    def meta(self, step: int) -> dict[str, Any]:
        """The meta of one checkpoint; raises integrity.Damaged unless all of its files match the seal."""
        folder = self.folder / str(step)
        if jax.process_index() == 0 and integrity.is_sealed(folder):
            integrity.check_seal(folder)
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = integrity.verify_digest(self._manager.restore(step, args=items)["meta"])
        _check(meta, step)
        return meta

    def _state(self, step: int, meta: Any, abstract: Any, plan: Any, fresh: Any) -> Any:
        wanted = flat(abstract)
        if not plan or not plan.changes:
            arrays = self._arrays(step, meta, wanted)
            treedef = jax.tree.structure(abstract)
            return jax.tree.unflatten(treedef, [arrays[path] for path in leaf_paths(abstract)])
        now = structure(abstract)
        saved = {
            old: wanted[new]
            if meta["structure"][old] == now[new]
            else _typed(meta["structure"][old], wanted[new].sharding)
            for new, old in plan.kept.items()
            if old not in plan.pieces
        }
        for path, own in plan.pieces.items():
            whole = _whole(wanted[path].sharding)
            saved |= {old: _typed(meta["structure"][old], whole) for old, _ in own}
        arrays = self._arrays(step, meta, saved)
        kept = {
            new: relayout.assembled(plan.pieces[old], arrays, wanted[new].sharding)
            if old in plan.pieces
            else arrays[old]
            for new, old in plan.kept.items()
        }
        params = migration.replace_leaves(abstract["params"], _below("params", kept))
        state = {**abstract, "params": params, "optimizer": fresh(params)}
        if "average" in abstract:  # starts as a copy of the weights
            state["average"] = jax.tree.map(jnp.copy, params)
        return migration.replace_leaves(state, kept)

    def _arrays(self, step: int, meta: Any, wanted: dict[str, Any]) -> dict[str, Any]:
        """Reads the wanted arrays of a checkpoint, and verifies their digests."""
        arguments = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays = reader.restore(self.folder / str(step) / "state", arguments)
        if arrays.keys() != wanted.keys():
            raise integrity.Damaged(f"it holds {len(arrays)} of {len(wanted)} arrays")
        integrity.compare_digests(integrity.digests(arrays), meta["digests"])
        return arrays

    def _set_aside(self, step: int, error: Exception, say: Callable[[str], None]) -> None:
        place = disk.unreadable_path(self.folder / str(step))
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(place)
        processes.wait_for_all(f"set aside {place.name}")
        self._manager.reload()
        say(
            f"The checkpoint of step {step} cannot be read and was moved to {place}; the previous checkpoint"
            f" is used instead. ({type(error).__name__}: {disk.first_line(error)})"
        )


def _typed(text: str, sharding: Any) -> jax.ShapeDtypeStruct:
    x = migration.parse_shape(text)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _whole(sharding: Any) -> Any:
    """A sharding on the same devices that splits nothing."""
    named = isinstance(sharding, jax.sharding.NamedSharding)
    return jax.sharding.NamedSharding(sharding.mesh, jax.P()) if named else sharding


def _relaid(
    old: dict[str, tuple[str, str]], new: dict[str, tuple[str, str]]
) -> tuple[dict[str, relayout.Pieces], dict[str, tuple[str, str]]]:
    """The pieces of what is laid out otherwise, and the old leaves as if they had the new layout."""

    def shapes(leaves: dict[str, tuple[str, str]]) -> dict[str, jax.ShapeDtypeStruct]:
        found = {}
        for path, (_, text) in leaves.items():
            with contextlib.suppress(ValueError):  # random keys
                found[path] = migration.parse_shape(text)
        return found

    own = relayout.pieces(shapes(old), shapes(new))
    used = {path for part in own.values() for path, _ in part}
    return own, {p: leaf for p, leaf in old.items() if p not in used} | {p: new[p] for p in own}


def _below(prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    start = prefix + "/"
    return {path[len(start) :]: x for path, x in arrays.items() if path.startswith(start)}


def _leaves(meta: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {path: (meta["names"][path], text) for path, text in meta["structure"].items()}


def _check(meta: dict[str, Any], step: int) -> None:
    """Raises Damaged unless the meta of a checkpoint has the form that `save` writes."""
    tables = [meta.get(name) for name in ("structure", "names", "digests")]
    texts = all(
        isinstance(table, dict) and all(isinstance(text, str) for text in table.values())
        for table in tables
    )
    whole = texts and len({frozenset(table) for table in tables if table is not None}) == 1
    if not whole or not isinstance(meta.get("text"), str) or meta.get("step") != step:
        raise integrity.Damaged(f"its meta does not describe a checkpoint of step {step}")
    if not isinstance(meta.get("config"), dict):
        raise integrity.Damaged("its meta contains no config")
