"""The collectives in a compiled program, and the bytes that each device sends for them.

Counted for a ring, per device and in each direction: of an all-reduce over N devices 2(N−1)/N times its operand, of an
all-to-all (N−1)/N times its operand, of an all-gather (N−1)/N times its result.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"
_LINE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
        kind: its name in HLO.
        arrays: (dtype, elements) of each result.
        devices: in one of its groups.
    """

    kind: str
    arrays: tuple[tuple[str, int], ...]
    devices: int

    def sent(self, width: int | None = None) -> float:
        """Bytes that each device sends in a ring, with `width` bytes per element instead of its own if given."""
        size = sum(n * (width or item_bytes(dtype)) for dtype, n in self.arrays)
        n = self.devices
        factor = {
            "all-reduce": 2 * (n - 1) / n,
            "all-gather": (n - 1) / n,
            "all-to-all": (n - 1) / n,
            "reduce-scatter": n - 1,
            "collective-permute": 1,
            "collective-broadcast": 1,
        }[self.kind]
        return factor * size


def item_bytes(dtype: str) -> int:
    """Bytes per element of an HLO dtype such as ``bf16``, ``u8`` or ``pred``."""
    bits = re.search(r"[0-9]+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


def collectives(hlo: str) -> list[Collective]:
    """The collectives in the text of a compiled program; each counts once, also inside loops and branches.

    Raises:
        ValueError: a collective whose groups are written in a way that is not known.
    """
    partitions = re.search(r"num_partitions=([0-9]+)", hlo)
    found = []
    for line in hlo.splitlines():
        match = _LINE.search(line)
        if not match:
            continue
        shapes = re.sub(r"/\*.*?\*/", "", match[1])
        arrays = [
            (dtype, math.prod(int(d) for d in dims.split(",") if d))
            for dtype, dims in _SHAPE.findall(shapes)
        ]
        if match[3] and match[2] in ("all-gather", "collective-permute"):
            arrays = arrays[len(arrays) // 2 :] if match[2] == "all-gather" else arrays[:1]
        devices = _group_size(line, int(partitions[1]) if partitions else 1)
        found.append(Collective(match[2], tuple(arrays), devices))
    return found


def _group_size(line: str, partitions: int) -> int:
    if "source_target_pairs=" in line:
        return 2
    text = line.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([0-9,]+)\}", text):
        return len(listed[1].split(","))
    if counted := re.match(r"\[[0-9]+,([0-9]+)\]<=", text):
        return int(counted[1])
    # Each is a mesh axis, or a part of one: 'axis':(size of the parts before it)size.
    axis = r"'(\w+)'(?::\([0-9]+\)([0-9]+))?"
    if named := re.match(rf"mesh\[(.*?)\][^{{]*\{{((?:{axis},?)+)\}}", text):
        sizes = dict(re.findall(r"'(\w+)'=([0-9]+)", named[1]))
        axes = re.findall(axis, named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if re.match(r"\{\}", text):
        return partitions
    raise ValueError(f"cannot read the groups of this collective: {line.strip()[:300]}")


def sent(found: Sequence[Collective], width: int | None = None) -> float:
    return sum(c.sent(width) for c in found)


def operations(found: Sequence[Collective]) -> str:
    """``2 all-gather f32, 1 all-to-all u8``: how many of each kind."""
    names = [f"{c.kind} {'+'.join(sorted({d for d, _ in c.arrays}))}" for c in found]
    return ", ".join(f"{names.count(n)} {n}" for n in sorted(set(names))) or "none"
