"""Which matrices of a network are measured: their names, slices, kernel positions, blocks and weights.

A *matrix* is a slice of a parameter along its batch axes. Its name is ``path``, ``path[i]`` or ``path[i,j]``. Batch
axes that are positions of a convolution kernel (`POOLED`) do not count as slices: the matrices at all positions share
one spectrum, as in the released AlphaDecay.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_decay.parameters import paths
from optax_decay.parameters.arguments import check, nearest
from optax_decay.parameters.axes import Signature

# Names of the kernel positions of a convolution, as in "KH KW | I -> O".
POOLED = ("KH", "KW", "KD")
NAMES = ("hidden_matrices", "reference_matrices", "matrices")
_QUERY = re.compile(r"(?:^|[/_.])(?:q|query|q_proj|qkv|qkv_proj|c_attn|in_proj)(?:[/_.]|$)")
_NUMBER = re.compile(r"(?:.*?[/.])?(?:[^/.]*_|layers?|blocks?|h)?\d+(?=[/.])")

Wanted = Callable[[str, Signature], bool]


class Selection(NamedTuple):
    """Which matrices are measured. Build one with `hidden_matrices`, `reference_matrices` or `matrices`.

    Attributes:
        name: one of `NAMES`.
        wanted: ``(name, signature) -> bool`` for ``"matrices"``, else None.
        exclude: names or path patterns of matrices that are not measured.
        min_eigenvalues: matrices with fewer eigenvalues are not measured; None for the default of the score.
    """

    name: str
    wanted: Wanted | None
    exclude: tuple[str, ...]
    min_eigenvalues: int | None


def _selection(
    name: str, wanted: Wanted | None, exclude: Sequence[str], min_eigenvalues: int | None
) -> Selection:
    if min_eigenvalues is not None:
        check("min_eigenvalues", min_eigenvalues, 1)
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    return Selection(name, wanted, exclude, min_eigenvalues)


def hidden_matrices(
    *, exclude: Sequence[str] = (), min_eigenvalues: int | None = None
) -> Selection:
    """Measures every matrix of role hidden. Without `axes`, names of parameters decide (`axes.signatures`).

    Args:
        exclude: names (``"blocks/attention/query/kernel[0]"``) or path patterns of matrices to leave out.
        min_eigenvalues: matrices with fewer eigenvalues are left out. Default: 50 as in the released program, and 1
            for `gradient_norm`, which needs no eigenvalues.

    Raises:
        ValueError: a number below 1; at ``init``, an entry of `exclude` that matches no matrix.
    """
    return _selection("hidden_matrices", None, exclude, min_eigenvalues)


def reference_matrices(
    *, exclude: Sequence[str] = (), min_eigenvalues: int | None = None
) -> Selection:
    """Measures what the released program measures: hidden matrices without the first query projection.

    Arguments and errors as in `hidden_matrices`.
    """
    return _selection("reference_matrices", None, exclude, min_eigenvalues)


def matrices(
    wanted: Wanted, *, exclude: Sequence[str] = (), min_eigenvalues: int | None = None
) -> Selection:
    """Measures the matrices of any role that a function picks.

    Args:
        wanted: ``(name, signature) -> bool``, called with the name and the `axes.Signature` of every matrix.
        exclude, min_eigenvalues: as in `hidden_matrices`.

    Raises:
        ValueError: as in `hidden_matrices`, or something that cannot be called.
    """
    if not callable(wanted):
        raise ValueError(
            f"wanted={wanted!r} is not a function (name, signature) -> bool; for all hidden matrices use "
            "spectra.hidden_matrices()."
        )
    return _selection("matrices", wanted, exclude, min_eigenvalues)


def check_selection(select: object) -> None:
    """Raises ValueError unless `select` is a `Selection`; names the nearest one."""
    if not isinstance(select, Selection):
        name = getattr(select, "__name__", select)
        raise ValueError(
            f"select={select!r} is not a Selection; allowed: spectra.hidden_matrices(), "
            "spectra.reference_matrices(), spectra.matrices(function) "
            f"(did you mean optax_decay.spectra.{nearest(name, NAMES)}()?)."
        )


@dataclasses.dataclass(frozen=True)
class MeasuredParameter:
    """A parameter with at least one measured matrix.

    Attributes:
        signature: of the parameter; inside ``shard_map`` its shape is that of a shard.
        shape: the shape of the whole parameter.
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
        """The number of weights of one matrix."""
        return self.pooled * math.prod(self.sides)

    def names(self) -> list[str]:
        """The name of every slice, measured or not."""
        if not self.slice_axes:
            return [self.path]
        return [f"{self.path}[{','.join(map(str, i))}]" for i in np.ndindex(self.slice_shape)]

    def spread(self, values: jax.Array) -> jax.Array:
        """One value per slice, as an array that broadcasts to ``signature.batch_shape``."""
        sizes = [1 if i in self.pooled_axes else self.shape[i] for i in self.signature.batch]
        return values.reshape(sizes)


def block_of(path: str, index: tuple[int, ...]) -> tuple[Any, ...]:
    """The block of the network that a matrix belongs to.

    This is the path up to its first number (``layers/3``, ``layers_3``, ``model.layers.3``). For a path without a
    number it is the first component of the path with the first index of the slice (``blocks``, 3).
    """
    numbered = _NUMBER.match(path)
    return (numbered.group(),) if numbered else (path.split("/")[0], *index[:1])


def specs_by_path(param_specs: Any) -> dict[str, tuple[Any, ...]]:
    """A tree of ``jax.P`` or shardings as a dictionary by path."""
    if param_specs is None:
        return {}
    is_spec = lambda x: isinstance(x, jax.sharding.PartitionSpec | jax.sharding.NamedSharding)
    leaves = jax.tree_util.tree_flatten_with_path(param_specs, is_leaf=is_spec)[0]
    found = {}
    for key, leaf in leaves:
        spec = leaf.spec if isinstance(leaf, jax.sharding.NamedSharding) else leaf
        if not isinstance(spec, jax.sharding.PartitionSpec):
            raise ValueError(
                f"param_specs holds {leaf!r} at {paths.path_string(key)!r}; expected jax.P or jax.NamedSharding."
            )
        found[paths.path_string(key)] = tuple(spec)
    return found


def _excluded(name: str, path: str, patterns: Sequence[str]) -> str | None:
    """The first pattern that matches a matrix, or None."""
    for pattern in patterns:
        # A literal name first: as an expression, "[0]" would mean the character 0.
        if name == pattern or name.endswith(f"/{pattern}"):
            return pattern
        if "[" not in pattern and paths.matches(pattern, path):
            return pattern
    return None


def _first_query(parameters: Sequence[MeasuredParameter]) -> str | None:
    """The name of the matrix that the released program leaves out: the query projection of the first block."""
    names = [
        (block_of(p.path, index), p.path, name)
        for p in parameters
        for index, name in zip(np.ndindex(p.slice_shape), p.names())
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
    select: Selection,
    min_eigenvalues: int,
) -> list[MeasuredParameter]:
    """The parameters with measured matrices, in the order of `signatures`.

    Args:
        signatures: of the parameters that decay, by path.
        shapes: shapes of the whole parameters, by path.
        specs: how each parameter is split; parameters without an entry are not split.
        select: which matrices are measured.
        min_eigenvalues: the number of eigenvalues that a matrix needs if `select` does not say.

    Raises:
        ValueError: an entry of ``select.exclude`` matches no matrix.
    """
    found = []
    for path, signature in signatures.items():
        if signature.is_matrix and (select.wanted is not None or signature.role == "hidden"):
            spec = tuple(specs.get(path, ()))
            spec += (None,) * (len(signature.shape) - len(spec))
            parameter = MeasuredParameter(signature, tuple(shapes[path]), spec, ())
            slices = tuple(range(math.prod(parameter.slice_shape)))
            found.append(dataclasses.replace(parameter, chosen=slices))
    least = min_eigenvalues if select.min_eigenvalues is None else select.min_eigenvalues
    dropped = {_first_query(found)} if select.name == "reference_matrices" else set()
    used: set[str | None] = set()
    result = []
    for parameter in found:
        kept = []
        for flat, name in enumerate(parameter.names()):
            pattern = _excluded(name, parameter.path, select.exclude)
            used.add(pattern)
            wanted = select.wanted is None or bool(select.wanted(name, parameter.signature))
            large = parameter.eigenvalues >= least
            if pattern is None and name not in dropped and wanted and large:
                kept.append(flat)
        if kept:
            result.append(dataclasses.replace(parameter, chosen=tuple(kept)))
    names = [name for parameter in found for name in (parameter.path, *parameter.names())]
    for pattern in select.exclude:
        if names and pattern not in used:
            raise ValueError(
                f"exclude={pattern!r} matches no matrix; the nearest name is {nearest(pattern, names)!r}."
            )
    return result
