"""What modules say of their parameters' axes: Flax NNX, Equinox and haliax, by the attributes of their layers."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from optax_decay.parameters.labelled_axes import is_tokens, labels_of
from optax_decay.parameters.named_axes import KnownAxes
from optax_decay.parameters.paths import path_string
from optax_decay.parameters.words import is_of_positions


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


_WITH_FEATURES = {"Linear", "LinearGeneral", "Conv", "ConvTranspose"}


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
    """The parameters of an NNX module whose owners are layers of Flax, by path."""
    nnx = sys.modules["flax.nnx"]
    shapes = leaf_shapes(nnx_parameters(model))
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
    return found


def nnx_parameters(model: Any) -> Any:
    """The tree of parameters of an NNX module, as optimizers see it."""
    nnx = sys.modules["flax.nnx"]
    return nnx.state(model, nnx.Param)


def _layer_of_nnx(
    classes: list[str], module: Any, path: str, name: str, shape: tuple[int, ...]
) -> KnownAxes | None:
    basis = f"flax.nnx.{classes[0]}" if classes else ""
    if name == "kernel" and _WITH_FEATURES & set(classes):
        ins, outs = _features(module.in_features), _features(module.out_features)
        if "Conv" in classes or "ConvTranspose" in classes:
            window = _features(module.kernel_size)
            groups = int(getattr(module, "feature_group_count", 1) or 1)
            parts = {"kernel": window, "inputs": (ins[0] // groups,), "outputs": outs}
            if getattr(module, "transpose_kernel", False):
                parts = {"kernel": window, "outputs": outs, "inputs": ins}
            grouped = groups > 1
            return dataclasses.replace(placed("conv", path, shape, parts, basis), grouped=grouped)
        return placed("linear", path, shape, {"inputs": ins, "outputs": outs}, basis)
    if name == "kernel" and "Einsum" in classes:
        return _einsum(path, shape, module.einsum_str, basis)
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


def _einsum(path: str, shape: tuple[int, ...], text: str, basis: str) -> KnownAxes | None:
    """The axes of the second operand of an einsum: summed, kept, or kept and shared with the first operand."""
    operands, arrow, result = text.replace(" ", "").replace("...", "").partition("->")
    first, comma, kernel = operands.partition(",")
    if not (arrow and comma) or len(kernel) != len(shape):
        return None
    inputs = tuple(i for i, x in enumerate(kernel) if x in first and x not in result)
    batch = tuple(i for i, x in enumerate(kernel) if x in first and x in result)
    outputs = tuple(i for i, x in enumerate(kernel) if x not in first and x in result)
    if not inputs or not outputs:
        return None
    return KnownAxes("linear", shape, batch, (), inputs, outputs, f"{basis}({text!r})")


def equinox_parameters(model: Any) -> Any:
    """The tree of arrays of an Equinox module, as optimizers see it."""
    return jax.tree.map(lambda x: x if hasattr(x, "shape") and hasattr(x, "dtype") else None, model)


def of_equinox(model: Any) -> dict[str, KnownAxes]:
    """The parameters of a tree whose owners are layers of Equinox or haliax, by path."""
    arrays = equinox_parameters(model)
    shapes, labels = leaf_shapes(arrays), labels_of(model)
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
            if path + "/0" in labels and path + "/0" in shapes:
                described = _layer_of_haliax(module, path, shapes[path + "/0"], labels[path + "/0"])
                if described is not None:
                    found[path + "/0"] = described
    return found


def _layer_of_haliax(
    module: Any, path: str, shape: tuple[int, ...], labels: tuple[str | None, ...]
) -> KnownAxes | None:
    basis = f"haliax's {type(module).__name__}"
    name = path.rsplit("/", 1)[-1]

    def places(axes: Any) -> tuple[int, ...]:
        axes = axes if isinstance(axes, tuple | list) else (axes,)
        return tuple(labels.index(axis.name) for axis in axes if axis.name in labels)

    if hasattr(module, "In") and hasattr(module, "Out"):
        inputs, outputs = places(module.In), places(module.Out)
    elif hasattr(module, "Vocab") and hasattr(module, "Embed"):
        inputs, outputs = places(module.Vocab), places(module.Embed)
    elif hasattr(module, "axis"):
        inputs, outputs = (), places(module.axis)
    else:
        return None
    kernel: tuple[int, ...] = ()
    if hasattr(module, "kernel_size") and name == "weight":
        channels = (
            *inputs,
            *outputs,
        )  # what is left is the window, which haliax convolutions do not stack
        kernel = tuple(i for i in range(len(shape)) if i not in channels)
    batch = tuple(i for i in range(len(shape)) if i not in (*inputs, *outputs, *kernel))
    if name == "bias" or not inputs:
        return KnownAxes("vector", shape, batch, outputs=outputs, basis=basis)
    kind = "conv" if kernel else "linear"
    if hasattr(module, "Vocab"):
        tokens = is_tokens(str(labels[inputs[0]])) and not is_of_positions(path)
        kind = "embedding" if tokens else "positions"
    return KnownAxes(kind, shape, batch, kernel, inputs, outputs, basis)


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
        if {"GRUCell", "LSTMCell"} & set(classes):
            return None
        for size in ("out_features", "out_channels", "shape", "channels", "input_size"):
            if getattr(module, size, None) is not None:
                ones = (1,) * getattr(module, "num_spatial_dims", 0)
                own = _features(getattr(module, size)) + ones
                return placed("vector", path, shape, {"outputs": own}, basis)
        return None
    if "Linear" in classes:
        parts = {"outputs": _features(module.out_features), "inputs": _features(module.in_features)}
        return placed("linear", path, shape, parts, basis)
    if {"Conv", "ConvTranspose"} & set(classes):
        parts: dict[str, tuple[int, ...]] = {
            "outputs": (module.out_channels,),
            "inputs": (module.in_channels // module.groups,),
            "kernel": _features(module.kernel_size),
        }
        grouped = module.groups > 1
        return dataclasses.replace(placed("conv", path, shape, parts, basis), grouped=grouped)
    if "Embedding" in classes:
        parts: dict[str, tuple[int, ...]] = {
            "inputs": (module.num_embeddings,),
            "outputs": (module.embedding_size,),
        }
        kind = "positions" if is_of_positions(path) else "embedding"
        return placed(kind, path, shape, parts, basis)
    return None
