"""A width law in numbers: learning rate, decay, shrink and time scale of every parameter, to print before a run."""

import dataclasses
import math

import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check
from optax_decay.product import couplings, masks
from optax_decay.product.couplings import Coupling, check_coupling
from optax_decay.product.diagnostics import quantity_text
from optax_decay.width import laws
from optax_decay.width.factors import BaseWidth, width_plan
from optax_decay.width.laws import WidthLaw


@dataclasses.dataclass(frozen=True)
class WidthRow:
    """One parameter of a `WidthTable`.

    Attributes:
        path, shape, role: from its `Signature`.
        factor: m, its width over that in the proxy; None for vector-like parameters.
        learning_rate: η_i, at the peak.
        weight_decay: λ_i, such that AdamW with η_i and λ_i shrinks weights at the same speed; 0 without decay.
        shrink: the fraction by which a step at the peak of the learning rate shrinks a weight.
        steps: 1/shrink, infinite without decay.
        top_singular_value: the predicted largest singular value over that of the proxy; None without decay and for
            vector-like parameters.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    factor: float | None
    learning_rate: float
    weight_decay: float
    shrink: float
    steps: float
    top_singular_value: float | None


@dataclasses.dataclass(frozen=True)
class WidthTable:
    """The width law of every parameter in numbers. ``str(table)`` is a table with one line per parameter."""

    rows: tuple[WidthRow, ...]

    def __str__(self) -> str:
        header = ("parameter", "shape", "role", "width", "rate", "decay", "per step", "steps", "σ")
        lines = [header]
        for row in self.rows:
            σ = row.top_singular_value
            lines.append(
                (
                    row.path,
                    "×".join(map(str, row.shape)) or "scalar",
                    row.role,
                    "-" if row.factor is None else f"×{row.factor:g}",
                    f"{row.learning_rate:.3g}",
                    f"{row.weight_decay:.3g}" if row.shrink else "-",
                    f"{row.shrink:.2e}" if row.shrink else "-",
                    quantity_text(row.steps) if row.shrink else "-",
                    "-" if σ is None else f"×{σ:.2f}",
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths))
            )
            for line in lines
        ]
        rule = "-" * max(map(len, text))
        return "\n".join([text[0], rule, *text[1:]])


def width_table(
    params: optax.Params,
    learning_rate: float,
    weight_decay: float,
    base_width: BaseWidth,
    *,
    law: WidthLaw = laws.law(),
    mask: masks.Mask = None,
    coupling: Coupling = couplings.learning_rate(),
    axes: axes_lib.Axes = None,
) -> WidthTable:
    """Learning rate, decay and time scale of every parameter, under the arguments of `width_scaling` or `mup_adamw`.

    Args:
        params: tree of arrays or ``jax.ShapeDtypeStruct``.
        learning_rate: η of the proxy, at its peak.
        weight_decay: λ of the proxy, as `coupling` understands it.
        base_width, law, axes: as in `width_scaled_decay`.
        mask, coupling: as given to the decay. The default mask of `mup_adamw` is hidden matrices and the head.

    Raises:
        ValueError: as in `width_scaled_decay`; a number out of its range.

    >>> import jax.numpy as jnp
    >>> axes = (("up", "D -> F"), ("norm", "D"))
    >>> params = {"norm": jnp.zeros(2048), "up": jnp.zeros((2048, 8192))}
    >>> print(width_table(params, 3e-3, 0.1, 256, axes=axes))
    parameter  shape      role    width      rate  decay  per step  steps      σ
    ----------------------------------------------------------------------------
    norm       2048       vector      -     0.003      -         -      -      -
    up         2048×8192  hidden     ×8  0.000375  0.283  1.06e-04  9.43k  ×1.00
    """
    check("learning_rate", learning_rate, 0.0, open_low=True)
    check("weight_decay", weight_decay, 0.0)
    check_coupling(coupling)
    axes = axes_lib.inferred if axes is None else axes
    plan = width_plan(base_width, law, axes)
    signatures = axes_lib.signatures(axes, params)
    strength = masks.strengths(mask, params, signatures)
    rates, decays = plan.rates(signatures), plan.decays(signatures, False)
    # The couplings schedule and independent state the shrink itself; η/η_max is 1 at the peak.
    by_rate = coupling.name in ("learning_rate", "corrected")
    coupled = weight_decay if by_rate else weight_decay / learning_rate
    rows = []
    for path, (m, own) in plan.exponents(signatures).items():
        signature, eta = signatures[path], learning_rate * rates[path]
        lam = coupled * decays[path] * strength[path]
        shrink = eta * lam
        σ = None
        if m is not None and lam:
            σ = math.sqrt(rates[path] / decays[path]) * m**own.spectral
        rows.append(
            WidthRow(
                path,
                signature.shape,
                signature.role,
                m,
                eta,
                lam,
                shrink,
                1 / shrink if shrink else math.inf,
                σ,
            )
        )
    return WidthTable(tuple(rows))
