"""Exact spectra on the host while the device trains on.

A sweep of all matrices of a large model takes seconds to minutes of a CPU and nothing of the accelerator but one copy
of the measured weights. The scores are then a few steps old when they arrive, which moves them less than 50 steps of
training do (at 50 steps: 1 % of the decay on average)::

    tx = optax.chain(optax.scale_by_adam(), spectral_alpha_decay(0.1, axes=AXES, refresh_every=None), ...)
    refresh = spectral_refresh(axes=AXES)           # the same options as the decay
    pending = None
    for step, batch in enumerate(data):
        if step % 500 == 499:
            pending = refresh.start(opt_state, params)
        if pending is not None and pending.done():
            opt_state, pending = refresh.finish(opt_state, pending), None
        params, opt_state = train_step(params, opt_state, batch)

or, blocking, ``opt_state = refresh(opt_state, params)``. Options that say where matrices live (partition, mesh,
product_dtype) have no meaning here.
"""

import concurrent.futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.paths import path_string
from optax_decay.spectral import spectra
from optax_decay.spectral.memory import SpectralAlphaState, make_map, renew
from optax_decay.spectral.multiplier import leaves_of
from optax_decay.spectral.options import GRADIENT_METRICS, Options, check_options
from optax_decay.spectral.selection import Leaf
from optax_decay.spectral.sweep import Swept


class SpectralRefresh:
    """See `spectral_refresh`."""

    def __init__(self, options: Options, axes: axes_lib.Axes) -> None:
        if options.metric in GRADIENT_METRICS:
            raise ValueError(
                f"metric={options.metric!r} needs gradients, which only the training step has; use refresh_every=..."
            )
        self._options = options
        self._axes = axes
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "spectral-refresh")

    def __call__(self, opt_state: Any, params: Any) -> Any:
        """The optimizer state with every score measured from `params` now."""
        return self.finish(opt_state, self.start(opt_state, params))

    def start(self, opt_state: Any, params: Any) -> concurrent.futures.Future:
        """Copies the measured matrices to the host and begins; the weights may be donated afterwards.

        Raises:
            ValueError: no `SpectralAlphaState`, or several, in `opt_state`; weights on other hosts.
        """
        state = _find(opt_state)
        by_path = {
            path_string(key): leaf for key, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        }
        signatures = axes_lib.signatures(self._axes, params)
        decayed = {path: s for path, s in signatures.items() if path in state.metric}
        leaves = leaves_of(self._options, {path: by_path[path] for path in decayed}, decayed)
        if [leaf.path for leaf in leaves] != sorted(state.metric, key=list(decayed).index):
            raise ValueError(
                f"the state measures {sorted(state.metric)}, these options {[leaf.path for leaf in leaves]}: give "
                "spectral_refresh the options and axes of the decay."
            )
        copies = {}
        for leaf in leaves:
            array = by_path[leaf.path]
            if not getattr(array, "is_fully_addressable", True):
                raise ValueError(
                    f"{leaf.path!r} has shards on other hosts; refresh in the training step instead."
                )
            copies[leaf.path] = np.array(array)
        return self._pool.submit(self._measure, leaves, copies)

    def finish(self, opt_state: Any, pending: concurrent.futures.Future) -> Any:
        """Waits, and puts the scores and the multipliers that follow from them into `opt_state`."""
        leaves, found = pending.result()
        old = _find(opt_state)
        new = renew(old, found, make_map(self._options, leaves))
        new = jax.tree.map(lambda n, o: jax.device_put(n, o.sharding), new, old)
        return jax.tree.map(
            lambda s: new if isinstance(s, SpectralAlphaState) else s,
            opt_state,
            is_leaf=lambda s: isinstance(s, SpectralAlphaState),
        )

    def _measure(self, leaves: list[Leaf], copies: dict[str, Any]) -> tuple[list[Leaf], Swept]:
        rows = []
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            for leaf in leaves:
                stack = np.moveaxis(copies[leaf.path], leaf.slice_axes, range(len(leaf.slice_axes)))
                stack = stack.reshape(-1, *stack.shape[len(leaf.slice_axes) :])
                for flat in leaf.chosen:
                    rows.append(_one(stack[flat], leaf, self._options))
            columns = [jnp.asarray(np.stack(column)) for column in zip(*rows)]
            return leaves, Swept(jnp.ones(len(rows), bool), *columns)


def _one(x: np.ndarray, leaf: Leaf, options: Options) -> spectra.Measurement:
    rest = [i for i in range(len(leaf.shape)) if i not in leaf.slice_axes]
    order = leaf.pooled_axes + leaf.signature.inputs + leaf.signature.outputs
    x = np.transpose(x, [rest.index(i) for i in order])
    x = x.reshape((leaf.pooled, *leaf.sides) if leaf.pooled_axes else leaf.sides)
    names = ("metric", "fit", "xmin_pos", "filter_zeros")
    return jax.device_get(
        _measure_jit(jnp.asarray(x), **{name: getattr(options, name) for name in names})
    )


_measure_jit = jax.jit(
    spectra.measure, static_argnames=("metric", "fit", "xmin_pos", "filter_zeros")
)


def _find(opt_state: Any) -> SpectralAlphaState:
    is_ours = lambda s: isinstance(s, SpectralAlphaState)
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(s)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer state holds {len(found)} spectral multipliers; spectral_refresh needs exactly one."
        )
    return found[0]


def spectral_refresh(*, axes: axes_lib.Axes = None, **options: Any) -> SpectralRefresh:
    """A host-side refresh for the `SpectralAlphaState` in an optimizer state.

    Args:
        axes: as given to the decay.
        options: as given to `spectral_alpha`.

    Returns:
        An object with ``start(opt_state, params) -> future``, ``finish(opt_state, future) -> opt_state``, and, called
        with both, the two in one. It measures with ``method="auto"`` on the CPU, that is exactly.

    Raises:
        ValueError: as in `spectral_alpha`; a gradient metric.
    """
    return SpectralRefresh(check_options(Options(**options)), axes)
