"""Training on fake devices where every worker has its own gradient: what the tests of 1-bit Adam share.

Loops wait for every step: eight fake devices on few cores can wait for each other forever when steps pile up.
"""

import functools
from typing import Any

import jax
import numpy as np
import optax

from optax_decay.one_bit.state import one_bit_phase, state_partition_specs

SHAPES = {"bias": (6,), "kernel": (7, 13), "stack": (3, 4, 5)}
# Coordinates whose gradient is always exactly 0.
DEAD = {"bias": (5,), "kernel": (3, 4), "stack": (2, 0, 1)}


def mesh_of(*shape: int, names: tuple[str, ...] = ("data",)) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, names)  # axes of the Auto kind


def weights(dtype: Any = np.float64, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=s).astype(dtype) for k, s in SHAPES.items()}


def gradients(
    steps: int, workers: int, dtype: Any = np.float64, seed: int = 1
) -> dict[str, np.ndarray]:
    """[steps, workers, …]: a common part, another part per worker, scales that differ between leaves; dead spots."""
    rng = np.random.default_rng(seed)
    out = {}
    for scale, (name, shape) in zip((0.3, 2.0, 0.05), SHAPES.items()):
        common = rng.normal(size=(1, 1, *shape))
        own = rng.normal(size=(steps, workers, *shape))
        out[name] = (scale * (common + 0.7 * own)).astype(dtype)
        out[name][(slice(None), slice(None), *DEAD[name])] = 0
    return out


def per_worker(grads: dict[str, np.ndarray], step: int) -> list[dict[str, np.ndarray]]:
    """The gradients of one step as the reference takes them."""
    workers = next(iter(grads.values())).shape[1]
    return [{k: g[step, n] for k, g in grads.items()} for n in range(workers)]


def step_of(tx: Any, params: Any, state: Any, grads: Any, phase: Any = None) -> Any:
    """One update inside `shard_map`; `grads` have a leading axis of size 1."""
    grads = jax.tree.map(lambda g: g[0], grads)
    updates, state = tx.update(grads, state, params, phase=phase)
    return optax.apply_updates(params, updates), state


def compiled(
    tx: Any, state: Any, mesh: jax.sharding.Mesh, phase: Any = None, **options: Any
) -> Any:
    specs = state_partition_specs(state, "data")
    return jax.jit(
        jax.shard_map(
            functools.partial(step_of, tx, phase=phase),
            mesh=mesh,
            in_specs=(jax.P(), specs, jax.P("data")),
            out_specs=(jax.P(), specs),
            **options,
        )
    )


def train(
    tx: Any,
    params: Any,
    grads: dict[str, np.ndarray],
    *,
    state: Any = None,
    two_programs: bool = False,
    **options: Any,
) -> tuple[list[Any], Any]:
    """Params after every step (as NumPy arrays), and the last state."""
    steps, workers = next(iter(grads.values())).shape[:2]
    mesh = mesh_of(workers)
    with jax.set_mesh(mesh):
        state = tx.init(params) if state is None else state
    programs = {p: compiled(tx, state, mesh, p, **options) for p in (None, "warmup", "compressed")}
    trajectory = []
    for t in range(steps):
        step = programs[one_bit_phase(state) if two_programs else None]
        params, state = step(params, state, {k: g[t] for k, g in grads.items()})
        trajectory.append(jax.tree.map(np.asarray, params))
    return trajectory, state


def bits(tree: Any) -> list[bytes]:
    """Every leaf as raw bytes."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]
