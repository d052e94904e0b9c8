"""What is done to checkpoints and to numbers inside of this process: damage, edits of a chain, NaN."""

import pathlib
import random
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_decay
from train.config.fields import Config
from train.run import checkpoints as checkpoint
from train.run import integrity
from train.run import migration as migrate
from train.torture import damage
from train.torture.runs import saved
from train.weights import params


def _rate(count: Any) -> Any:
    return 0.01 / (1 + count)


# What a run that began with `optax.adamw(0.01)` may want to be (needs: state by name, not by place).
EDITS: dict[str, Callable[[], Any]] = {
    "schedule of the rate": lambda: optax.adamw(_rate),
    "schedule of the decay": lambda: optax.adamw(0.01, weight_decay=_rate),
    "mask": lambda: optax.adamw(0.01, mask={"w": True, "b": False}),
    "clipping in front": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01)),
    "decay removed": lambda: optax.adam(0.01),
    "lion": lambda: optax.lion(0.01),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(0.01),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adamw(0.01), 3),
    "MultiSteps": lambda: optax.MultiSteps(optax.adamw(0.01), 2),
}


def damages(run: pathlib.Path, count: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Damages the newest checkpoint of a finished run, each time from a fresh copy, and restores.

    What comes back is compared bit for bit with what was there: the checkpoint before, or the same
    one where nothing but its seal is gone.
    """
    generator, newest = random.Random(seed), saved(run)[-1]
    here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with checkpoint.Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        meta = checkpoints.meta(newest)
        wanted = {step: checkpoints.meta(step)["digests"] for step in saved(run)}
    abstract = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
        for path, x in ((path, migrate.parse(text)) for path, text in meta["structure"].items())
    }
    counts = dict.fromkeys(("flip", "cut", "delete"), 0)
    result = {"found": 0, "seal_gone_and_equal": 0, "silent": 0, "kinds": counts}
    for number in range(count):
        kind = generator.choice(list(counts))
        copy = run.parent / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        for step in saved(run)[-2:]:
            shutil.copytree(run / f"checkpoints/{step}", copy / f"checkpoints/{step}")
        done = damage.one(copy / f"checkpoints/{newest}", generator, kind)
        counts[kind] += 1
        said: list[str] = []
        with checkpoint.Checkpoints(copy / "checkpoints", 4) as checkpoints:
            found = checkpoints.restore(abstract, meta, said.append)
        state, step = found if found is not None else ({}, -1)
        equal = step in wanted and integrity.digests(state) == wanted[step]
        if equal and step != newest and "cannot be read" in said[0]:
            result["found"] += 1
        elif equal and done == f"delete {integrity.SEAL}" and integrity.SEAL in said[0]:
            result["seal_gone_and_equal"] += 1
        else:
            result["silent"] += 1
            say(f"not found: {done}")
        if (number + 1) % 20 == 0 or number + 1 == count:
            say(f"damage {number + 1} of {count}, {result['silent']} not found")
    return result


def edits(folder: pathlib.Path, say: Callable[[str], None]) -> dict[str, str]:
    """What became of the state of AdamW under each edit: "kept by name", or what went wrong."""
    tx, here = optax.adamw(0.01), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    weights = {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.arange(5.0) - 2}
    before = {"params": weights, "optimizer": tx.init(weights), "step": jnp.asarray(2, jnp.int32)}
    gradient = jax.tree.map(jnp.cos, weights)
    before["optimizer"] = tx.update(gradient, before["optimizer"], weights)[1]
    named = dict(zip(migrate.names(before).values(), checkpoint.flat(before).values()))
    with checkpoint.Checkpoints(folder, 2) as checkpoints:
        checkpoints.save(before, checkpoint.describe(Config(), "", before), 2)
        checkpoints.wait()
    result = {}
    for edit, make in EDITS.items():
        tx, said = make(), []
        shapes = {**before, "optimizer": jax.eval_shape(tx.init, weights)}
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes
        )
        meta = checkpoint.describe(Config(), "", abstract)
        with checkpoint.Checkpoints(folder, 2) as checkpoints:
            found = checkpoints.restore(abstract, meta, said.append, tx.init)
        assert found is not None
        after, names = checkpoint.flat(found[0]), migrate.names(found[0])
        wrong = [
            path
            for path, x in after.items()
            if names[path] in named and not np.array_equal(x, named[names[path]])
        ]
        text = "\n".join(said)
        untold = [path for path in after if names[path] not in named and path not in text]
        untold += [
            path
            for path, name in migrate.names(before).items()
            if name not in names.values() and path not in text
        ]
        result[edit] = (
            f"not kept: {wrong}" if wrong else f"not told: {untold}" if untold else "kept by name"
        )
    say(f"edits of a chain: {sum(text == 'kept by name' for text in result.values())} of 9")
    return result


def broken_batches(run: pathlib.Path, count: int) -> dict[str, Any]:
    """Gives the weights of a run gradients and losses that are not numbers; counts what changes."""
    weights = params.read(run)[0]
    chain = optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax_decay.huber_decay(0.1),
        optax.scale_by_schedule(lambda step: -0.01 / (1 + step)),
    )  # fmt: skip
    tx = optax_decay.skip_on_spike(chain)

    @jax.jit
    def step(weights: Any, state: Any, gradient: Any, value: Any) -> Any:
        change, state = tx.update(gradient, state, weights, value=value)
        return optax.apply_updates(weights, change), state

    generator, names = np.random.default_rng(0), sorted(weights)
    weights, state = step(weights, tx.init(weights), weights, 1.0)  # moments that are not zero
    before = integrity.digests({"weights": weights, "state": state.inner_state})
    for number in range(count):
        gradient: dict[str, np.ndarray] = {
            name: np.ones(x.shape, x.dtype) for name, x in weights.items()
        }
        value, bad = 1.0, (np.nan, np.inf, -np.inf)[number % 3]
        if number % 4 == 3:
            value = bad
        else:
            name = names[generator.integers(len(names))]
            gradient[name].flat[generator.integers(gradient[name].size)] = bad
        weights, state = step(weights, state, gradient, value)
    after = integrity.digests({"weights": weights, "state": state.inner_state})
    return {
        "injected": count,
        "skipped": int(state.skipped),
        "arrays_changed": sum(after[path] != digest for path, digest in before.items()),
        "not_finite": int(sum((~np.isfinite(x)).sum() for x in weights.values())),
    }


def cost(folder: pathlib.Path) -> dict[str, float]:
    """MB/s of the digests of arrays and of the seal of files, on 128 MB."""
    x = {"x": jax.random.normal(jax.random.key(0), (32, 1024, 1024))}
    integrity.digests(x)
    since = time.perf_counter()
    integrity.digests(x)
    arrays = time.perf_counter() - since
    folder.mkdir()
    for number in range(4):
        np.asarray(x["x"][8 * number : 8 * number + 8]).tofile(folder / str(number))
    since = time.perf_counter()
    integrity.seal(folder)
    files = time.perf_counter() - since
    shutil.rmtree(folder)
    size = x["x"].nbytes / 1e6
    return {"arrays_MB_per_s": round(size / arrays), "files_MB_per_s": round(size / files)}
