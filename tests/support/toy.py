"""A small parameter tree with every kind of leaf, its axes, and gradients: what the contract is tried on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

AXES = (
    (r"embed/embedding", "V -> D"),
    (r"blocks/attention/kernel", "L | D -> H E"),
    (r"blocks/up/kernel", "L | D -> F"),
    (r"blocks/down/kernel", "L | F -> D"),
    (r"blocks/norm/scale", "L | D"),
    (r"mix/kernel", "D -> G"),
    (r"bias", "D"),
    (r"head/kernel", "D -> V"),
)

SHAPES = {
    "embed/embedding": (10, 8),
    "blocks/attention/kernel": (2, 8, 4, 4),
    "blocks/up/kernel": (2, 8, 12),
    "blocks/down/kernel": (2, 12, 8),
    "blocks/norm/scale": (2, 8),
    "mix/kernel": (8, 24),
    "bias": (8,),
    "head/kernel": (8, 10),
}
HIDDEN = frozenset(p for p in SHAPES if p.split("/")[0] in ("blocks", "mix") and "norm" not in p)
MATRICES = HIDDEN | {"head/kernel"}
STACKED = frozenset(p for p in SHAPES if p.startswith("blocks"))

# Every matrix split over two mesh axes, as in FSDP with tensor parallelism.
MESH_AXES = {"D": "fsdp", "F": "tensor", "H": "tensor", "G": "tensor", "V": "tensor"}


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def shapes(dtype: Any = jnp.float32) -> Any:
    """The tree without its numbers."""
    return nest({path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in SHAPES.items()})


def unnest(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(key, simple=True, separator="/"): np.asarray(leaf)
        for key, leaf in leaves
    }


def flat_params(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights in float64; scales differ between leaves and between the slices of a stack."""
    rng = np.random.default_rng(seed)
    flat = {}
    for i, (path, shape) in enumerate(SHAPES.items()):
        w = rng.standard_normal(shape) * (0.1 + 0.05 * i)
        if path in STACKED:
            w *= np.array([1.0, 2.5]).reshape((2,) + (1,) * (len(shape) - 1))
        flat[path] = w
    return flat


def flat_gradients(steps: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {path: rng.standard_normal(shape) * 0.3 + 0.02 for path, shape in SHAPES.items()}
        for _ in range(steps)
    ]


def params(dtype: Any = jnp.float32, seed: int = 0) -> Any:
    return nest({path: jnp.asarray(w, dtype) for path, w in flat_params(seed).items()})


def gradients(steps: int, dtype: Any = jnp.float32, seed: int = 1) -> list[Any]:
    return [
        nest({p: jnp.asarray(g, dtype) for p, g in flat.items()})
        for flat in flat_gradients(steps, seed)
    ]


def train(
    tx: optax.GradientTransformation, weights: Any, grads: list[Any], extra: Any = None
) -> Any:
    """Weights after one jitted update per entry of `grads`; ``extra(params, g)`` gives extra arguments."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(weights: Any, state: Any, g: Any) -> Any:
        updates, state = tx.update(g, state, weights, **(extra(weights, g) if extra else {}))
        return optax.apply_updates(weights, updates), state

    state = tx.init(weights)
    for g in grads:
        weights, state = step(weights, state, g)
    return weights, state
