"""Reliability tests inside this process: damaged checkpoints, edited optimizer chains, and NaN in batches."""

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
from train.run import integrity, migration
from train.run.checkpoints import Checkpoints, describe, flat
from train.torture import damage
from train.torture.runs import saved
from train.weights.params import read_params


def _rate(count: Any) -> Any:
    return 0.01 / (1 + count)


# Changes that a run may make to `optax.adamw(0.01)`, after which the state must be found by name.
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


def damage_checkpoints(
    run: pathlib.Path, count: int, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Damages the newest checkpoint of a finished run, each time in a fresh copy, and restores.

    The restored state must equal, bit for bit, the previous checkpoint, or the newest one if only its seal was deleted.
    """
    generator, newest = random.Random(seed), saved(run)[-1]
    here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        meta = checkpoints.meta(newest)
        wanted = {step: checkpoints.meta(step)["digests"] for step in saved(run)}
    abstract = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
        for path, x in (
            (path, migration.parse_shape(text)) for path, text in meta["structure"].items()
        )
    }
    counts = dict.fromkeys(("flip", "cut", "delete"), 0)
    result = {"detected": 0, "seal_gone_and_equal": 0, "silent": 0, "kinds": counts}
    for number in range(count):
        kind = generator.choice(list(counts))
        copy = run.parent / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        for step in saved(run)[-2:]:
            shutil.copytree(run / f"checkpoints/{step}", copy / f"checkpoints/{step}")
        done = damage.one(copy / f"checkpoints/{newest}", generator, kind)
        counts[kind] += 1
        messages: list[str] = []
        with Checkpoints(copy / "checkpoints", 4) as checkpoints:
            restored = checkpoints.restore(abstract, meta, messages.append)
        state, step = restored if restored is not None else ({}, -1)
        equal = step in wanted and integrity.digests(state) == wanted[step]
        if equal and step != newest and "cannot be read" in messages[0]:
            result["detected"] += 1
        elif equal and done == f"delete {integrity.SEAL}" and integrity.SEAL in messages[0]:
            result["seal_gone_and_equal"] += 1
        else:
            result["silent"] += 1
            say(f"not detected: {done}")
        if (number + 1) % 20 == 0 or number + 1 == count:
            say(f"damage {number + 1} of {count}, {result['silent']} not detected")
    return result


def edit_chains(folder: pathlib.Path, say: Callable[[str], None]) -> dict[str, str]:
    """Migrates the state of AdamW under each edit; the result by edit, "kept by name" or a description of the error."""
    tx, here = optax.adamw(0.01), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    weights = {"w": jnp.arange(12.0).reshape(3, 4), "b": jnp.arange(5.0) - 2}
    before = {"params": weights, "optimizer": tx.init(weights), "step": jnp.asarray(2, jnp.int32)}
    gradient = jax.tree.map(jnp.cos, weights)
    before["optimizer"] = tx.update(gradient, before["optimizer"], weights)[1]
    named = dict(zip(migration.leaf_names(before).values(), flat(before).values()))
    with Checkpoints(folder, 2) as checkpoints:
        checkpoints.save(before, describe(Config(), "", before), 2)
        checkpoints.wait()
    result = {}
    for edit, make in EDITS.items():
        tx, messages = make(), []
        shapes = {**before, "optimizer": jax.eval_shape(tx.init, weights)}
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes
        )
        meta = describe(Config(), "", abstract)
        with Checkpoints(folder, 2) as checkpoints:
            restored = checkpoints.restore(abstract, meta, messages.append, tx.init)
        assert restored is not None
        after, names = flat(restored[0]), migration.leaf_names(restored[0])
        wrong = [
            path
            for path, x in after.items()
            if names[path] in named and not np.array_equal(x, named[names[path]])
        ]
        text = "\n".join(messages)
        unreported = [path for path in after if names[path] not in named and path not in text]
        unreported += [
            path
            for path, name in migration.leaf_names(before).items()
            if name not in names.values() and path not in text
        ]
        result[edit] = (
            f"not kept: {wrong}"
            if wrong
            else f"not reported: {unreported}"
            if unreported
            else "kept by name"
        )
    say(f"edits of a chain: {sum(text == 'kept by name' for text in result.values())} of 9")
    return result


def broken_batches(run: pathlib.Path, count: int) -> dict[str, Any]:
    """Updates the weights of a run with NaN and infinite gradients and losses; counts the changes."""
    weights = read_params(run)[0]
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


def digest_speed(folder: pathlib.Path) -> dict[str, float]:
    """Speed of the digests of arrays and of the seal of files, on 128 MB [MB/s]."""
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
