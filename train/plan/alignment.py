"""Finds the matrix products of a GPU's compiled program whose arrays have unaligned rows.

GPUs load 16 bytes at a time. A product with rows of another size leaves the fast kernels; measured on an H200, the
products of an MLP with 5461 features took three times as long as those with 5504. Reads the text of XLA's program,
`ahead_of_time.Report.text`.
"""

import re

from train.plan.kernel_model import SIZES, computations, product_operations

BYTES = 16
LARGE = 1e8  # operations; smaller products take microseconds
_LAYOUT = re.compile(r"%([\w.\-]+) = \(?(\w+)\[([\d,]*)\]\{([\d,]*)")


def unaligned(text: str, least: float = LARGE) -> list[str]:
    """Describes every array of a large product whose rows are no multiple of 16 bytes; empty if all are aligned.

    Args:
        text: a compiled program for a GPU.
        least: floating-point operations of the smallest product that counts.
    """
    layouts = {
        name: (
            kind,
            [int(n) for n in sides.split(",") if n],
            [int(n) for n in order.split(",") if n],
        )
        for name, kind, sides, order in _LAYOUT.findall(text)
    }
    found = []
    for body in computations(text).values():
        around = {i.name: i for i in body}
        for i in body:
            if "fmha" in i.rest or product_operations(i, around) < least:
                continue
            for name in (i.name, *i.operands[:2]):
                kind, sides, order = layouts[name]
                if sides[order[0]] * SIZES[kind] % BYTES:
                    found.append(
                        f"{i.name}: {name} {kind}{sides}, rows of {sides[order[0]]} elements"
                    )
    return found
