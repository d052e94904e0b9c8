"""The polynomials with which ROOT orthogonalises matrices, chosen by shape.

ROOT's AdaNewton runs K steps of ``X ← a X + (b A + c A²) X`` with ``A = X Xᵀ``. The coefficients (a, b, c) depend on
the shape of X. The released table has four entries; here every shape has one. Each choice is a value that carries its
numbers, K among them::

    published(steps)        the released triple where the shape has one, else a fitted one      (the default)
    guarded(steps)          the same, with a bounded triple for 2048 x 2048
    fitted(steps)           fitted to every shape by `newton_fit.fit_coefficients`
    released(steps)         the released triple where the shape has one, else Muon's: the rule of the released code
    muon(steps)             (3.4445, -4.7750, 2.0315) for every shape and step
    dion(steps)             five different steps, the preset of that name in ``optax.contrib.muon``
    polar_express(steps)    eight different steps, optimal for the worst singular value (arXiv 2505.16932)
    triple(abc, steps)      one triple of your own for every shape and step
    per_step(table)         one triple of your own for each step
    by_shape(table, steps)  your own for some shapes, fitted for the others

`dion` and `polar_express` change from step to step and are closer to orthogonal than any single triple at equal cost.

**Differs from the released code.** The published triple for 2048 x 2048 is not bounded: it maps a singular value of
0.559 to 3.31 in five steps, and the momenta of real runs have such values. `guarded` replaces it by a fit to the same
mixture that stays below 1.23. Published triples were made for five steps; for any other number of steps `published` and
`guarded` use a fit for that number. The released code falls back to Muon's triple with a warning.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from optax_decay.optimizers.newton_fit import POLAR_EXPRESS, STARTS, fit_coefficients
from optax_decay.parameters.arguments import check, one_of

NAMES = ("published", "guarded", "fitted", "released", "muon", "dion", "polar_express")

Triple = Sequence[float]
Shape = tuple[int, int]

MUON = STARTS[0]
PUBLISHED = {
    (2048, 2048): (3.4916, -4.8224, 2.1095),
    (2048, 3072): (3.4509, -4.5790, 1.9325),
    (2048, 8192): (2.9794, -3.6674, 1.6207),
    (2048, 16384): (3.1943, -3.8221, 1.5322),
}
# Fitted with the exponent 0.850, at which the fit without its penalty agrees with the published triple.
GUARDED_SQUARE = (3.4714, -4.7070, 2.0255)
DION = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# The results of `fit_coefficients(shape)` for shapes of LLaMA, GPT-2 and ViT models. Other shapes are fitted when ROOT
# first meets them.
FITTED = {
    (128, 128): (3.0765, -3.3617, 1.2675),
    (128, 352): (2.9268, -3.0993, 1.1703),
    (128, 512): (2.9262, -3.0856, 1.1548),
    (192, 192): (3.1390, -3.6067, 1.4278),
    (192, 768): (3.0489, -3.4743, 1.4027),
    (256, 256): (3.2057, -3.8388, 1.5647),
    (256, 688): (2.7211, -3.2720, 1.5396),
    (256, 1024): (2.7237, -3.2802, 1.5474),
    (384, 384): (3.0397, -3.9608, 1.8566),
    (384, 1152): (2.8433, -3.5077, 1.6404),
    (384, 1536): (2.8506, -3.5475, 1.6760),
    (512, 512): (3.0706, -4.0171, 1.8733),
    (512, 1376): (2.9251, -3.3373, 1.3765),
    (512, 1536): (2.9252, -3.3272, 1.3662),
    (512, 2048): (2.9253, -3.3204, 1.3598),
    (640, 640): (3.1211, -4.0907, 1.8826),
    (640, 2560): (2.9984, -3.4250, 1.3817),
    (768, 768): (3.1686, -4.1587, 1.8895),
    (768, 2048): (3.0569, -3.5216, 1.4115),
    (768, 2304): (3.0594, -3.5344, 1.4197),
    (768, 3072): (3.0578, -3.5339, 1.4205),
    (1024, 1024): (3.2434, -4.2723, 1.9059),
    (1024, 2736): (3.1487, -3.7196, 1.4962),
    (1024, 3072): (3.1526, -3.7413, 1.5105),
    (1024, 4096): (3.1469, -3.7194, 1.4964),
    (1280, 1280): (3.2959, -4.3615, 1.9266),
    (1280, 3840): (3.2197, -3.9134, 1.5940),
    (1280, 5120): (3.2093, -3.8502, 1.5482),
    (1600, 1600): (3.3499, -4.4866, 1.9774),
    (1600, 4800): (3.2756, -4.0449, 1.6520),
    (1600, 6400): (3.2658, -3.9464, 1.5748),
    (2048, 2048): (3.3880, -4.4807, 1.9147),
    (2048, 3072): (3.3454, -4.4048, 1.8975),
    (2048, 5461): (3.3023, -3.8772, 1.4857),
    (2048, 8192): (3.3229, -4.0142, 1.5759),
    (2048, 16384): (3.2636, -3.6321, 1.3169),
    (2560, 2560): (3.4461, -4.7289, 2.0712),
    (2560, 6848): (3.3435, -3.8506, 1.4275),
    (2560, 10240): (3.3523, -3.9716, 1.5136),
    (4096, 4096): (3.5334, -5.0877, 2.2814),
    (4096, 11008): (3.4106, -3.9659, 1.4577),
    (4096, 14336): (3.3984, -3.7621, 1.3113),
    (4096, 16384): (3.3992, -3.7505, 1.3013),
    (5120, 5120): (3.5639, -5.0939, 2.2463),
    (5120, 13824): (3.4504, -4.1048, 1.5289),
    (8192, 8192): (3.6246, -5.1396, 2.2069),
}


class Coefficients(NamedTuple):
    """Coefficients (a, b, c) of every step, for matrices of every shape. Build one with the functions of this module.

    Attributes:
        name: the function that built it.
        of_sides: (smaller side, larger side) to a float64 array [K, 3].
    """

    name: str
    of_sides: Callable[[Shape], np.ndarray]

    def for_shape(self, shape: Shape) -> np.ndarray:
        """The coefficients of every step, float64 [K, 3], for matrices of this shape in either orientation."""
        return self.of_sides((min(shape), max(shape)))


def published(steps: int = 5) -> Coefficients:
    """The released triple where the shape has one and `steps` is 5, else a triple fitted to the shape.

    Args:
        steps: K, a Python int in [1, 20].

    Raises:
        ValueError: a number of steps that is traced, no int, or out of its range.

    >>> published().for_shape((8192, 2048))[0]
    array([ 2.9794, -3.6674,  1.6207])
    """
    return _from_table("published", PUBLISHED, steps)


def guarded(steps: int = 5) -> Coefficients:
    """As `published`, with a bounded triple for 2048 x 2048."""
    return _from_table("guarded", {**PUBLISHED, (2048, 2048): GUARDED_SQUARE}, steps)


def fitted(steps: int = 5) -> Coefficients:
    """A triple fitted to every shape by `newton_fit.fit_coefficients`; arguments and errors as `published`."""
    return _from_table("fitted", {}, steps)


def released(steps: int = 5) -> Coefficients:
    """The released triple where the shape has one, else Muon's; arguments and errors as `published`."""
    check_steps(steps)
    return Coefficients("released", lambda sides: _repeated(PUBLISHED.get(sides, MUON), steps))


def muon(steps: int = 5) -> Coefficients:
    """Muon's triple for every shape and step; arguments and errors as `published`."""
    check_steps(steps)
    return Coefficients("muon", lambda sides: _repeated(MUON, steps))


def dion(steps: int = 5) -> Coefficients:
    """The first `steps` of Dion's five; further steps repeat the last one. Errors as `published`."""
    check_steps(steps)
    return Coefficients("dion", lambda sides: _first(DION, steps))


def polar_express(steps: int = 5) -> Coefficients:
    """The first `steps` of the eight of Polar Express; further steps repeat the last one. Errors as `published`."""
    check_steps(steps)
    return Coefficients("polar_express", lambda sides: _first(POLAR_EXPRESS, steps))


def triple(coefficients: Triple, steps: int = 5) -> Coefficients:
    """One triple (a, b, c) for every shape and step.

    Args:
        coefficients: (a, b, c), dimensionless.
        steps: K, a Python int in [1, 20].

    Raises:
        ValueError: something other than three numbers; steps as in `published`.
    """
    check_steps(steps)
    numbers = _numbers(coefficients)
    if numbers.shape != (3,):
        raise ValueError(
            f"coefficients of shape {numbers.shape} are no triple (a, b, c); for one triple per step use per_step()."
        )
    return Coefficients("triple", lambda sides: _repeated(numbers, steps))


def per_step(coefficients: Sequence[Triple]) -> Coefficients:
    """One triple (a, b, c) for each step, the same for every shape.

    Args:
        coefficients: [K, 3], dimensionless.

    Raises:
        ValueError: another shape.
    """
    table = _numbers(coefficients)
    if table.ndim != 2 or table.shape[1] != 3 or not len(table):
        raise ValueError(
            f"coefficients of shape {table.shape}: allowed is one triple (a, b, c) per step, [K, 3]; for one triple "
            "that is used in all steps use triple()."
        )
    return Coefficients("per_step", lambda sides: table)


def by_shape(table: Mapping[Shape, Triple | Sequence[Triple]], steps: int = 5) -> Coefficients:
    """Coefficients of your own for some shapes, and fitted ones for all others.

    Args:
        table: (smaller side, larger side) to one triple, used `steps` times, or to one triple per step, [K, 3].
        steps: K of single triples, a Python int in [1, 20].

    Raises:
        ValueError: keys that are no such pair, values of another shape; steps as in `published`.

    >>> by_shape({(3, 4): (1.5, -0.5, 0.0)}, steps=1).for_shape((4, 3))
    array([[ 1.5, -0.5,  0. ]])
    """
    check_steps(steps)
    found: dict[Shape, np.ndarray] = {}
    for sides, value in table.items():
        if len(sides) != 2 or sides[0] > sides[1]:
            raise ValueError(
                f"the table has the key {sides!r}; allowed are pairs (smaller side, larger side)."
            )
        one = _numbers(value).ndim == 1
        made = triple(value, steps) if one else per_step(value)  # type: ignore[arg-type]
        found[sides[0], sides[1]] = made.of_sides((sides[0], sides[1]))

    def of_sides(sides: Shape) -> np.ndarray:
        return found[sides] if sides in found else _repeated(fitted_triple(sides, steps), steps)

    return Coefficients("by_shape", of_sides)


def fitted_triple(sides: Shape, steps: int = 5) -> Triple:
    """The fitted triple of a shape (smaller side first) for K steps, from the table of this file or fitted once."""
    if steps == 5 and sides in FITTED:
        return FITTED[sides]
    return _fit(sides, steps)


@functools.cache
def _fit(sides: Shape, steps: int) -> tuple[float, ...]:
    return tuple(fit_coefficients(sides, steps=steps).tolist())


def check_steps(steps: Any) -> None:
    """Raises ValueError unless `steps` is a Python int in [1, 20]."""
    if isinstance(steps, bool | jax.core.Tracer) or not isinstance(steps, int):
        raise ValueError(
            f"steps={steps!r} must be a Python int in [1, 20], because it decides which program is compiled."
        )
    check("steps", steps, 1, 20)


def check_coefficients(coefficients: Any) -> None:
    """Raises ValueError unless `coefficients` is one of this module's values; names the nearest one."""
    if isinstance(coefficients, Coefficients):
        return
    if isinstance(coefficients, str):
        one_of("coefficients", coefficients, NAMES)
    raise ValueError(
        f"coefficients={coefficients!r} is not a value of optax_decay.newton: pass "
        f"{coefficients if isinstance(coefficients, str) else 'published'}(), polar_express(steps=8), "
        "triple((a, b, c)) or another of its functions."
    )


def _from_table(name: str, table: Mapping[Shape, Triple], steps: int) -> Coefficients:
    """Triples of a table made for five steps; fitted ones where it has none."""
    check_steps(steps)

    def of_sides(sides: Shape) -> np.ndarray:
        known = table.get(sides) if steps == 5 else None
        return _repeated(fitted_triple(sides, steps) if known is None else known, steps)

    return Coefficients(name, of_sides)


def _numbers(coefficients: Any) -> np.ndarray:
    if isinstance(coefficients, jax.core.Tracer):
        raise ValueError("coefficients must be concrete numbers, not traced ones.")
    return np.asarray(coefficients, np.float64)


def _repeated(abc: Any, steps: int) -> np.ndarray:
    return np.tile(np.asarray(abc, np.float64), (steps, 1))


def _first(table: Sequence[Triple], steps: int) -> np.ndarray:
    """The first `steps` rows of a table, whose last row may be repeated."""
    return np.asarray(table)[np.minimum(np.arange(steps), len(table) - 1)]
