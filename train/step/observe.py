"""What the weights look like and what the decay does to them, per role of parameter.

    weights        number of weights
    rms            root of the mean square of the weights
    median, p99    quantiles of |w|, from an even sample
    largest        of |w|
    decaying       share of the weights that decay
    beyond         share of the decaying weights with |w| beyond the threshold
    decay_rms      RMS of the decay term, weight_decay * multiplier * pull(w), over decaying weights
    update_rms     RMS of the update that the decay was added to, over decaying weights

The last three are of the step that comes next, tried without taking it. Both RMS stand before the
learning rate (after it for the decays that stand last in the chain), so that their ratio says how
much of a step is decay. Looking moves no weight: the step itself keeps no such numbers, which would
cost it passes over memory.
"""

import collections
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_decay import DecayState, Metrics, Signature, sublayer_gains, top_singular_values
from optax_decay.matrices.top_singular_values import top_singular_vectors
from optax_decay.parameters.paths import leaf_paths
from optax_decay.product import diagnostics
from train.step import replicas
from train.step.update import State

SAMPLE = 65_536  # weights per role for the quantiles

# Products of largest singular values along these bound what a sublayer does to its input.
SUBLAYERS = {
    "attention": ("attention/value/kernel", "attention/out/kernel"),
    "mlp": ("mlp/up/kernel", "mlp/down/kernel"),
}


def weights(signatures: dict[str, Signature], params: Any) -> dict[str, dict[str, jax.Array]]:
    """Sizes of weights, by role. Pure; to be jitted."""
    groups = collections.defaultdict(list)
    for path, w in zip(leaf_paths(params), jax.tree.leaves(params), strict=True):
        groups[signatures[path].role].append(jnp.abs(w).reshape(-1))
    found = {}
    for role, parts in groups.items():
        total = sum(part.size for part in parts)
        every = math.ceil(total / SAMPLE)
        sample = jnp.concatenate([part[::every] for part in parts])
        median, p99 = jnp.quantile(sample, jnp.array([0.5, 0.99]))
        squares = jnp.stack([jnp.sum(jnp.square(part)) for part in parts])
        found[role] = {
            "rms": jnp.sqrt(jnp.sum(squares) / total),
            "median": median,
            "p99": p99,
            "largest": jnp.max(jnp.stack([jnp.max(part) for part in parts])),
        }
    return found


def try_decay(
    gradient: Callable[[Any, jax.Array], Any],
    observed: optax.GradientTransformationExtraArgs,
    state: State,
    tokens: jax.Array,
) -> dict[str, Metrics]:
    """What the decay would do in a step on `tokens`, by path. Pure; to be jitted.

    Args:
        gradient: (params, tokens) to a tree like params.
        observed: the chain of the state's optimizer, built with metrics.
        state: of the training step.
        tokens: a batch.
    """
    params, kept = state["params"], state["optimizer"].inner_state
    if not isinstance(kept["decay"], DecayState):
        return {}  # a rule of its own, such as CPR's, which tells nothing of its terms
    empty = jax.eval_shape(observed.init, params)["decay"].metrics
    room = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)
    before = {**kept, "decay": kept["decay"]._replace(metrics=room)}
    found = gradient(params, tokens)
    mean = None if replicas.inside() else found
    after: Any = observed.update(found, before, params, gradients=mean, hessian=None)[1]
    return after["decay"].metrics


def decay(
    signatures: dict[str, Signature], metrics: dict[str, Metrics]
) -> dict[str, dict[str, float]]:
    """What a decay does, by role, from its metrics by path."""
    sums: Any = collections.defaultdict(lambda: collections.defaultdict(float))
    for path, signature in signatures.items():
        total, size = sums[signature.role], math.prod(signature.shape)
        total["weights"] += size
        if path in metrics:
            seen = metrics[path]
            total["decaying"] += size
            total["beyond"] += size * float(np.mean(seen.beyond))
            total["decay"] += size * float(np.mean(np.square(seen.decay_rms)))
            total["update"] += size * float(np.mean(np.square(seen.update_rms)))
    return {
        role: {
            "weights": int(total["weights"]),
            "decaying": total["decaying"] / total["weights"],
            "beyond": total["beyond"] / max(1.0, total["decaying"]),
            "decay_rms": math.sqrt(total["decay"] / max(1.0, total["decaying"])),
            "update_rms": math.sqrt(total["update"] / max(1.0, total["decaying"])),
        }
        for role, total in sums.items()
    }


def spectrum(state: Any) -> dict[str, dict[str, float]]:
    """Per hidden matrix, what a spectral multiplier measured last and what it made of it; empty without one."""
    found: dict[str, dict[str, float]] = {}
    for name, value in diagnostics.metrics(state).items():
        kind, _, matrix = name.partition("/")
        if kind in ("metric", "multiplier"):
            found.setdefault(kind, {})[matrix.replace("blocks/", "").replace("/kernel", "")] = value
    return found


def gain_meter(axes: Any, shapes: Any, mesh: jax.sharding.Mesh) -> Callable[[Any], dict[str, Any]]:
    """A function from weights to what `gains` makes of them; it carries its vectors from call to call."""
    measure = jax.jit(
        functools.partial(
            top_singular_values, iterations=8, roles=("hidden",), axes=axes, mesh=mesh
        ),
        out_shardings=(jax.NamedSharding(mesh, jax.P()), None),
    )
    vectors = top_singular_vectors(shapes, roles=("hidden",), axes=axes)

    def look(params: Any) -> dict[str, Any]:
        nonlocal vectors
        values, vectors = measure(params, vectors)
        return gains(jax.device_get(values))

    return look


def gains(values: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Largest singular value of every hidden matrix, and gains of the sublayers of every layer."""
    found = {"matrix": values, "sublayer": sublayer_gains(values, SUBLAYERS)}
    return {
        kind: {
            f"{path.replace('blocks/', '').replace('/kernel', '')}/{layer}": float(value)
            for path, stack in part.items()
            for layer, value in enumerate(np.ravel(stack))
        }
        for kind, part in found.items()
    }


def merge(*parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """One record per role, as numbers, from several looks."""
    roles = dict.fromkeys(role for part in parts for role in part)
    return {r: {k: float(v) for p in parts for k, v in p.get(r, {}).items()} for r in roles}
