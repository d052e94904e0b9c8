"""The least time of a compiled program, kernel by kernel: what a GPU would take if every kernel ran at its limit.

    time of a kernel = max(operations / rate of products, bytes / rate of memory)

Bytes are those of the arguments a kernel reads and the results it writes, slices counted as what they are. Of two
branches the one that moves more counts in every step, or the other one: that of a step in which nothing rare is due.
Nothing is found in a cache, nothing overlaps, products reach the peak, starting a kernel takes no time. The first three
make it longer than it has to be, the others shorter. It is a model of the program and not of the device: it shows what
a program makes any device do besides its products.

Reads the text of XLA's program for a GPU after all its passes, `ahead_of_time.Report.text`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
SIZES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "c64": 8, "token": 0}
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "iota"}
SLICES = {"dynamic-slice", "slice", "gather"}
PLAIN = {"copy", "bitcast", "dynamic-slice", "dynamic-update-slice", "slice", "transpose"}
PLAIN |= {"reshape", "parameter", "constant", "pad", "concatenate", "tuple"}
ARITHMETIC = {"s32", "u32", "s64", "u64", "pred"}  # of indices


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name, code: what it is called, and what it does.
        shapes: of its results, (element type, sides).
        operands: names of its arguments.
        rest: everything behind the arguments.
    """

    name: str
    code: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(SIZES.get(kind, 4) * math.prod(sides) for kind, sides in self.shapes)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, and how often a step runs it.

    Attributes:
        name: of its instruction.
        kind: "products", "attention", "copies" (nothing is computed), "collectives" or "elementwise".
        times: runs per step.
        operations: floating-point operations of its products, in one run.
        bytes: moved in one run.
        source: the JAX operation it came from.
    """

    name: str
    kind: str
    times: int
    operations: float
    bytes: int
    source: str

    def least(self, rate: float, bandwidth: float) -> float:
        """Seconds of all its runs at so many operations and bytes per second."""
        return self.times * max(self.operations / rate, self.bytes / bandwidth)


_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def computations(text: str) -> dict[str, list[Instruction]]:
    """All computations of a program by name; that of the whole program is "ENTRY"."""
    found: dict[str, list[Instruction]] = {}
    inside: list[Instruction] | None = None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if line.endswith("{") and not line.startswith(" ") and " -> " in line:
            name = line.split()[0]
            name = "ENTRY" if name == "ENTRY" else name.lstrip("%")
            inside = found.setdefault(name, [])
        elif line.startswith("}"):
            inside = None
        elif inside is not None and (match := _LINE.match(line)):
            root, name, shape, code, rest = match.groups()
            arguments, behind = _closed(rest)
            shapes = tuple(
                (kind, tuple(int(n) for n in sides.split(",") if n))
                for kind, sides in _SHAPE.findall(shape)
            )
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            inside.append(Instruction(name, code, shapes, operands, behind, bool(root)))
    return found


def _closed(rest: str) -> tuple[str, str]:
    """What is before and after the parenthesis that closes the one already open."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def kernels(text: str, rare: bool = True) -> list[Kernel]:
    """Every kernel of a step, those in loops once with the number of their runs.

    Args:
        text: a compiled program for a GPU.
        rare: whether of two branches the one that moves more counts; otherwise the one that moves less does.
    """
    program = computations(text)
    return list(_walk(program, "ENTRY", 1, max if rare else min))


def conditions(text: str) -> int:
    """The number of conditionals of a program, without those inside the branches of others."""
    program = computations(text)

    def inside(name: str) -> int:
        found = 0
        for i in program[name]:
            found += i.code == "conditional"
            if i.code in ("while", "call", "async-start"):
                found += sum(inside(called) for called in _called(i))
        return found

    return inside("ENTRY")


def _called(i: Instruction) -> list[str]:
    """Names of the computations that an instruction runs, without those in lists of branches."""
    names = "body|calls|to_apply|true_computation|false_computation"
    return re.findall(rf"(?:{names})=%([\w.\-]+)", i.rest)


def _walk(
    program: dict[str, list[Instruction]], name: str, times: int, choose: Callable[..., Any]
) -> Iterator[Kernel]:
    body = program[name]
    sizes = {i.name: i for i in body}
    for i in body:
        called = _called(i)
        branches = re.search(r"branch_computations=\{([^}]*)\}", i.rest)
        if i.code == "while":
            count = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', i.rest)
            turns = int(count.group(1) if count else 1)
            yield from _walk(program, called[0], times * turns, choose)
        elif i.code == "conditional":
            names = re.findall(r"%([\w.\-]+)", branches.group(1)) if branches else called
            ways = [list(_walk(program, branch, times, choose)) for branch in names]
            yield from choose(ways, key=lambda way: sum(k.times * k.bytes for k in way))
        elif i.code in ("call", "async-start"):
            for inner in called:
                yield from _walk(program, inner, times, choose)
        elif i.code not in FREE and not i.code.endswith("-done"):
            yield _kernel(program, i, sizes, times)


def _kernel(
    program: dict[str, list[Instruction]],
    i: Instruction,
    around: dict[str, Instruction],
    times: int,
) -> Kernel:
    source = re.search(r'op_name="([^"]*)"', i.rest)
    arguments = [around[name] for name in i.operands if name in around]
    operations, kind = 0.0, "elementwise"
    if i.code == "fusion":
        called = re.search(r"calls=%([\w.\-]+)", i.rest)
        assert called is not None
        body = program[called.group(1)]
        moved = _moved(body)
        operations = sum(product_operations(inner, {x.name: x for x in body}) for inner in body)
        computed = {x.code for x in body if not (x.shapes and x.shapes[0][0] in ARITHMETIC)}
        kind = "products" if operations else "copies" if computed <= PLAIN else kind
    else:
        moved = i.bytes + sum(x.bytes for x in arguments)
        operations = product_operations(i, around)
        if "__cudnn$fmha" in i.rest:
            kind = "attention"
        elif i.code == "dot" or "__cublas$" in i.rest:
            kind = "products"
        elif i.code in PLAIN:
            kind = "copies"
        elif re.match(r"all-|reduce-scatter|collective", i.code):
            kind = "collectives"
    return Kernel(i.name, kind, times, operations, moved, source.group(1) if source else "")


def _moved(body: list[Instruction]) -> int:
    """Bytes that a fused computation reads and writes."""
    known = {i.name: i for i in body}
    users: dict[str, list[Instruction]] = {}
    for i in body:
        for name in i.operands:
            users.setdefault(name, []).append(i)

    def read(name: str) -> int:
        """Of an argument: what its slices hold, if only slices of it are used."""
        total = 0
        for user in users.get(name, []):
            if user.code in SLICES and user.operands[0] == name:
                total += user.bytes
            elif user.code == "dynamic-update-slice" and user.operands[0] == name:
                continue  # overwritten in place
            elif user.code == "bitcast":
                total += read(user.name)
            else:
                return known[name].bytes
        return min(total, known[name].bytes)

    def written(name: str) -> int:
        i = known[name]
        if i.code in ("tuple", "bitcast"):
            return sum(written(operand) for operand in i.operands)
        return known[i.operands[1]].bytes if i.code == "dynamic-update-slice" else i.bytes

    reads = sum(read(i.name) for i in body if i.code == "parameter")
    return reads + sum(written(i.name) for i in body if i.root)


def product_operations(i: Instruction, around: dict[str, Instruction]) -> float:
    """Floating-point operations of a product, or of fused attention."""
    if i.code == "dot":
        _, left = around[i.operands[0]].shapes[0]
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        assert summed is not None
        inner = math.prod(left[int(axis)] for axis in summed.group(1).split(",") if axis)
        return 2.0 * inner * math.prod(i.shapes[0][1])
    if "__cublas$" in i.rest and i.operands:
        _, left = around[i.operands[0]].shapes[0]
        summed = re.search(r'"lhs_contracting_dimensions":\["?(\d+)', i.rest)
        return 2.0 * left[int(summed.group(1))] * math.prod(i.shapes[0][1]) if summed else 0.0
    if "__cudnn$fmha" in i.rest:
        B, T, H, E = around[i.operands[0]].shapes[0][1]
        square = 2.0 * B * H * T * around[i.operands[1]].shapes[0][1][1] * E
        half = 0.5 if "CAUSAL" in i.rest else 1.0
        return half * square * (5 if "Backward" in i.rest else 2)  # products of T x T each
    return 0.0


def least(text: str, rate: float, bandwidth: float) -> dict[str, float]:
    """Seconds of a step by kind of kernel, the longest first; without what devices send each other.

    Args:
        text: a compiled program for a GPU.
        rate: operations of products per second.
        bandwidth: bytes per second.
    """
    found: dict[str, float] = {}
    for kernel in kernels(text):
        if kernel.kind != "collectives":
            found[kernel.kind] = found.get(kernel.kind, 0.0) + kernel.least(rate, bandwidth)
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))
