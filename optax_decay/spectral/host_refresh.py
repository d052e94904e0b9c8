"""Measuring spectra exactly on the host while the device trains on.

Measuring all matrices of a large model takes a CPU seconds to minutes, and costs the accelerator nothing but one copy
of the measured weights. The scores are a few steps old when they arrive. That changes them less than 50 steps of
training do, which move the decay by 1 % on average::

    scoring = {"axes": AXES, "score": spectra.hill(), "assignment": spectra.linear(2 / 3, 3.0)}
    link = spectral_alpha_decay(0.1, refresh=spectra.once(), **scoring)
    tx = optax.chain(optax.scale_by_adam(), link, ...)
    refresh = spectral_refresh(**scoring)
    pending = None
    for step, batch in enumerate(data):
        if step % 500 == 499:
            pending = refresh.start(opt_state, params)
        if pending is not None and pending.done():
            opt_state, pending = refresh.finish(opt_state, pending), None
        params, opt_state = train_step(params, opt_state, batch)

``opt_state = refresh(opt_state, params)`` does the same and waits for the result.
"""

import concurrent.futures
import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import passes_options_to
from optax_decay.parameters.paths import path_string
from optax_decay.spectral.alpha_decay import Scoring, ScoringOptions, measured_parameters
from optax_decay.spectral.measure import Measurement, measure
from optax_decay.spectral.scores import MatrixProducts, Score
from optax_decay.spectral.selection import MeasuredParameter
from optax_decay.spectral.state import SpectralAlphaState, make_score_map, renew
from optax_decay.spectral.sweep import Measurements

Pending = concurrent.futures.Future


class SpectralRefresh:
    """Measures all matrices of an optimizer state on the host. Build one with `spectral_refresh`."""

    def __init__(self, scoring: Scoring, axes: axes_lib.Axes) -> None:
        self._scoring = scoring
        self._axes = axes
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "spectral-refresh")

    def __call__(self, opt_state: optax.OptState, params: optax.Params) -> Any:
        """The optimizer state with every score measured from `params`."""
        return self.finish(opt_state, self.start(opt_state, params))

    def start(self, opt_state: optax.OptState, params: optax.Params) -> Pending:
        """Copies the measured matrices to the host and begins to measure them; `params` may be donated afterwards.

        Raises:
            ValueError: `opt_state` holds no `SpectralAlphaState`, or several, or one of other matrices; or weights
                have shards on other hosts.
        """
        state = _find(opt_state)
        by_path = {
            path_string(key): leaf for key, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        }
        signatures = axes_lib.signatures(self._axes, params)
        decayed = {path: s for path, s in signatures.items() if path in state.score}
        parameters = measured_parameters(
            self._scoring, None, {path: by_path[path] for path in decayed}, decayed
        )
        paths = [parameter.path for parameter in parameters]
        if paths != sorted(state.score, key=list(decayed).index):
            raise ValueError(
                f"the optimizer state measures {sorted(state.score)}, but these options measure {paths}: give "
                "spectral_refresh the same options and axes as the decay."
            )
        copies = {}
        for path in paths:
            array = by_path[path]
            if not getattr(array, "is_fully_addressable", True):
                raise ValueError(
                    f"{path!r} has shards on other hosts; refresh in the training step instead."
                )
            copies[path] = np.array(array)
        return self._pool.submit(self._measure, parameters, copies)

    def finish(self, opt_state: optax.OptState, pending: Pending) -> Any:
        """Waits for the scores, and returns `opt_state` with them and the multipliers that follow from them."""
        parameters, found = pending.result()
        old = _find(opt_state)
        score_map = make_score_map(self._scoring.score, self._scoring.assignment, parameters)
        new = renew(old, found, score_map)
        new = jax.tree.map(lambda n, o: jax.device_put(n, o.sharding), new, old)
        return jax.tree.map(
            lambda s: new if isinstance(s, SpectralAlphaState) else s,
            opt_state,
            is_leaf=lambda s: isinstance(s, SpectralAlphaState),
        )

    def _measure(
        self, parameters: list[MeasuredParameter], copies: dict[str, np.ndarray]
    ) -> tuple[list[MeasuredParameter], Measurements]:
        rows = []
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            for parameter in parameters:
                axes = parameter.slice_axes
                stack = np.moveaxis(copies[parameter.path], axes, range(len(axes)))
                stack = stack.reshape(-1, *stack.shape[len(axes) :])
                for flat in parameter.chosen:
                    rows.append(_one(stack[flat], parameter, self._scoring.score))
            columns = [jnp.asarray(np.stack(column)) for column in zip(*rows)]
            return parameters, Measurements(jnp.ones(len(rows), bool), *columns)


_measure_jit = jax.jit(measure, static_argnames="score")


def _one(x: np.ndarray, parameter: MeasuredParameter, score: Score) -> Measurement:
    """The measurement of one slice of a parameter."""
    rest = [i for i in range(len(parameter.shape)) if i not in parameter.slice_axes]
    signature = parameter.signature
    order = parameter.pooled_axes + signature.inputs + signature.outputs
    x = np.transpose(x, [rest.index(i) for i in order])
    x = x.reshape(
        (parameter.pooled, *parameter.sides) if parameter.pooled_axes else parameter.sides
    )
    return jax.device_get(_measure_jit(jnp.asarray(x), score=score))


def _find(opt_state: optax.OptState) -> SpectralAlphaState:
    """The one `SpectralAlphaState` of an optimizer state."""
    is_ours = lambda s: isinstance(s, SpectralAlphaState)
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(s)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer state holds {len(found)} spectral multipliers; spectral_refresh needs exactly one."
        )
    return found[0]


@passes_options_to(Scoring)
def spectral_refresh(
    *, axes: axes_lib.Axes = None, **options: Unpack[ScoringOptions]
) -> SpectralRefresh:
    """Measures the matrices of `spectral_alpha` on the host instead of in the training step.

    Args:
        axes: as given to the decay.
        options: score, assignment and select, the same values as given to `spectral_alpha` or `spectral_alpha_decay`.
            A score by `matrix_products` is computed with ``method="auto"``, which is exact on a CPU.

    Returns:
        An object with ``start(opt_state, params) -> future`` and ``finish(opt_state, future) -> opt_state``. Called
        with ``(opt_state, params)`` it does both. It works on optimizer states with exactly one `SpectralAlphaState`.

    Raises:
        ValueError: as in `spectral_alpha`; a score of gradients, which only the training step has.

    >>> import optax_decay
    >>> from optax_decay import spectra
    >>> refresh = optax_decay.spectral_refresh(axes=(("w", "D -> F"),), score=spectra.stable_rank())
    """
    scoring = Scoring(**options)
    score = scoring.score
    if score.needs_gradients:
        raise ValueError(
            f"the score {score.name} needs gradients, which only the training step has; use the argument refresh of "
            "the decay, such as refresh=spectra.all_at_once(500)."
        )
    if isinstance(score.method, MatrixProducts):
        scoring = dataclasses.replace(scoring, score=dataclasses.replace(score, method="auto"))
    return SpectralRefresh(scoring, axes)
