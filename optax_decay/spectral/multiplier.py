"""The step of `spectral_alpha`: which matrices are due, what is measured of them, and what the state makes of it."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_decay.matrices.whole import inside_shard_map, known_mesh, split_axes
from optax_decay.parameters import axes as axes_lib
from optax_decay.product.per_matrix import Context, PerMatrix, Value
from optax_decay.spectral import spectra
from optax_decay.spectral.memory import SpectralAlphaState, gather, initial_state, make_map, renew
from optax_decay.spectral.options import GRADIENT_METRICS, Options
from optax_decay.spectral.selection import Leaf, choose, specs_by_path
from optax_decay.spectral.sweep import Sweep, Swept, find_place, plan


def spectral_quantity(options: Options) -> PerMatrix:
    """The `PerMatrix` of checked options."""

    def init(params: Mapping[str, Any], signatures: Mapping[str, axes_lib.Signature]) -> Any:
        leaves = leaves_of(options, params, signatures)
        _warn_if_none(options, leaves, signatures)
        return initial_state(leaves, {leaf.path: params[leaf.path].dtype for leaf in leaves})

    def update(context: Context, state: SpectralAlphaState) -> tuple[dict[str, Value], Any]:
        leaves = leaves_of(options, context.params, context.signatures)
        values: dict[str, Value] = dict.fromkeys(context.params, 1.0)
        if not leaves:
            return values, state
        used = {leaf.path: context.params[leaf.path] for leaf in leaves}
        sweep = plan(
            leaves,
            {path: x.dtype for path, x in used.items()},
            find_place(used, leaves, options.mesh),
        )
        asked = context.extra.get("refresh")
        low, high = _due(options, sweep.count, context.count, asked)
        wide = state.mean_ratio.dtype

        def measured(state: SpectralAlphaState) -> SpectralAlphaState:
            centres = gather(sweep.leaves, state.centre, wide)
            found = _measure_all(options, sweep, context, centres, low, high)
            return renew(state, found, make_map(options, sweep.leaves))

        if isinstance(asked, bool):
            state = measured(state) if asked else state
        else:
            state = jax.lax.cond(high > low, measured, lambda state: state, state)
        return {**values, **state.multiplier}, state

    return PerMatrix(init, update)


def leaves_of(
    options: Options, params: Mapping[str, Any], signatures: Mapping[str, axes_lib.Signature]
) -> list[Leaf]:
    """The measured matrices of these parameters (`matrix_selection.choose`), with what is known of their partition."""
    specs = specs_by_path(options.partition)
    shapes = {path: tuple(x.shape) for path, x in params.items()}
    for path, x in params.items():
        spec = specs.get(path, ())
        if isinstance(x, jax.ShapeDtypeStruct):
            continue
        if inside_shard_map():
            sizes = [1] * len(x.shape)
            for name, dimension in split_axes(spec):
                sizes[dimension] *= jax.lax.axis_size(name)
            shapes[path] = tuple(n * k for n, k in zip(x.shape, sizes))
        elif (mesh := known_mesh(x, None)) is not None and (
            jax.sharding.AxisType.Explicit in mesh.axis_types
        ):
            specs[path] = tuple(jax.typeof(x).sharding.spec)
    # The program's size filter does not apply to gradient norms, which have no eigenvalues.
    least = 1 if options.metric == "gradnorm" else options.min_eigenvalues
    return choose(signatures, shapes, specs, options.select, options.exclude, least)


def _due(options: Options, total: int, count: jax.Array, asked: Any) -> tuple[jax.Array, jax.Array]:
    """The matrices [low, high) that this step measures."""
    by_gradient = options.metric in GRADIENT_METRICS
    zero = jnp.zeros([], jnp.int32)
    if asked is not None:
        return zero, jnp.where(jnp.asarray(asked, bool), total, 0)
    first = (count == options.start_step) & (not by_gradient)
    if options.refresh_every is None:
        return zero, jnp.where(first, total, 0)
    every = jnp.asarray(options.refresh_every, jnp.int32)
    phase = (count + 1) % every
    if options.schedule == "all" or by_gradient:
        low, high = zero, jnp.where(phase == 0, total, 0)
    else:
        # Part i is due at the phase floor(i · every / parts): evenly spread, part 0 where the program acts.
        parts = -(-total // options.at_once)
        low = -(-phase * parts // every) * options.at_once
        high = jnp.minimum(-(-(phase + 1) * parts // every) * options.at_once, total)
    high = jnp.where(count >= options.start_step, high, low)
    return jnp.where(first, 0, low), jnp.where(first, total, high)


def _gradient_norms(leaves: Sequence[Leaf], gradients: Mapping[str, Any], dtype: Any) -> jax.Array:
    norms = []
    for leaf in leaves:
        g = gradients.get(leaf.path)
        if g is None:
            norms.append(jnp.full(len(leaf.chosen), jnp.nan, dtype))
            continue
        axes = tuple(i for i in range(g.ndim) if i not in leaf.slice_axes)
        squares = jnp.sum(jnp.square(g.astype(dtype)), axis=axes)
        if inside_shard_map() and (names := tuple(n for n, _ in split_axes(leaf.spec))):
            squares = jax.lax.psum(squares, names)
        norms.append(jnp.sqrt(squares).reshape(-1)[jnp.asarray(leaf.chosen)])
    return jnp.concatenate(norms)


def _measure_all(
    options: Options, sweep: Sweep, context: Context, centres: jax.Array, low: Any, high: Any
) -> Swept:
    wide = centres.dtype

    def measure(w: jax.Array, centre: jax.Array) -> tuple[jax.Array, ...]:
        return spectra.measure(
            w,
            options.spectral_metric or "fnorm",
            method=options.method,
            fit=options.fit,
            xmin_pos=options.xmin_pos,
            filter_zeros=options.filter_zeros,
            centre=centre,
            product_dtype=options.product_dtype,
        )

    if options.metric not in GRADIENT_METRICS:
        return sweep.run(context.params, centres, low, high, measure)
    norms = _gradient_norms(sweep.leaves, context.gradients(), wide)
    if options.metric == "gradnorm_d_weightnorm":
        found = sweep.run(context.params, centres, low, high, measure)
        norms = norms / (found.value + 1e-8)
    finite = jnp.isfinite(norms)
    yes = jnp.ones_like(finite)
    norms = jnp.where(finite, norms, 0)
    return Swept(yes, norms, finite, centres, jnp.zeros_like(norms), yes)


def _warn_if_none(
    options: Options, leaves: Sequence[Leaf], signatures: Mapping[str, axes_lib.Signature]
) -> None:
    if leaves or options.select not in ("hidden", "reference"):
        return
    sizes = [min(s.fan_in, s.fan_out) for s in signatures.values() if s.role == "hidden"]
    if sizes:
        warnings.warn(
            f"no hidden matrix has min_eigenvalues={options.min_eigenvalues} (the largest has {max(sizes)}): every "
            "multiplier stays 1.",
            stacklevel=4,
        )
