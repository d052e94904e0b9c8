"""What labels on arrays say of their axes: Linen's ``Partitioned``, the metadata of NNX variables, haliax's axes.

Only labels for the meaning of an axis count, such as ("embed", "mlp"); names of mesh axes, such as ("data", "model"),
say where an array lies and nothing of what it is.
"""

import re
from typing import Any

import jax

from optax_decay.parameters.named_axes import KnownAxes
from optax_decay.parameters.paths import path_string

_STACK = re.compile(
    r"(?:\w+_)?(?:layers?|stacks?|stages?|blocks?|experts?)|exp|circular_repeats", re.I
)
_WIDTH = re.compile(
    r"embed|embedding|embed_dim|d_?model|model_dim|hidden_size|features|width", re.I
)
_TOKENS = re.compile(r"vocab\w*|(?:num_|n_)?(?:classes|labels)", re.I)
_PLACES = re.compile(r"(?:num_|n_)?positions?|pos", re.I)


def is_tokens(label: str) -> bool:
    """Whether a label is one of a vocabulary or of classes."""
    return _TOKENS.fullmatch(label) is not None


def is_fixed(label: str) -> bool:
    """Whether an axis of this label keeps its size when the model gets wider."""
    return (
        label.rstrip("0123456789") == "V"
        or is_tokens(label)
        or _PLACES.fullmatch(label) is not None
    )


def _is_named_array(x: Any) -> bool:
    return type(x).__name__ == "NamedArray" and hasattr(x, "axes")


def _is_labelled(x: Any) -> bool:
    return hasattr(x, "unbox") or hasattr(x, "get_metadata") or _is_named_array(x)


def labels_of(tree: Any) -> dict[str, tuple[str | None, ...]]:
    """The labels of the arrays in a tree that have them, by path."""
    found = {}
    for key, box in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_labelled)[0]:
        if not _is_labelled(box):
            continue
        inside = jax.tree_util.tree_flatten_with_path(box)[0]
        if len(inside) == 1 and (labels := _labels(box)):
            found[path_string((*key, *inside[0][0]))] = labels
    return found


def _labels(box: Any) -> tuple[str | None, ...]:
    if _is_named_array(box):
        return tuple(axis.name for axis in box.axes)
    labels = getattr(box, "names", None)
    if labels is None and hasattr(box, "get_metadata"):
        metadata = box.get_metadata()
        names = ("sharding_names", "out_sharding", "sharding")
        labels = next((metadata[n] for n in names if metadata.get(n) is not None), None)
    if not isinstance(labels, tuple | list | jax.sharding.PartitionSpec):
        return ()
    return tuple(label if isinstance(label, str) else None for label in labels)


def by_labels(
    path: str, shape: tuple[int, ...], labels: tuple[str | None, ...]
) -> KnownAxes | None:
    """What the labels of an array say of its axes; None if they do not say enough.

    JAX stores inputs before outputs, so that ("embed", "mlp") takes in the features of the residual stream, and
    ("heads", "kv", "embed") puts them out.
    """
    if len(labels) != len(shape) or None in labels:
        return None
    texts = [str(label) for label in labels]
    batch = tuple(i for i, text in enumerate(texts) if _STACK.fullmatch(text))
    own = tuple(i for i in range(len(shape)) if i not in batch)
    basis = f"the labels {labels!r}"
    if len(own) == 1 and (_WIDTH.fullmatch(texts[own[0]]) or texts[own[0]] in ("norm", "mlp")):
        return KnownAxes("vector", shape, batch, outputs=own, basis=basis)
    if len(own) < 2:
        return None
    first, last = texts[own[0]], texts[own[-1]]
    if is_tokens(first) or _PLACES.fullmatch(first):
        kind = "embedding" if is_tokens(first) else "positions"
        return KnownAxes(kind, shape, batch, (), own[:1], own[1:], basis)
    if bool(_WIDTH.fullmatch(first)) == bool(_WIDTH.fullmatch(last)):
        return None
    split = 1 if _WIDTH.fullmatch(first) else len(own) - 1
    return KnownAxes("linear", shape, batch, (), own[:split], own[split:], basis)
