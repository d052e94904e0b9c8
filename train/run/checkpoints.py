"""Checkpoints of a run: the state of the step and what it takes to know that it fits.

    checkpoints/STEP/state        every array of {"params", "optimizer", "step"}, by its path (Orbax)
    checkpoints/STEP/meta         JSON: step, config, digest of the text; path, shape, dtype, name and
                                  digest of every array
    checkpoints/STEP/seal.json    size and digest of every file of the two (integrity.py)

Written in the background and made visible by one rename, so that a kill leaves the one before. What
is restored is compared with the digests; a checkpoint that is not what was written is set aside as
`unreadable-STEP`, never deleted, and the one before is used. The seal follows the rename: a
checkpoint without one was cut off in between, and is judged by the digests of its arrays alone.
"""

import contextlib
import logging
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from optax_decay.parameters.paths import leaf_paths
from train import disk, processes
from train.config.continuation import compare
from train.config.fields import Config, UserError
from train.config.tree import as_dict
from train.run import integrity
from train.run import migration as migrate
from train.step import replicas


def structure(state: Any) -> dict[str, str]:
    """Path to "dtype[shape]" of every array in a state."""
    return {path: f"{x.dtype}{list(x.shape)}" for path, x in flat(state).items()}


def flat(state: Any) -> dict[str, Any]:
    """Path to array."""
    return dict(zip(leaf_paths(state), jax.tree.leaves(state), strict=True))


def describe(config: Config, text: str, state: Any) -> dict[str, Any]:
    """The meta of a run's checkpoints; `text` is the digest of the data."""
    return {
        "config": as_dict(config),
        "text": text,
        "structure": structure(state),
        "names": migrate.names(state),
    }


class Checkpoints:
    """The folder of checkpoints of one run.

    The newest `keep` are kept, and for good those of every `keep_every`-th step. With `read_only`
    nothing in it is changed.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        keep: int | None = None,
        keep_every: int | None = None,
        read_only: bool = False,
    ):
        # Failures are told in our words; Orbax and its abandoned reads log them too, at length.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._quiet = disk.Quiet()
        self.folder = folder.resolve()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(read_only=True)
            if read_only
            else ocp.CheckpointManagerOptions(
                max_to_keep=keep, keep_period=keep_every, cleanup_tmp_directories=True
            ),
        )
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

    def save(
        self, state: Any, meta: dict[str, Any], step: int, say: Callable[[str], None] = print
    ) -> None:
        """Starts writing and returns; the state may be overwritten at once.

        Waits for the save before this one. If that could not be written, which is told, this one is
        tried all the same: a full disk may have been cleared meanwhile.
        """
        try:
            self.wait()
        except OSError as error:
            say(f"{error}. Training goes on; the next checkpoint may fit.")
        if step in self.steps:
            return
        arrays = flat(state)
        more = {"step": step, "digests": integrity.digests(arrays)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            meta=ocp.args.JsonSave(integrity.signed({**meta, **more})),
        )
        try:
            self._manager.save(step, args=items)
        except Exception as error:
            self._fail(step, error)
            return
        self._thread = threading.Thread(target=self._finish, args=(step,))
        self._thread.start()

    def wait(self) -> None:
        """Until the last save is on disk; raises OSError if it could not be written."""
        self._settle()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _settle(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        if self._error is not None:
            # Orbax raises it once in every thread: here, lest the next save or `close` does.
            with contextlib.suppress(Exception):
                self._manager.wait_until_finished()

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._fail(step, error)
            return
        if jax.process_index() == 0:
            # Without a seal, the digests of its arrays still guard a checkpoint.
            with contextlib.suppress(OSError):
                integrity.seal(self.folder / str(step))

    def _fail(self, step: int, error: Exception) -> None:
        """Makes room again, and keeps the reason for `wait`."""
        disk.remove(self.folder, f"{step}.orbax-checkpoint-tmp*")
        self._manager.reload()
        self._error = OSError(
            f"The checkpoint of step {step} could not be written: {disk.reason(error)}"
        )

    def restore(
        self,
        abstract: Any,
        meta: dict[str, Any],
        say: Callable[[str], None],
        fresh: Callable[[Any], Any] | None = None,
    ) -> tuple[Any, int] | None:
        """The newest state that is what was saved, and its step; None if nothing was ever saved.

        Args:
            abstract: tree of ShapeDtypeStruct with shardings: where to put what.
            meta: of the run that goes on; see `describe`.
            say: told about checkpoints that had to be passed over, and what a migration did.
            fresh: parameters to a new optimizer state. Given, another optimizer than the saved one
                is allowed, and gets what has the same name (migrate.py).

        Raises:
            UserError: the checkpoint belongs to another config, text or structure, or none of those
                that there are can be read.
        """
        for step in reversed(self.steps):
            found, error = processes.together(self.meta, step)
            if error is None:
                wanted, finish = replicas.as_saved(abstract, found, meta, say)
                compare(
                    found, meta | {"structure": structure(wanted)}, self.folder, fresh is not None
                )
                plan = None
                if fresh:
                    old = _leaves(found)
                    if wanted is not abstract:  # errors of other workers begin anew with all else
                        old = {path: x for path, x in old.items() if not replicas.is_error(x[0])}
                    plan, wanted = migrate.plan(old, _leaves(meta)), abstract
                state, error = processes.together(self._state, step, found, wanted, plan, fresh)
                if error is None:
                    if not integrity.is_sealed(self.folder / str(step)):
                        say(
                            f"The checkpoint of step {step} has no {integrity.SEAL}: it was cut off"
                            " at the very end, or that file is lost. Its arrays are what was saved."
                        )
                    if plan and plan.changes:
                        say(f"The optimizer has changed since step {step}:\n{plan}")
                    return state if plan else finish(state), step
            self._set_aside(step, error, say)
        if any(self.folder.glob("unreadable-*")):
            raise UserError(
                f"No checkpoint in {self.folder} can be read. To train again from the start, remove"
                f" {self.folder.parent} or name another --run.folder."
            )
        return None

    def parameters(self, step: int, place: jax.sharding.Sharding) -> tuple[dict[str, Any], Any]:
        """The parameters of one step by path, all placed alike, and the meta; the rest is not read.

        Raises:
            integrity.Damaged: they are not what was saved.
        """
        found = self.meta(step)
        wanted = {
            path.removeprefix("params/"): migrate.parse(text)
            for path, text in found["structure"].items()
            if path.startswith("params/")
        }
        placed = {
            f"params/{path}": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
            for path, x in wanted.items()
        }
        arrays = self._arrays(step, found, placed)
        return {path: arrays[f"params/{path}"] for path in wanted}, found

    def meta(self, step: int) -> dict[str, Any]:
        """Of one checkpoint, all of whose files are what was written."""
        folder = self.folder / str(step)
        if jax.process_index() == 0 and integrity.is_sealed(folder):
            integrity.check_seal(folder)
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        found = integrity.verified(self._manager.restore(step, args=items)["meta"])
        _check(found, step)
        return found

    def _state(self, step: int, found: Any, abstract: Any, plan: Any, fresh: Any) -> Any:
        wanted = flat(abstract)
        if not plan or not plan.changes:
            arrays = self._arrays(step, found, wanted)
            treedef = jax.tree.structure(abstract)
            return jax.tree.unflatten(treedef, [arrays[path] for path in leaf_paths(abstract)])
        now = structure(abstract)
        saved = {
            old: wanted[new]
            if found["structure"][old] == now[new]
            else _typed(found["structure"][old], wanted[new].sharding)
            for new, old in plan.kept.items()
        }
        arrays = self._arrays(step, found, saved)
        kept = {new: arrays[old] for new, old in plan.kept.items()}
        params = migrate.join(abstract["params"], _below("params", kept))
        state = {**abstract, "params": params, "optimizer": fresh(params)}
        if "average" in abstract:  # begins at the weights, in memory of its own
            state["average"] = jax.tree.map(jnp.copy, params)
        return migrate.join(state, kept)

    def _arrays(self, step: int, found: Any, wanted: dict[str, Any]) -> dict[str, Any]:
        """Some of the arrays of a checkpoint, compared with their digests."""
        arguments = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays = reader.restore(self.folder / str(step) / "state", arguments)
        if arrays.keys() != wanted.keys():
            raise integrity.Damaged(f"it holds {len(arrays)} of {len(wanted)} arrays")
        integrity.compare_digests(integrity.digests(arrays), found["digests"])
        return arrays

    def _set_aside(self, step: int, error: Exception, say: Callable[[str], None]) -> None:
        place = disk.aside(self.folder / str(step))
        if jax.process_index() == 0:
            (self.folder / str(step)).rename(place)
        processes.wait_for_all(f"set aside {place.name}")
        self._manager.reload()
        say(
            f"The checkpoint of step {step} cannot be read and was moved to {place}; trying the one"
            f" before it. ({type(error).__name__}: {disk.first_line(error)})"
        )


def _typed(text: str, sharding: Any) -> jax.ShapeDtypeStruct:
    found = migrate.parse(text)
    return jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=sharding)


def _below(prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    start = prefix + "/"
    return {path[len(start) :]: x for path, x in arrays.items() if path.startswith(start)}


def _leaves(meta: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {path: (meta["names"][path], text) for path, text in meta["structure"].items()}


def _check(found: dict[str, Any], step: int) -> None:
    """Raises Damaged unless the meta of a checkpoint has the form that `save` gives it."""
    tables = [found.get(name) for name in ("structure", "names", "digests")]
    texts = all(
        isinstance(table, dict) and all(isinstance(text, str) for text in table.values())
        for table in tables
    )
    whole = texts and len({frozenset(table) for table in tables if table is not None}) == 1
    if not whole or not isinstance(found.get("text"), str) or found.get("step") != step:
        raise integrity.Damaged(f"its meta is not that of a checkpoint of step {step}")
    if not isinstance(found.get("config"), dict):
        raise integrity.Damaged("its meta holds no config")
