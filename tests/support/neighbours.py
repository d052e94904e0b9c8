"""Runs a link of the library and a reference on the toy tree, in both precisions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.support import toy

STEPS = 12
RATES = [0.05 * (1 - 0.06 * t) for t in range(STEPS)]
# As in test_huber_decay: 12 steps of at most 16 roundings of numbers of order one.
FLOAT32 = 12 * 16 * 2.0**-24


def rate(count):
    """The schedule of RATES, in the precision of the run."""
    return 0.05 * (1 - 0.06 * jnp.asarray(count, float))


def between(link):
    return optax.chain(optax.scale_by_adam(), link, optax.scale_by_learning_rate(rate))


def after(link):
    return optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(rate), link)


def before(link):
    return optax.chain(link, optax.scale_by_adam(), optax.scale_by_learning_rate(rate))


def agree(build, expected, *, params=None, gradients=None, extra=None, float32=FLOAT32):
    """The optimizer `build()` ends at the `expected` weights, to 1e-12 in float64 and `float32` in float32.

    `expected` is a function of flat weights and gradients; it sees what the optimizer sees.
    """
    params = toy.flat_params() if params is None else params
    gradients = toy.flat_gradients(STEPS) if gradients is None else gradients
    want = expected(params, gradients)
    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, float32)):
        with jax.enable_x64(dtype == jnp.float64):
            cast = lambda flat, dtype=dtype: toy.nest(
                {n: jnp.asarray(x, dtype) for n, x in flat.items()}
            )
            got, _ = toy.train(build(), cast(params), [cast(g) for g in gradients], extra)
            for path, w in toy.unnest(got).items():
                np.testing.assert_allclose(
                    w, want[path], rtol=tolerance, atol=tolerance, err_msg=path
                )
    return want


def moved(a, b):
    """Largest difference of two flat trees: how much the thing under test matters."""
    return max(float(np.abs(a[n] - b[n]).max()) for n in a)
