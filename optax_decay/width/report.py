"""Compares the largest singular values of a model with those of its proxy, matrix by matrix.

With σ the largest singular value of a matrix at the end of a run, m its width over its width in the proxy, and a law
η_i = η m^-r, λ_i = λ m^s (`laws`), the transfer of η and λ rests on this claim::

    σ ∝ sqrt(η_i/λ_i) · m^a,     and with s = 2a - r     σ(target)/σ(proxy) = 1

The report gives the ratio, says whether it is within a tolerance, and solves for the exponent that the run showed::

    a = log(σ(target)/σ(proxy)) / log m + (r + s)/2,         the decay exponent that fits it:  2a - r

Reference: arXiv 2510.15262, whose diagnostic is that largest singular values match across widths.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_decay.matrices.top_singular_values import sublayer_gains, top_singular_values
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check
from optax_decay.product.per_matrix import accumulator_dtype
from optax_decay.product.product import by_path
from optax_decay.width import laws
from optax_decay.width.laws import Exponents, WidthLaw, check_law


@dataclasses.dataclass(frozen=True)
class GainRow:
    """One matrix, one slice of a stacked one, or one sublayer, of a `GainReport`.

    Attributes:
        path: of the parameter, with ``[i]`` for a slice; or ``sublayer NAME``. Where the proxy has another number of
            layers, the geometric means of the slices are compared.
        factor: m, the width over that in the proxy; None for sublayers.
        proxy, target: largest singular value; for sublayers, the product of several.
        proxy_rms, target_rms: root mean square of the entries; None for sublayers.
        ratio: target over proxy; the law aims at 1.
        predicted: the ratio that the exponents of the law predict; None for sublayers.
        passed: whether the ratio is within the tolerance.
        exponent: fitted a; None where m is 1, and for sublayers.
        decay_exponent: fitted s = 2a - r.
    """

    path: str
    factor: float | None
    proxy: float
    target: float
    proxy_rms: float | None
    target_rms: float | None
    ratio: float
    predicted: float | None
    passed: bool
    exponent: float | None
    decay_exponent: float | None


@dataclasses.dataclass(frozen=True)
class GainReport:
    """A run compared with its proxy. ``str(report)`` is a table with one line per parameter.

    Attributes:
        rows: one `GainRow` per matrix and sublayer.
        tolerance: a row passes if ``|ratio - 1| <= tolerance``.
        law: the law under which the run was trained.
    """

    rows: tuple[GainRow, ...]
    tolerance: float
    law: WidthLaw

    @property
    def passed(self) -> bool:
        """Whether every matrix passed; sublayers do not count."""
        return all(row.passed for row in self.rows if not row.path.startswith("sublayer "))

    @property
    def exponent(self) -> float | None:
        """The median of the fitted a; None where all widths are equal."""
        found = [row.exponent for row in self.rows if row.exponent is not None]
        return float(np.median(found)) if found else None

    def __str__(self) -> str:
        header = ("matrix", "width", "proxy σ", "target σ", "ratio", "range", "a", "s", "passed")
        groups: dict[str, list[GainRow]] = {}
        for row in self.rows:
            groups.setdefault(row.path.split("[")[0], []).append(row)
        lines = [header]
        for path, rows in groups.items():
            ratios = [row.ratio for row in rows]
            exponents = [row.exponent for row in rows if row.exponent is not None]
            a = None if not exponents else float(np.mean(exponents))
            lines.append(
                (
                    path,
                    "-" if rows[0].factor is None else f"×{rows[0].factor:g}",
                    f"{_geometric(row.proxy for row in rows):.3g}",
                    f"{_geometric(row.target for row in rows):.3g}",
                    f"{_geometric(ratios):.2f}",
                    f"{min(ratios):.2f}-{max(ratios):.2f}",
                    "-" if a is None else f"{a:.2f}",
                    "-" if a is None else f"{2 * a - self.law.hidden.rate:.2f}",
                    f"{sum(row.passed for row in rows)}/{len(rows)}",
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths))
            )
            for line in lines
        ]
        rule = "-" * max(map(len, text))
        a = self.exponent
        summary = (
            f"{'passed' if self.passed else 'FAILED'}: largest singular values within"
            f" {100 * self.tolerance:g} % of the proxy's"
            f" (law: η ∝ m^-{self.law.hidden.rate:g}, λ ∝ m^{self.law.hidden.decay:g})"
        )
        if a is not None:
            summary += (
                f"; they grew as sqrt(η/λ)·m^{a:.2f}, which asks for λ ∝ m^"
                f"{2 * a - self.law.hidden.rate:.2f}"
            )
        return "\n".join([text[0], rule, *text[1:], rule, summary])


def spectral_gain_report(
    params: optax.Params,
    reference: optax.Params,
    *,
    law: WidthLaw = laws.law(),
    sublayers: Mapping[str, Sequence[str]] | None = None,
    tolerance: float = 0.15,
    exact_below: int = 512,
    iterations: int = 64,
    axes: axes_lib.Axes = None,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
) -> GainReport:
    """Compares the weights of a run with those of its proxy, which should agree under a width law.

    Both are taken at the end of training, or after the same number of steps. The run was trained with the learning
    rate and the decay that the law derives from those of the proxy.

    Args:
        params: weights of the run.
        reference: weights of the proxy. Or a list of weights of several widths under the same law, the proxy first;
            the exponent is then fitted through all of them.
        law: the law under which the run was trained, `width.law`.
        sublayers: as in `sublayer_gains`.
        tolerance: a row passes if its ratio differs from 1 by at most this, > 0.
        exact_below, iterations: as in `top_singular_values`.
        axes: of all trees, as in `axes.signatures`.
        mesh: as in `top_singular_values`.

    Returns:
        A `GainReport`; print it.

    Raises:
        ValueError: trees that do not describe one model at several widths, a tolerance that is not positive, or
            something that is not a law.
    """
    check("tolerance", tolerance, 0.0, open_low=True)
    check_law(law)
    axes = axes_lib.inferred if axes is None else axes
    roles = ("hidden",) if law.head is None else ("hidden", "head")
    trees = [params, *(reference if isinstance(reference, list | tuple) else [reference])]
    sizes, tops, rms = [], [], []
    for tree in trees:
        sizes.append(
            {path: s for path, s in axes_lib.signatures(axes, tree).items() if s.role in roles}
        )
        if any(s.source in ("guess", "name") for s in sizes[-1].values()):
            raise ValueError("a report needs to know the axes of the parameters: pass axes=...")
        if sizes[-1].keys() != sizes[0].keys():
            odd = sorted(sizes[-1].keys() ^ sizes[0].keys())
            raise ValueError(
                f"{odd[0]!r} is in one of the trees only; compare one model at several widths."
            )
        values, _ = top_singular_values(
            tree, iterations=iterations, exact_below=exact_below, roles=roles, axes=axes, mesh=mesh
        )
        tops.append({path: np.asarray(v, np.float64) for path, v in values.items()})
        weights = by_path(tree)
        rms.append({path: np.asarray(_rms(weights[path], s)) for path, s in sizes[-1].items()})
    rows = []
    for path in sizes[0]:
        fans = np.array([found[path].fan_in for found in sizes], np.float64)
        for name, σ, entries in _slices(path, [t[path] for t in tops], [r[path] for r in rms]):
            rows.append(_matrix_row(name, fans, σ, entries, law.hidden, tolerance))
    for name, patterns in (sublayers or {}).items():
        gains = [sublayer_gains(found, {name: patterns})[name] for found in tops]
        for label, σ, _ in _slices(f"sublayer {name}", gains, gains):
            rows.append(_sublayer_row(label, σ[1], σ[0], tolerance))
    return GainReport(tuple(rows), tolerance, law)


def _rms(w: jax.Array, signature: axes_lib.Signature) -> jax.Array:
    x = jnp.abs(w).astype(accumulator_dtype(w.dtype))
    return jnp.sqrt(jnp.mean(x * x, axis=signature.reduced))


def _geometric(values: Any) -> float:
    return float(np.exp(np.mean(np.log([max(v, 1e-300) for v in values]))))


def _slices(
    path: str, tops: Sequence[np.ndarray], rms: Sequence[np.ndarray]
) -> list[tuple[str, list[float], list[float]]]:
    """(name, σ per tree, RMS per tree) for every slice; for their geometric means where trees differ in depth."""
    if len({t.shape for t in tops}) > 1:
        return [(path, [_geometric(t.flat) for t in tops], [_geometric(r.flat) for r in rms])]
    return [
        (
            path + (f"[{', '.join(map(str, index))}]" if index else ""),
            [float(t[index]) for t in tops],
            [float(r[index]) for r in rms],
        )
        for index in np.ndindex(tops[0].shape)
    ]


def _matrix_row(
    name: str,
    fans: np.ndarray,
    tops: Sequence[float],
    rms: Sequence[float],
    law: Exponents,
    tolerance: float,
) -> GainRow:
    m, ratio, half = float(fans[0] / fans[1]), tops[0] / tops[1], (law.rate + law.decay) / 2
    a = None
    if np.ptp(fans) > 0:
        slope = np.polyfit(np.log(fans), np.log(tops), 1)[0]
        a = float(slope) + half
    return GainRow(
        path=name,
        factor=m,
        proxy=tops[1],
        target=tops[0],
        proxy_rms=rms[1],
        target_rms=rms[0],
        ratio=ratio,
        predicted=m ** (law.spectral - half),
        passed=abs(ratio - 1) <= tolerance,
        exponent=a,
        decay_exponent=None if a is None else 2 * a - law.rate,
    )


def _sublayer_row(name: str, proxy: float, target: float, tolerance: float) -> GainRow:
    ratio = target / proxy
    nothing = dict.fromkeys(
        ("factor", "proxy_rms", "target_rms", "predicted", "exponent", "decay_exponent")
    )
    return GainRow(
        path=name,
        proxy=proxy,
        target=target,
        ratio=ratio,
        passed=abs(ratio - 1) <= tolerance,
        **nothing,
    )
