"""What names say of a parameter's axes, in the conventions of Flax Linen, Haiku, MaxText and transformers."""

import dataclasses
import re
from collections.abc import Iterable

import numpy as np


def _word(*alternatives: str) -> re.Pattern[str]:
    """Matches a component of a path, or a part of it between underscores, that is one of these."""
    return re.compile(rf"(?:^|[/_.])(?:{'|'.join(alternatives)})(?:[/_.]|$)", re.I)


HEADS = _word("lm_head", "head", "logits?", "logits_dense", "classifier", "readout", r"unembed\w*")
INSIDE = _word(
    *(
        "q",
        "k",
        "v",
        "qkv",
        "query",
        "key",
        "value",
        "kv",
        "out",
        "o",
        "c_attn",
        "in_proj",
        "out_proj",
    ),
    *("gate", "up", "down", r"wi(?:_\d)?", "wo", r"gate_up\w*", r"fc\d?", "c_fc", "c_proj"),
)
_NORM = _word(r"\w*norm\w*", r"ln\w*", r"bn\d*", "scale")
_EMBED = _word(r"\w*embed\w*", "wte", r"token\w*")
POSITIONS = _word("wpe", r"\w*pos\w*")
_VECTORS = {"bias", "b", "scale", "gamma", "beta", "offset"}


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
    found = dict(known)
    for path, shape in shapes.items():
        if path not in found:
            found[path] = _by_name(path, shape, _stacked(path, shapes))
    return {path: found[path] for path in shapes}


def _stacked(path: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The stacked axes of a parameter: those by which the vectors of its subtree have more than one dimension."""
    parts = path.split("/")
    for depth in range(len(parts)):
        prefix = "".join(f"{part}/" for part in parts[:depth])
        peers = {p: s for p, s in shapes.items() if p.startswith(prefix)}
        norms = [s for p, s in peers.items() if _NORM.search(p)]
        extra = min(map(len, norms), default=1) - 1
        if extra > 0 and len(peers) > len(norms):
            sizes = list(peers.values())
            shared = [
                i for i in range(min(map(len, sizes))) if len({size[i] for size in sizes}) == 1
            ]
            if len(shared) >= extra:
                return tuple(shared[:extra])
    return ()


def _by_name(path: str, shape: tuple[int, ...], stacked: tuple[int, ...]) -> KnownAxes:
    name = path.rsplit("/", 1)[-1].rsplit(".", 1)[-1]
    owner = path[: -len(name)].rstrip("/.")
    own = tuple(i for i in range(len(shape)) if i not in stacked)
    basis = f"the name {'/'.join(path.split('/')[-2:])!r}"
    if stacked:
        basis += f", stacked along {'axis' if len(stacked) == 1 else 'axes'} {', '.join(map(str, stacked))}"
    if name in _VECTORS or len(own) <= 1 or (name == "weight" and _NORM.search(owner)):
        return KnownAxes("vector", shape, stacked, outputs=own, basis=basis)
    if len(own) == 2:
        if POSITIONS.search(path):
            return KnownAxes("positions", shape, stacked, (), own[:1], own[1:], basis)
        if name in ("embedding", "embeddings") or _EMBED.search(path):
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
    raise ValueError(
        f"the axes of {path!r} with shape {shape} are not known from its name; it could be "
        f"{', '.join(_candidates(len(shape)))}. Describe it with a rule, such as axes = (({path!r}, "
        f"{_candidates(len(shape))[0]}), *the rules of the other parameters)."
    )


def _candidates(rank: int) -> tuple[str, ...]:
    return {
        2: ("'D -> F'", "'F -> D : D F' (stored [outputs, inputs])", "'V -> D'"),
        3: ("'L | D -> F'", "'D -> H K'", "'H K -> D'"),
        4: ("'L E | D -> F'", "'L | D -> H K'", "'KH KW | I -> O'"),
    }.get(rank, ("'L E | D -> H K'", "'L | D'"))
