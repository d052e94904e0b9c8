"""When matrices are measured anew: after which updates, and how many of them at once.

With t the number of completed updates, T matrices and an interval of n steps::

    every        matrix j in updates with (t + 1) mod n = floor(j n / T), evenly spread over the interval
    all_at_once  all matrices in updates with (t + 1) mod n = 0, as the released program does
    once         all matrices in the first update, and never again

In addition, `every` and `all_at_once` measure all matrices in the first update, from the initial weights.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.parameters.arguments import check, nearest

NAMES = ("every", "all_at_once", "once")


class Refresh(NamedTuple):
    """When matrices are measured. Build one with `every`, `all_at_once` or `once`.

    Attributes:
        steps: updates between two measurements of a matrix; None: a matrix is measured once.
        at_once: matrices that are due in the same update; None: all of them.
        start_step: completed updates before the first measurement.
    """

    steps: Any
    at_once: int | None
    start_step: Any

    def due(
        self, total: int, count: jax.Array, requested: bool | jax.Array | None, gradients: bool
    ) -> tuple[jax.Array, jax.Array]:
        """The range [low, high) of matrices that this update measures, int32 scalars.

        Args:
            total: T, the number of matrices.
            count: t, completed updates.
            requested: the extra argument ``refresh`` of ``update``: True for all, False for none, None to decide here.
            gradients: the score is taken from gradients. All matrices are then measured in the same update, because
                gradients of different steps do not compare, and the first update measures nothing.
        """
        zero = jnp.zeros([], jnp.int32)
        if requested is not None:
            return zero, jnp.where(jnp.asarray(requested, bool), total, 0)
        first = (count == self.start_step) & (not gradients)
        if self.steps is None:
            return zero, jnp.where(first, total, 0)
        interval = jnp.asarray(self.steps, jnp.int32)
        phase = (count + 1) % interval
        if self.at_once is None or gradients:
            low, high = zero, jnp.where(phase == 0, total, 0)
        else:
            # Part i is due at the phase floor(i · interval / parts): part 0 where the released program acts.
            parts = -(-total // self.at_once)
            low = -(-phase * parts // interval) * self.at_once
            high = jnp.minimum(-(-(phase + 1) * parts // interval) * self.at_once, total)
        high = jnp.where(count >= self.start_step, high, low)
        return jnp.where(first, 0, low), jnp.where(first, total, high)


def every(
    steps: int | jax.Array = 500, *, at_once: int = 1, start_step: int | jax.Array = 0
) -> Refresh:
    """Measures every matrix once per `steps` updates, staggered, so that no update takes much longer than the others.

    Scores of gradients are the exception: they are compared within one update, so all matrices are measured in it.

    Args:
        steps: updates between two measurements of a matrix, >= 1; may be traced.
        at_once: matrices that are measured in the same update; a Python number >= 1. Set it to the number of devices
            that share them: that many take the time of one.
        start_step: completed updates before which all multipliers are 1 and nothing is measured, >= 0; may be traced.

    Raises:
        ValueError: a number out of its range.
    """
    check("steps", steps, 1)
    check("at_once", at_once, 1)
    check("start_step", start_step, 0)
    return Refresh(steps, at_once, start_step)


def all_at_once(steps: int | jax.Array = 500, *, start_step: int | jax.Array = 0) -> Refresh:
    """Measures all matrices in the same update, once per `steps` updates, as the released program does.

    Arguments and errors as in `every`.
    """
    check("steps", steps, 1)
    check("start_step", start_step, 0)
    return Refresh(steps, None, start_step)


def once(*, start_step: int | jax.Array = 0) -> Refresh:
    """Measures all matrices in the first update only.

    For use with the extra argument ``refresh`` of ``update``, or with `spectral_refresh` on the host. Scores of
    gradients are measured only when ``refresh`` asks for it.

    Args:
        start_step: as in `every`.

    Raises:
        ValueError: a negative number.
    """
    check("start_step", start_step, 0)
    return Refresh(None, None, start_step)


def check_refresh(refresh: object, gradients: bool) -> None:
    """Raises ValueError unless `refresh` is a `Refresh` that suits the score; names the nearest valid one."""
    if not isinstance(refresh, Refresh):
        name = getattr(refresh, "__name__", refresh)
        meant = f"every({refresh})" if isinstance(refresh, int) else f"{nearest(name, NAMES)}()"
        raise ValueError(
            f"refresh={refresh!r} is not a Refresh; allowed: {', '.join(f'spectra.{n}()' for n in NAMES)} "
            f"(did you mean optax_decay.spectra.{meant}?)."
        )
    if gradients and refresh.at_once is not None and refresh.at_once != 1:
        raise ValueError(
            f"at_once={refresh.at_once} would be ignored: scores of gradients are measured for all matrices in the "
            "same update; the nearest valid choice is spectra.all_at_once(steps)."
        )
