"""The arguments of `spectral_alpha` as one checked value, for everything that has to agree on them."""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from optax_decay.parameters.arguments import check
from optax_decay.spectral import spectra
from optax_decay.spectral.assignment import ASSIGNMENTS
from optax_decay.spectral.selection import Select

GRADIENT_METRICS = ("gradnorm", "gradnorm_d_weightnorm")
SCHEDULES = ("staggered", "all")


class Options(NamedTuple):
    """The arguments of `spectral_alpha`, by the same names."""

    metric: str = "alpha"
    assignment: str = "linear"
    min_ratio: Any = 2 / 3
    max_ratio: Any = 3.0
    refresh_every: Any = 500
    schedule: str = "staggered"
    at_once: int = 1
    select: Select = "hidden"
    exclude: tuple[str, ...] = ()
    min_eigenvalues: int = 50
    method: str = "auto"
    fit: str = "median"
    xmin_pos: float = 2.0
    filter_zeros: bool = False
    sharpness: Any = 4.0
    aspect_correction: bool = False
    preserve_mean: bool = False
    quantile_clip: Any = 0.0
    start_step: Any = 0
    partition: Any = None
    mesh: Any = None
    product_dtype: Any = jnp.bfloat16

    @property
    def spectral_metric(self) -> str | None:
        """The metric that the sweep measures; None where gradients are all that is needed."""
        if self.metric == "gradnorm":
            return None
        return "spectral_norm" if self.metric in GRADIENT_METRICS else self.metric


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{name}={value!r} is not known; allowed: {', '.join(allowed)} (did you mean {near!r}?)."
        )


def check_options(options: Options) -> Options:
    """The options, with `exclude` as a tuple; ValueError for names that do not exist and numbers out of range."""
    _one_of("metric", options.metric, spectra.METRICS + GRADIENT_METRICS)
    _one_of("assignment", options.assignment, ASSIGNMENTS)
    _one_of("schedule", options.schedule, SCHEDULES)
    if isinstance(options.select, str):
        _one_of("select", options.select, ("hidden", "reference"))
    measured = options.spectral_metric or "fnorm"
    spectra.check(measured, options.method, options.fit, options.xmin_pos, options.filter_zeros)
    check("min_ratio", options.min_ratio, 0.0)
    check("max_ratio", options.max_ratio, 0.0)
    if options.refresh_every is not None:
        check("refresh_every", options.refresh_every, 1)
    check("at_once", options.at_once, 1)
    check("min_eigenvalues", options.min_eigenvalues, 1)
    check("sharpness", options.sharpness, 0.0, open_low=True)
    check("quantile_clip", options.quantile_clip, 0.0, 0.5, open_high=True)
    check("start_step", options.start_step, 0)
    if options.aspect_correction and options.metric != "alpha":
        raise ValueError(
            f"aspect_correction divides exponents; it needs metric='alpha', not {options.metric!r}."
        )
    exclude = options.exclude
    return options._replace(exclude=(exclude,) if isinstance(exclude, str) else tuple(exclude))
