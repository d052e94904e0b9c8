"""What names say of a parameter's axes, in the conventions of Flax Linen, Haiku, MaxText and transformers."""

import collections
import dataclasses
import re
from collections.abc import Iterable

import numpy as np


def _component(*alternatives: str) -> re.Pattern[str]:
    """Matches a whole component of a path that is one of these."""
    return re.compile("|".join(alternatives), re.I)


_HEAD = _component(
    "lm_head",
    "head",
    "logits?",
    "logits_dense",
    "classifier",
    "readout",
    r"unembed\w*",
    "embed_out",
)
_INSIDE = _component(
    *(
        "[qkvo]",
        "qkv",
        "kv",
        "query",
        "key",
        "value",
        "out",
        "[qkvo]_proj",
        "c_attn",
        "c_proj",
        "in_proj",
        "out_proj",
    ),
    *(
        "gate",
        "up",
        "down",
        r"(?:gate|up|down|gate_up)_proj",
        r"wi(?:_\d)?",
        "wo",
        r"fc_?\d?",
        "c_fc",
    ),
)
_NORM = _component(r"\w*norm\w*", r"ln(?:_\w+)?\d*", r"bn\d*", "scale")
_EMBED = _component(r"\w*embed\w*", "wte", r"tok(?:en)?_?emb\w*")
_POSITIONS = _component("wpe", r"\w*position\w*", r"pos_?emb\w*")
_VECTORS = {"bias", "scale", "gamma", "beta", "offset"}


def _components(path: str) -> list[str]:
    return re.split(r"[/.]", path)


def _layer(path: str) -> str:
    """The name of the layer that a parameter belongs to: the component before its own name."""
    return ["", *_components(path)][-2]


def is_head(path: str) -> bool:
    """Whether the name of its layer says that a matrix is an output head."""
    return _HEAD.fullmatch(_layer(path)) is not None


def is_inside(path: str) -> bool:
    """Whether the name of its layer says that a matrix lies inside a block."""
    return _INSIDE.fullmatch(_layer(path)) is not None


def is_of_positions(path: str) -> bool:
    """Whether the name of its layer, or its own, says that an embedding is one of positions."""
    return any(_POSITIONS.fullmatch(part) for part in _components(path)[-2:])


def _is_of_norm(path: str) -> bool:
    return any(_NORM.fullmatch(part) for part in _components(path))


def _is_embedding(path: str) -> bool:
    return any(_EMBED.fullmatch(part) for part in _components(path)[-2:]) and not is_head(path)


@dataclasses.dataclass(frozen=True)
class KnownAxes:
    """What is known of one parameter: numbers of its dimensions, in groups.

    Attributes:
        kind: ``"linear"``, ``"conv"``, ``"embedding"``, ``"positions"`` or ``"vector"``.
        batch, inputs, outputs: dimensions; `kernel` are those of a convolution's positions.
        basis: what this rests on, for readers.
    """

    kind: str
    shape: tuple[int, ...]
    batch: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    basis: str = ""

    def size(self, axes: Iterable[int]) -> int:
        return int(np.prod([self.shape[i] for i in axes], dtype=np.int64))


def named(shapes: dict[str, tuple[int, ...]], known: dict[str, KnownAxes]) -> dict[str, KnownAxes]:
    """`known`, with what names say of the other parameters.

    Raises:
        ValueError: a parameter whose name does not say enough.
    """
    found, stacked = dict(known), stacked_axes(shapes)
    for path, shape in shapes.items():
        if path not in found:
            known_by_name = by_name(path, shape, stacked[path])
            if known_by_name is None:
                raise ValueError(
                    f"the axes of {path!r} with shape {shape} are not known from its name; it could be "
                    f"{', '.join(_candidates(len(shape)))}. Describe it with a rule, such as axes = (({path!r}, "
                    f"{_candidates(len(shape))[0]}), *the rules of the other parameters)."
                )
            found[path] = known_by_name
    return {path: found[path] for path in shapes}


def stacked_axes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The stacked axes of each parameter: those by which the norms of its subtree have more than one dimension."""
    peers: dict[str, list[str]] = collections.defaultdict(list)
    for path in shapes:
        for prefix in _prefixes(path):
            peers[prefix].append(path)
    norms = {path for path in shapes if _is_of_norm(path)}
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


def by_name(path: str, shape: tuple[int, ...], stacked: tuple[int, ...]) -> KnownAxes | None:
    """What the name of a parameter says of its axes; None if it does not say enough."""
    name = path.rsplit("/", 1)[-1].rsplit(".", 1)[-1]
    owner = path[: -len(name)].rstrip("/.")
    own = tuple(i for i in range(len(shape)) if i not in stacked)
    basis = f"the name {'/'.join(path.split('/')[-2:])!r}"
    if stacked:
        basis += f", stacked along {'axis' if len(stacked) == 1 else 'axes'} {', '.join(map(str, stacked))}"
    if name in _VECTORS or len(own) <= 1 or (name == "weight" and _is_of_norm(owner)):
        return KnownAxes("vector", shape, stacked, outputs=own, basis=basis)
    if len(own) == 2:
        if is_of_positions(path):
            return KnownAxes("positions", shape, stacked, (), own[:1], own[1:], basis)
        if _is_embedding(path):
            return KnownAxes("embedding", shape, stacked, (), own[:1], own[1:], basis)
        if name in ("kernel", "w"):
            return KnownAxes("linear", shape, stacked, (), own[:1], own[1:], basis)
        if name == "weight":
            return KnownAxes("linear", shape, stacked, (), own[1:], own[:1], basis)
    if len(own) == 3 and name in ("kernel", "w") and not re.search("conv", owner, re.I):
        last = re.split(r"[/_.]", owner)[-1] if not owner.endswith("_proj") else owner
        if re.search(r"(?:^|[/_.])(?:query|key|value|q|k|v)(?:_proj)?$", owner):
            return KnownAxes("linear", shape, stacked, (), own[:1], own[1:], basis)
        if last in ("out", "o") or re.search(r"(?:^|[/_.])(?:out|o)(?:_proj)?$", owner):
            return KnownAxes("linear", shape, stacked, (), own[:2], own[2:], basis)
    if len(own) in (3, 4, 5) and re.search("conv", owner, re.I):
        spatial = len(own) - 2
        if name in ("kernel", "w"):
            return KnownAxes("conv", shape, stacked, own[:spatial], own[-2:-1], own[-1:], basis)
        if name == "weight":
            return KnownAxes("conv", shape, stacked, own[2:], own[1:2], own[:1], basis)
    return None


def _candidates(rank: int) -> tuple[str, ...]:
    return {
        2: ("'D -> F'", "'F -> D : D F' (stored [outputs, inputs])", "'V -> D'"),
        3: ("'L | D -> F'", "'D -> H K'", "'H K -> D'"),
        4: ("'L E | D -> F'", "'L | D -> H K'", "'KH KW | I -> O'"),
    }.get(rank, ("'L E | D -> H K'", "'L | D'"))
