"""Which matrices of a network are measured: their names, slices, kernel positions, blocks and weights.

A *matrix* is a slice of a leaf along its batch axes, named ``path`` or ``path[i]`` or ``path[i,j]``. Batch axes that
are positions of a convolution kernel (`POOLED`) do not count: those matrices share one spectrum, as in the released
AlphaDecay.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from optax_decay.parameters import paths
from optax_decay.parameters.axes import Signature

# Names of the kernel positions of a convolution, as in "KH KW | I -> O".
POOLED = ("KH", "KW", "KD")
_QUERY = re.compile(r"(?:^|[/_.])(?:q|query|q_proj|qkv|qkv_proj|c_attn|in_proj)(?:[/_.]|$)")
_NUMBER = re.compile(r"(?:.*?[/.])?(?:[^/.]*_|layers?|blocks?|h)?\d+(?=[/.])")

Select = str | Callable[[str, Signature], bool]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter with at least one measured matrix.

    Attributes:
        signature: of the parameter; its shape is that of a shard inside ``shard_map``.
        shape: the whole parameter's shape.
        spec: how the parameter is split, one entry per dimension.
        chosen: flat indices of the measured slices, in the order of the slice axes.
    """

    signature: Signature
    shape: tuple[int, ...]
    spec: tuple[Any, ...]
    chosen: tuple[int, ...]

    @property
    def path(self) -> str:
        return self.signature.path

    @property
    def pooled_axes(self) -> tuple[int, ...]:
        names = self.signature.names
        return tuple(i for i in self.signature.batch if names and names[i] in POOLED)

    @property
    def slice_axes(self) -> tuple[int, ...]:
        return tuple(i for i in self.signature.batch if i not in self.pooled_axes)

    @property
    def slice_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[i] for i in self.slice_axes)

    def _product(self, axes: Sequence[int]) -> int:
        return math.prod(self.shape[i] for i in axes)

    @property
    def pooled(self) -> int:
        return self._product(self.pooled_axes)

    @property
    def sides(self) -> tuple[int, int]:
        return self._product(self.signature.inputs), self._product(self.signature.outputs)

    @property
    def eigenvalues(self) -> int:
        return self.pooled * min(self.sides)

    @property
    def weights(self) -> int:
        """Weights of one matrix."""
        return self.pooled * math.prod(self.sides)

    def names(self) -> list[str]:
        """One name per slice, chosen or not."""
        if not self.slice_axes:
            return [self.path]
        return [f"{self.path}[{','.join(map(str, i))}]" for i in np.ndindex(self.slice_shape)]

    def spread(self, values: jax.Array) -> jax.Array:
        """Values per slice as an array that broadcasts to ``signature.batch_shape``."""
        sizes = [1 if i in self.pooled_axes else self.shape[i] for i in self.signature.batch]
        return values.reshape(sizes)


def block_of(path: str, index: tuple[int, ...]) -> tuple[Any, ...]:
    """The block a matrix belongs to.

    The path up to its first number (``layers/3``, ``layers_3``, ``model.layers.3``); without one, the path's first
    component with the slice's first index (``blocks``, 3).
    """
    numbered = _NUMBER.match(path)
    return (numbered.group(),) if numbered else (path.split("/")[0], *index[:1])


def specs_by_path(partition: Any) -> dict[str, tuple[Any, ...]]:
    """A tree of ``jax.P`` or shardings as a dictionary by path."""
    if partition is None:
        return {}
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec | jax.sharding.NamedSharding)
    leaves = jax.tree_util.tree_flatten_with_path(partition, is_leaf=is_spec)[0]
    found = {}
    for key, leaf in leaves:
        spec = leaf.spec if isinstance(leaf, jax.sharding.NamedSharding) else leaf
        if not isinstance(spec, jax.sharding.PartitionSpec):
            raise ValueError(
                f"partition holds {leaf!r} at {paths.path_string(key)!r}; expected jax.P or NamedSharding."
            )
        found[paths.path_string(key)] = tuple(spec)
    return found


def _excluded(name: str, path: str, patterns: Sequence[str]) -> str | None:
    for pattern in patterns:
        # A literal name first: as an expression, "[0]" would mean the character 0.
        if name == pattern or name.endswith(f"/{pattern}"):
            return pattern
        if "[" not in pattern and paths.matches(pattern, path):
            return pattern
    return None


def _first_query(leaves: Sequence[Leaf]) -> str | None:
    """The matrix that the released program leaves out: the query projection of the first block."""
    names = [
        (block_of(leaf.path, index), leaf.path, name)
        for leaf in leaves
        for index, name in zip(np.ndindex(leaf.slice_shape), leaf.names())
    ]
    if not names:
        return None

    def numbers(block: tuple[Any, ...]) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", "/".join(map(str, block)))]

    first = min(names, key=lambda item: numbers(item[0]))[0]
    inside = [item for item in names if item[0] == first]
    queries = [item for item in inside if _QUERY.search(item[1])]
    return (queries or inside)[0][2]


def choose(
    signatures: Mapping[str, Signature],
    shapes: Mapping[str, tuple[int, ...]],
    specs: Mapping[str, tuple[Any, ...]],
    select: Select,
    exclude: Sequence[str],
    min_eigenvalues: int,
) -> list[Leaf]:
    """The measured matrices, by leaf.

    Args:
        signatures: of the parameters that decay, by path.
        shapes: whole shapes by path.
        specs: how each parameter is split; missing means not.
        select: ``"hidden"``: matrices of role hidden; ``"reference"``: the same without the first, as the released
            program does it; or a function ``(name, signature) -> bool`` over all matrices.
        exclude: names (``"blocks/attention/query/kernel[0]"``) or path patterns to leave out.
        min_eigenvalues: smaller matrices are left out.

    Raises:
        ValueError: an entry of `exclude` matches no matrix.
    """
    leaves = []
    for path, signature in signatures.items():
        if signature.is_matrix:
            rank = len(signature.shape)
            spec = tuple(specs.get(path, ()))
            spec += (None,) * (rank - len(spec))
            leaf = Leaf(signature, tuple(shapes[path]), spec, ())
            count = math.prod(leaf.slice_shape)
            leaves.append(dataclasses.replace(leaf, chosen=tuple(range(count))))
    if isinstance(select, str):
        leaves = [leaf for leaf in leaves if leaf.signature.role == "hidden"]
    dropped = {_first_query(leaves)} if select == "reference" else set()
    used: set[str | None] = set()
    result = []
    for leaf in leaves:
        kept = []
        for flat, name in enumerate(leaf.names()):
            hit = _excluded(name, leaf.path, exclude)
            used.add(hit)
            wanted = isinstance(select, str) or bool(select(name, leaf.signature))
            big = leaf.eigenvalues >= min_eigenvalues
            if hit is None and name not in dropped and wanted and big:
                kept.append(flat)
        if kept:
            result.append(dataclasses.replace(leaf, chosen=tuple(kept)))
    names = [name for leaf in leaves for name in (leaf.path, *leaf.names())]
    for pattern in exclude:
        if names and pattern not in used:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"exclude={pattern!r} matches no matrix; the nearest name is {near!r}."
            )
    return result
