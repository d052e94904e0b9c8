"""Skips steps that would do harm: those with NaN or infinities, and those far above the recent loss or gradient norm.

With g the gradients, n = ‖g‖ their norm and ℓ the loss, a step is skipped when ℓ or n is not finite, or when one of
them exceeds its values on the last W steps that were taken,

    x > mean + σ · deviation        (x of ℓ and of n, each against its own window; once W/2 values are there)

* σ: ``sigma``, in standard deviations; W: ``window``, in steps that were taken.

A skipped step returns -0 everywhere, which leaves every weight bit for bit as it was (+0 would turn -0 into +0). The
whole inner state stays as well: moments, decay, schedules and counters. The host reads nothing back: both outcomes are
computed and one is selected, and the inner transformation gets zeros on a skipped step, so that no decomposition meets
a NaN. The values of a skipped step do not enter the window.

At most ``max_consecutive_spikes`` spikes in a row are skipped; after that the new level is accepted, and the window
starts again with it. NaN and infinities are skipped however many follow each other: read ``state.in_a_row`` and stop.

Reference: the rule is folklore of large runs; window 128 and 6 deviations are the common numbers (the skip-step
optimizers of OLMo-core, github.com/allenai/OLMo-core, and the issue threads there).

**Differs from released code.** The gradient norm is judged beside the loss. The window holds only steps that were
taken, so that a burst of spikes does not raise the limit. The inner state is kept whole, where a gradient scaled by
zero still decays weights and moments. Skipping is bounded, and the bound resets, where ``optax.apply_if_finite`` keeps
counting after it gave up.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_decay.parameters.arguments import check


class SkipOnSpikeState(NamedTuple):
    """State of `skip_on_spike`.

    Attributes:
        inner_state: of the wrapped transformation.
        values: losses of the last W steps that were taken, float32 [W], a ring.
        norms: gradient norms of the same steps, float32 [W].
        taken: steps that entered the window since it began, int32.
        skipped: all steps that were skipped, int32.
        in_a_row: steps skipped since the last one that was taken, int32.
        spikes: those of them with finite values, int32.
    """

    inner_state: Any
    values: jax.Array
    norms: jax.Array
    taken: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array
    spikes: jax.Array


def _spikes(
    x: jax.Array, ring: jax.Array, taken: jax.Array, sigma: jax.typing.ArrayLike
) -> jax.Array:
    """True when x is far above the values in a ring whose first `taken` places are filled."""
    filled = jnp.minimum(taken, ring.size)
    here = jnp.arange(ring.size) < filled
    count = jnp.maximum(filled, 1)
    mean = jnp.sum(jnp.where(here, ring, 0)) / count
    deviation = jnp.sqrt(jnp.sum(jnp.where(here, jnp.square(ring - mean), 0)) / count)
    # Equal values differ by the rounding of their mean.
    rounding = 4 * jnp.finfo(ring.dtype).eps * jnp.abs(mean)
    return (filled >= ring.size // 2) & (x > mean + sigma * deviation + rounding)


def skip_on_spike(
    inner: optax.GradientTransformation,
    *,
    sigma: float = 6.0,
    window: int = 128,
    max_consecutive_spikes: int = 10,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that steps on broken numbers change nothing.

    ``update`` takes the loss as the extra argument ``value``, as optax's line searches do; without it, only the
    gradients are judged. The extra argument ``norm`` replaces the norm of the gradients. All other extra arguments go
    to `inner`. Inside ``shard_map`` pass a loss and a norm that are averaged over the workers, so that all workers skip
    the same steps.

    Args:
        inner: the whole optimizer, clipping included.
        sigma: a value is a spike when it is this many standard deviations above the mean of the window, > 0. With
            ``float("inf")``, only steps with NaN or infinities are skipped.
        window: number of values to compare with, >= 4; a Python int.
        max_consecutive_spikes: finite spikes in a row after which the next value is accepted, >= 1.

    Returns:
        A transformation whose state is a `SkipOnSpikeState`. Leaves of the inner state keep the dtype they are
        initialised with.

    Raises:
        ValueError: a number out of range.

    >>> import optax, optax_decay
    >>> tx = optax_decay.skip_on_spike(optax.adamw(1e-3), sigma=6.0)
    """
    check("sigma", sigma, 0.0, open_low=True)
    check("window", window, 4)
    check("max_consecutive_spikes", max_consecutive_spikes, 1)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> SkipOnSpikeState:
        zero = jnp.zeros([], jnp.int32)
        ring = jnp.zeros([window], jnp.float32)
        # Two rings and four counters, none of which may share a buffer with another: steps donate them.
        return SkipOnSpikeState(
            inner.init(params), ring, ring.copy(), zero, zero.copy(), zero.copy(), zero.copy()
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        norm: jax.typing.ArrayLike | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        norm = jnp.asarray(optax.tree.norm(updates) if norm is None else norm, jnp.float32)
        loss = jnp.zeros([], jnp.float32) if value is None else jnp.asarray(value, jnp.float32)
        broken = ~(jnp.isfinite(norm) & jnp.isfinite(loss))
        high = _spikes(norm, state.norms, state.taken, sigma)
        if value is not None:
            high = high | _spikes(loss, state.values, state.taken, sigma)
        spike = ~broken & high
        level = spike & (state.spikes >= max_consecutive_spikes)
        skip = broken | (spike & ~level)

        def keep(old: jax.Array, new: jax.typing.ArrayLike) -> Any:
            return jnp.where(skip, old, jnp.asarray(new).astype(old.dtype))

        safe = jax.tree.map(lambda g: jnp.where(skip, jnp.zeros_like(g), g), updates)
        more = extra if value is None else {**extra, "value": jnp.where(skip, 0, value)}
        found, inner_state = inner.update(safe, state.inner_state, params, **more)
        found = jax.tree.map(lambda u: jnp.where(skip, -jnp.zeros_like(u), u), found)

        taken = jnp.where(level, 0, state.taken)
        place = jnp.arange(window) == taken % window
        up = optax.safe_increment
        return found, SkipOnSpikeState(
            inner_state=jax.tree.map(keep, state.inner_state, inner_state),
            values=jnp.where(place & ~skip, loss, state.values),
            norms=jnp.where(place & ~skip, norm, state.norms),
            taken=jnp.where(skip, state.taken, up(taken)),
            skipped=jnp.where(skip, up(state.skipped), state.skipped),
            in_a_row=jnp.where(skip, up(state.in_a_row), 0),
            spikes=jnp.where(skip, jnp.where(spike, up(state.spikes), state.spikes), 0),
        )

    return optax.GradientTransformationExtraArgs(init, update)
