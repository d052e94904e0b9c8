"""What names say of a parameter's axes, in the conventions of Flax Linen, Haiku, MaxText and transformers.

A name gives the order in which a matrix is stored: ``kernel`` and ``w`` are [inputs, outputs], ``weight`` is
[outputs, inputs]. `Neighbours` overrules it where the sizes of other parameters contradict: a bias has the size of the
outputs, a query or up-projection takes in the features of the embedding, a down-projection puts them out.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from optax_decay.parameters.words import (
    CONVOLUTION,
    FUSED,
    TOKEN,
    VECTORS,
    components,
    is_embedding,
    is_expert,
    is_head,
    is_inside,
    is_inward,
    is_of_norm,
    is_of_positions,
    names_of,
    side_of_heads,
)


@dataclasses.dataclass(frozen=True)
class KnownAxes:
    """What is known of one parameter: numbers of its dimensions, in groups.

    Attributes:
        kind: ``"linear"``, ``"conv"``, ``"embedding"``, ``"positions"`` or ``"vector"``.
        batch, inputs, outputs: dimensions; `kernel` are those of a convolution's positions.
        basis: what this rests on, for readers.
        grouped: whether a convolution takes in one group of its channels at a time; None where that is not known.
    """

    kind: str
    shape: tuple[int, ...]
    batch: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    basis: str = ""
    grouped: bool | None = None

    def size(self, axes: Iterable[int]) -> int:
        return int(np.prod([self.shape[i] for i in axes], dtype=np.int64))


def named(
    shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, KnownAxes]
) -> dict[str, KnownAxes | None]:
    """`known`, with what names and neighbours say of the other parameters; None where they do not say enough."""
    neighbours = Neighbours(shapes, known)
    return {
        path: known[path] if path in known else neighbours.describe(path, shape)
        for path, shape in shapes.items()
    }


def stacked_axes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The stacked axes of each parameter: those by which the norms of its subtree have more than one dimension."""
    peers: dict[str, list[str]] = collections.defaultdict(list)
    for path in shapes:
        for prefix in _prefixes(path):
            peers[prefix].append(path)
    norms = {path for path in shapes if is_of_norm(path)}
    of_prefix = {
        prefix: _shared_axes(
            [shapes[path] for path in paths], [shapes[path] for path in paths if path in norms]
        )
        for prefix, paths in peers.items()
    }
    return {path: next(filter(None, map(of_prefix.get, _prefixes(path))), ()) for path in shapes}


def _prefixes(path: str) -> list[str]:
    """The subtrees that hold a parameter, the whole tree first."""
    parts = path.split("/")
    return ["".join(f"{part}/" for part in parts[:depth]) for depth in range(len(parts))]


def _shared_axes(sizes: list[tuple[int, ...]], norms: list[tuple[int, ...]]) -> tuple[int, ...]:
    """As many axes as the norms of a subtree have too many, if all its parameters have them in one place and size."""
    extra = min(map(len, norms), default=1) - 1
    if extra <= 0 or len(sizes) == len(norms):
        return ()
    ranks = range(min(map(len, sizes)))
    shared = [i for i in ranks if len({size[i] for size in sizes}) == 1]
    return tuple(shared[:extra]) if len(shared) >= extra else ()


class Neighbours:
    """Describes parameters by their names, with the sizes of the other parameters of a tree."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, KnownAxes]
    ) -> None:
        self.shapes, self.stacked = shapes, stacked_axes(shapes)
        self.width = self._width(known)
        self.beside: dict[str, list[str]] = collections.defaultdict(list)
        for path in shapes:
            if len(self._own(path)) > 1:
                self.beside[re.sub(r"[^/.]+$", "", path)].append(path)
        evidence = {p: self._reversed(p, s) for p, s in shapes.items() if p not in known}
        # Square matrices have no evidence of their own; they are stored like the others of their name.
        self.reversed: dict[str, set[bool]] = collections.defaultdict(set)
        for path, found in evidence.items():
            if found is not None:
                self.reversed[components(path)[-1]].add(found)

    def _width(self, known: Mapping[str, KnownAxes]) -> int | None:
        """The number of features of the embedding, or else of most norms."""
        tables = [a.size(a.outputs) for a in known.values() if a.kind == "embedding"]
        tables += [
            shape[-1]
            for path, shape in self.shapes.items()
            if len(shape) >= 2 and is_embedding(path) and not is_of_positions(path)
        ]
        norms = [s[-1] for p, s in self.shapes.items() if s and is_of_norm(p)]
        sizes = collections.Counter(tables or norms)
        return sizes.most_common(1)[0][0] if sizes else None

    def _own(self, path: str) -> tuple[int, ...]:
        own = [i for i in range(len(self.shapes[path])) if i not in self.stacked[path]]
        return tuple(own)

    def bias(self, path: str) -> tuple[int, ...] | None:
        """The sizes of the bias beside a matrix, without stacked axes; None beside several matrices."""
        place = re.sub(r"[^/.]+$", "", path)
        if len(self.beside[place]) > 1 and "weight_" not in path:  # cells have two, and one bias
            return None
        for name in ("bias", "b", "B"):
            beside = place + name
            if beside != path and beside in self.shapes:
                return tuple(self.shapes[beside][i] for i in self._own(beside))
        return None

    def _reversed(self, path: str, shape: tuple[int, ...]) -> bool | None:
        """Whether sizes say that a matrix of two axes is stored [outputs, inputs]; None where they do not say."""
        own = self._own(path)
        if is_expert(path) and len(own) == 3:
            own = own[1:]
        if len(own) != 2 or is_embedding(path) or shape[own[0]] == shape[own[1]]:
            return None
        first, last = shape[own[0]], shape[own[1]]
        bias = self.bias(path)
        if bias and bias[-1:] in ((first,), (last,)):
            return bias[-1] == first
        if self.width in (first, last) and is_inside(path):
            return (self.width == last) == is_inward(path)
        return None

    def describe(self, path: str, shape: tuple[int, ...]) -> KnownAxes | None:
        """What the name of a parameter and its neighbours say of its axes; None if they do not say enough."""
        stacked, own = self.stacked[path], self._own(path)
        name = components(path)[-1].lower()
        owner = path[: -len(name)].rstrip("/.")
        basis = f"the name {'/'.join(path.split('/')[-2:])!r}"
        if stacked:
            basis += f", stacked along {'axis' if len(stacked) == 1 else 'axes'} {', '.join(map(str, stacked))}"

        def known(
            kind: str, inputs: tuple[int, ...], outputs: tuple[int, ...], **more
        ) -> KnownAxes:
            own_batch = more.pop("batch", ())
            text = basis + more.pop("because", "")
            batch = tuple(sorted((*stacked, *own_batch)))
            return KnownAxes(kind, shape, batch, more.pop("kernel", ()), inputs, outputs, text)

        beside = {path[:-1] + "w", path[:-1] + "W"} & {*self.shapes}
        alone = name == "b" and not beside  # then it may be a matrix
        if (
            (name in VECTORS and not alone)
            or len(own) <= 1
            or (name == "weight" and is_of_norm(owner))
        ):
            return known("vector", (), own)
        ones = tuple(i for i in own[:-1] if shape[i] == 1)
        if ones and len(own) - len(ones) <= 2 and name not in ("kernel", "weight", "w"):
            rest = tuple(i for i in own if i not in ones)
            if len(rest) == 1 and (TOKEN.fullmatch(name) or is_of_positions(path)):
                return known("vector", (), own)
            if len(rest) == 2 and is_of_positions(path):
                return known("positions", rest[:1], rest[1:], batch=ones)
        if len(own) == 2:
            if is_of_positions(path) or TOKEN.fullmatch(name):
                return known("positions", own[:1], own[1:])
            if is_embedding(path):
                return known("embedding", own[:1], own[1:])
        if (fused := self._fused(path, own)) is not None:
            return known("linear", *fused[1:], batch=fused[0])
        if len(own) == 2 or (len(own) == 3 and is_expert(path)):
            return self._matrix(path, own, name, known)
        if (
            len(own) == 3
            and name in ("kernel", "w", *names_of(path))
            and not CONVOLUTION.search(owner)
        ):
            return self._heads(path, own, known)
        return _convolution(path, shape, own, name, owner, known)

    def _fused(self, path: str, own: tuple[int, ...]) -> tuple[tuple[int, ...], ...] | None:
        """Batch, inputs and outputs of an array with an axis of the matrices that lie side by side in it."""
        if len(own) < 3 or is_expert(path):
            return None
        for number, pattern in FUSED.items():
            if any(pattern.fullmatch(name) for name in names_of(path)):
                side = [i for i in own if self.shapes[path][i] == number]
                rest = tuple(i for i in own if i not in side[:1])
                if side[:1] and side[0] != own[-1]:
                    inputs = self._features(path, rest) or rest[:1]
                    return (side[0],), inputs, tuple(i for i in rest if i not in inputs)
        return None

    def _features(self, path: str, own: tuple[int, ...]) -> tuple[int, ...]:
        """The axis with the size of the embedding, if there is exactly one."""
        axes = tuple(i for i in own if self.shapes[path][i] == self.width)
        return axes if len(axes) == 1 else ()

    def _matrix(self, path, own, name, known) -> KnownAxes | None:
        """A matrix of two axes, or a stack of such for the experts of a mixture."""
        batch, (first, last) = own[:-2], own[-2:]
        found = self._reversed(path, self.shapes[path])
        because = ""
        if found is None:
            others = self.reversed[name]
            usual = name == "weight" or re.fullmatch(r"weight_[ih]h", name) is not None
            said = (
                name in ("kernel", "w", "weight", "linear", "lora_a", "lora_b")
                or is_inside(path)
                or is_head(path)
            )
            if not (usual or said):
                return None
            found = next(iter(others)) if len(others) == 1 else usual
        elif found != (name == "weight"):
            because = ", and the sizes of its neighbours"
        inputs, outputs = ((last,), (first,)) if found else ((first,), (last,))
        return known("linear", inputs, outputs, batch=batch, because=because)

    def _heads(self, path, own, known) -> KnownAxes | None:
        """A matrix with an axis of attention heads on one of its sides."""
        sizes = tuple(self.shapes[path][i] for i in own)
        side = side_of_heads(path)
        features = self._features(path, own)
        if features and side:
            heads = tuple(i for i in own if i not in features)
            usual = features == (own[:1] if side == "out" else own[-1:])
            because = "" if usual else ", and the sizes of its neighbours"
            return known(
                "linear",
                *((features, heads) if side == "out" else (heads, features)),
                because=because,
            )
        if side:
            split = 1 if side == "out" else 2
        else:
            bias = self.bias(path)
            because = ", and the sizes of its neighbours"
            if bias == sizes[1:] and bias != sizes[2:]:
                return known("linear", own[:1], own[1:], because=because)
            if bias == sizes[2:] and self.width == sizes[2] and self.width != sizes[1]:
                return known("linear", own[:2], own[2:], because=because)
            return None
        return known("linear", own[:split], own[split:])


def _convolution(path, shape, own, name, owner, known) -> KnownAxes | None:
    """A convolution: its owner is named one, or its kernel has a small square window in front."""
    if len(own) not in (3, 4, 5) or name not in ("kernel", "w", "weight"):
        return None
    spatial = len(own) - 2
    window = own[2:] if name == "weight" else own[:spatial]
    sizes = {shape[i] for i in window}
    because = ""
    if not CONVOLUTION.search(owner):
        if len(own) != 4 or len(sizes) != 1 or max(sizes) > 32:
            return None
        because = ", and its square window"
    if name == "weight":
        return known("conv", own[1:2], own[:1], kernel=window, because=because)
    return known("conv", own[-2:-1], own[-1:], kernel=window, because=because)


def candidates(rank: int) -> tuple[str, ...]:
    """Descriptions that a parameter with this number of dimensions could have."""
    return {
        2: ("'D -> F'", "'F D : D -> F' (stored [outputs, inputs])", "'V -> D'", "'L | D'"),
        3: ("'L | D -> F'", "'D -> H K'", "'H K -> D'"),
        4: ("'L E | D -> F'", "'L | D -> H K'", "'KH KW | I -> O'"),
    }.get(rank, ("'L E | D -> H K'", "'L | D'"))
