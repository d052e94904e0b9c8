"""Which polynomial each matrix shape is orthogonalised with.

ROOT's AdaNewton runs K steps of ``X ← a X + (b A + c A²) X``, ``A = X Xᵀ``, with (a, b, c) looked up by shape. The
released table has four entries; here every shape has one::

    "published"      the released triple where the shape has one, else "derived"            (the default)
    "guarded"        the same, with a bounded triple for 2048 x 2048
    "derived"        fitted for every shape by `newton_fit.fit_coefficients`
    "released"       the released triple where the shape has one, else "muon": the released code's rule
    "muon"           (3.4445, -4.7750, 2.0315) for every shape and step
    "dion"           five different steps, the preset of that name in ``optax.contrib.muon``
    "polar_express"  eight different steps, optimal for the worst singular value (arXiv 2505.16932)

The last two change from step to step and are closer to orthogonal than any single triple at equal cost.

**Differs from the released code.** The published triple for 2048 x 2048 is not bounded: it turns a singular value of
0.559 into 3.31 after five steps, and real momenta hold such values. "guarded" replaces it by a fit to the same
mixture that stays below 1.23. Published triples were made for five steps; for any other number "published" and
"guarded" use a fit for that number. The released code falls back to Muon's triple with a warning.
"""

import difflib
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from optax_decay.optimizers.newton_fit import POLAR_EXPRESS, STARTS, fit_coefficients

NAMES = ("published", "guarded", "derived", "released", "muon", "dion", "polar_express")

MUON = STARTS[0]
PUBLISHED = {
    (2048, 2048): (3.4916, -4.8224, 2.1095),
    (2048, 3072): (3.4509, -4.5790, 1.9325),
    (2048, 8192): (2.9794, -3.6674, 1.6207),
    (2048, 16384): (3.1943, -3.8221, 1.5322),
}
# Fitted with exponent 0.850, which is where the unguarded fit meets the published triple.
GUARDED_SQUARE = (3.4714, -4.7070, 2.0255)
DION = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# What `fit_coefficients(shape)` returns for shapes of LLaMA, GPT-2 and ViT models; other shapes are fitted when met.
DERIVED = {
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

Coefficients = Any  # what `resolve` accepts


@functools.cache
def _fitted(shape: tuple[int, int], steps: int) -> tuple[float, ...]:
    return tuple(fit_coefficients(shape, steps=steps).tolist())


def derived(shape: tuple[int, int], steps: int = 5) -> tuple[float, ...]:
    """The fitted triple of a shape (smaller side first) for a number of steps; from the table, or fitted once."""
    if steps == 5 and shape in DERIVED:
        return DERIVED[shape]
    return _fitted(shape, steps)


def check_coefficients(coefficients: Coefficients, ns_steps: int) -> None:
    """Raises ValueError for unknown names, misshapen sequences and a number of steps that is not a small int."""
    if isinstance(ns_steps, jax.core.Tracer) or not isinstance(ns_steps, int):
        raise ValueError(
            f"ns_steps={ns_steps!r} must be a Python int: it decides what is compiled. With "
            "optax.inject_hyperparams, name it in static_args."
        )
    if not 1 <= ns_steps <= 20:
        raise ValueError(
            f"ns_steps={ns_steps} is outside [1, 20]; the nearest allowed value is {min(max(ns_steps, 1), 20)}."
        )
    if isinstance(coefficients, jax.core.Tracer):
        raise ValueError(
            "coefficients must be concrete numbers. With optax.inject_hyperparams, name it in static_args."
        )
    if isinstance(coefficients, str) and coefficients not in NAMES:
        near = difflib.get_close_matches(coefficients, NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"coefficients={coefficients!r} is not known; allowed: {', '.join(NAMES)}, numbers, or a mapping from "
            f"shapes to numbers (did you mean {near!r}?)."
        )
    if isinstance(coefficients, Mapping):
        for shape, value in coefficients.items():
            if len(shape) != 2 or shape[0] > shape[1]:
                raise ValueError(
                    f"coefficients has the key {shape!r}; keys are (smaller side, larger side)."
                )
            _as_steps(value, ns_steps)
    elif not isinstance(coefficients, str):
        _as_steps(coefficients, ns_steps)


def _as_steps(value: Any, ns_steps: int) -> np.ndarray:
    numbers = np.asarray(value, np.float64)
    if numbers.shape == (3,):
        return np.tile(numbers, (ns_steps, 1))
    if numbers.ndim != 2 or numbers.shape[1] != 3 or not len(numbers):
        raise ValueError(
            f"coefficients of shape {numbers.shape}: give one triple (a, b, c), or one triple per step, [K, 3]."
        )
    return numbers


def _schedule(steps: tuple[tuple[float, ...], ...], ns_steps: int) -> np.ndarray:
    """The first `ns_steps` of a schedule, whose last step may be repeated."""
    return np.asarray(steps)[np.minimum(np.arange(ns_steps), len(steps) - 1)]


def resolve(coefficients: Coefficients, shape: tuple[int, int], ns_steps: int = 5) -> np.ndarray:
    """The coefficients of every step for matrices of one shape.

    Args:
        coefficients: a name of `NAMES`; one triple (a, b, c); one triple per step [K, 3], which overrides
            `ns_steps`; or a mapping from (smaller side, larger side) to either, in which a missing shape is derived.
        shape: rows and columns, in either order.
        ns_steps: K.

    Returns:
        Float64 array [K, 3].

    Raises:
        ValueError: as `check_coefficients`.
    """
    check_coefficients(coefficients, ns_steps)
    key = (min(shape), max(shape))
    if isinstance(coefficients, Mapping):
        found = coefficients.get(key)
        return _as_steps(derived(key, ns_steps) if found is None else found, ns_steps)
    if not isinstance(coefficients, str):
        return _as_steps(coefficients, ns_steps)
    if coefficients == "polar_express":
        return _schedule(POLAR_EXPRESS, ns_steps)
    if coefficients == "dion":
        return _schedule(DION, ns_steps)
    if coefficients == "released":
        return _as_steps(PUBLISHED.get(key, MUON), ns_steps)
    if coefficients == "muon":
        return _as_steps(MUON, ns_steps)
    if coefficients == "derived" or ns_steps != 5:
        return _as_steps(derived(key, ns_steps), ns_steps)
    table = PUBLISHED
    if coefficients == "guarded":
        table = {**PUBLISHED, (2048, 2048): GUARDED_SQUARE}
    return _as_steps(table.get(key) or derived(key, ns_steps), ns_steps)
