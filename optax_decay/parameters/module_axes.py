"""What modules say of their parameters' axes: Flax NNX and Equinox, by the attributes of their layers."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from optax_decay.parameters.named_axes import KnownAxes, is_of_positions, named
from optax_decay.parameters.paths import path_string


def is_module(package: str, model: Any) -> bool:
    """Whether the model's class is, or inherits from, a module class of a package."""
    return any(
        c.__module__.startswith(package) and c.__name__ == "Module" for c in type(model).__mro__
    )


def leaf_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the leaves by path; boxes of metadata (such as Linen's ``Partitioned``) count as their value."""
    boxed = lambda x: hasattr(x, "unbox")
    tree = jax.tree.map(lambda x: x.unbox() if boxed(x) else x, tree, is_leaf=boxed)
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_string(key): tuple(leaf.shape) for key, leaf in leaves}


def _features(value: Any) -> tuple[int, ...]:
    return (
        tuple(value)
        if isinstance(value, tuple | list)
        else (1 if value == "scalar" else int(value),)
    )


def placed(
    kind: str,
    path: str,
    shape: tuple[int, ...],
    parts: Mapping[str, tuple[int, ...]],
    basis: str,
) -> KnownAxes:
    """The axes of an array whose unstacked form has `parts` in this order, by name of the group; others are stacked.

    Raises:
        ValueError: no way to leave out the stacked axes gives the sizes of the parts.
    """
    flat = tuple(size for sizes in parts.values() for size in sizes)
    extra = len(shape) - len(flat)
    for first in range(len(flat) + 1):
        rest = shape[:first] + shape[first + extra :]
        if extra >= 0 and rest == flat:
            break
    else:
        raise ValueError(f"{path!r} has the shape {shape}, but {basis} describes {flat}.")
    order = [*range(first), *range(first + extra, len(shape))]
    groups, at = {}, 0
    for name, sizes in parts.items():
        groups[name] = tuple(order[at : at + len(sizes)])
        at += len(sizes)
    return KnownAxes(kind, shape, tuple(range(first, first + extra)), basis=basis, **groups)


def of_nnx(model: Any) -> dict[str, KnownAxes]:
    """The parameters of an NNX module, by the modules that own them."""
    nnx = sys.modules["flax.nnx"]
    shapes = leaf_shapes(nnx.state(model, nnx.Param))
    found: dict[str, KnownAxes] = {}
    for path, module in nnx.iter_graph(model):
        classes = [c.__name__ for c in type(module).__mro__ if c.__module__.startswith("flax.nnx")]
        prefix = "".join(f"{part}/" for part in path)
        own = {
            p: s for p, s in shapes.items() if p.startswith(prefix) and "/" not in p[len(prefix) :]
        }
        for full, shape in own.items():
            described = _layer_of_nnx(classes, module, full, full[len(prefix) :], shape)
            if described is not None:
                found[full] = described
    return named(shapes, found)


def _layer_of_nnx(
    classes: list[str], module: Any, path: str, name: str, shape: tuple[int, ...]
) -> KnownAxes | None:
    basis = f"flax.nnx.{classes[0]}" if classes else ""
    if name == "kernel" and {"Linear", "LinearGeneral", "Conv"} & set(classes):
        ins, outs = _features(module.in_features), _features(module.out_features)
        if "Conv" in classes:
            window = _features(module.kernel_size)
            groups = int(getattr(module, "feature_group_count", 1))
            parts = {"kernel": window, "inputs": (ins[0] // groups,), "outputs": outs}
            return placed("conv", path, shape, parts, basis)
        return placed("linear", path, shape, {"inputs": ins, "outputs": outs}, basis)
    if name == "embedding" and "Embed" in classes:
        parts: dict[str, tuple[int, ...]] = {
            "inputs": (module.num_embeddings,),
            "outputs": (module.features,),
        }
        kind = "positions" if is_of_positions(path) else "embedding"
        return placed(kind, path, shape, parts, basis)
    if name in ("lora_a", "lora_b") and "LoRA" in classes:
        extra = len(shape) - 2
        return KnownAxes("linear", shape, tuple(range(extra)), (), (extra,), (extra + 1,), basis)
    if name not in ("scale", "bias"):
        return None
    sizes = getattr(module, "out_features", getattr(module, "num_features", None))
    return (
        None
        if sizes is None
        else placed("vector", path, shape, {"outputs": _features(sizes)}, basis)
    )


def of_equinox(model: Any) -> dict[str, KnownAxes]:
    """The parameters of an Equinox module, by the modules that own them."""
    arrays = jax.tree.map(
        lambda x: x if hasattr(x, "shape") and hasattr(x, "dtype") else None, model
    )
    shapes = leaf_shapes(arrays)
    found: dict[str, KnownAxes] = {}
    for prefix, module in _walk(model, ""):
        classes = [
            c.__name__ for c in type(module).__mro__ if c.__module__.startswith("equinox.nn")
        ]
        for name in ("weight", "bias"):
            path = prefix + name
            if path in shapes and classes:
                described = _layer_of_equinox(classes, module, path, name, shapes[path])
                if described is not None:
                    found[path] = described
    return named(shapes, found)


def _walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every Equinox module under `node` with its path, as the optimizer's tree names it."""
    if is_module("equinox", node):
        yield prefix, node
        children: Iterable[tuple[Any, Any]] = vars(node).items()
    elif isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list | tuple):
        children = enumerate(node)
    else:
        return
    for name, child in children:
        yield from _walk(child, f"{prefix}{name}/")


def _layer_of_equinox(
    classes: list[str], module: Any, path: str, name: str, shape: tuple[int, ...]
) -> KnownAxes | None:
    basis = f"equinox.nn.{classes[0]}"
    if name == "bias" or {"LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"} & set(classes):
        for size in ("out_features", "out_channels", "shape", "channels", "input_size"):
            if getattr(module, size, None) is not None:
                ones = (1,) * getattr(module, "num_spatial_dims", 0)
                own = _features(getattr(module, size)) + ones
                return placed("vector", path, shape, {"outputs": own}, basis)
        return None
    if "Linear" in classes:
        parts = {"outputs": _features(module.out_features), "inputs": _features(module.in_features)}
        return placed("linear", path, shape, parts, basis)
    if "Conv" in classes:
        parts: dict[str, tuple[int, ...]] = {
            "outputs": (module.out_channels,),
            "inputs": (module.in_channels // module.groups,),
            "kernel": _features(module.kernel_size),
        }
        return placed("conv", path, shape, parts, basis)
    if "Embedding" in classes:
        parts: dict[str, tuple[int, ...]] = {
            "inputs": (module.num_embeddings,),
            "outputs": (module.embedding_size,),
        }
        kind = "positions" if is_of_positions(path) else "embedding"
        return placed(kind, path, shape, parts, basis)
    return None
