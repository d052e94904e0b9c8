"""Bias correction against exact arithmetic, at the ends of its range, and traced."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_decay.product.running_means import power, share_seen


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("memory", [0.1, 0.9, 0.999, 0.999999])
def test_agrees_with_exact_arithmetic(memory, steps):
    exact = fractions.Fraction(memory) ** steps
    # 1 - β and t log β are rounded once each, and expm1 and exp to a few units in the last place; an error of t log β
    # is multiplied by t |log β|.
    lost = 1 + steps * -np.log(memory)
    for dtype, eps in ((jnp.float32, 2.0**-24), (jnp.float64, 2.0**-53)):
        with jax.enable_x64(dtype == jnp.float64):
            count = jnp.int32(steps)
            got = float(share_seen(memory, count, dtype))
            assert got == pytest.approx(float(1 - exact), rel=8 * eps)
            assert float(power(memory, count, dtype)) == pytest.approx(
                float(exact), rel=8 * eps * lost, abs=1e-37
            )
    naive = abs(float(np.float32(1) - np.float32(memory) ** np.float32(1)) / (1 - memory) - 1)
    assert memory < 0.99 or naive > 1e-6  # what the plain formula loses


def test_the_ends_of_the_range():
    for steps, expected in ((0, 0.0), (1, 1.0), (5, 1.0)):
        assert float(share_seen(0.0, jnp.int32(steps), jnp.float32)) == expected
        assert float(power(0.0, jnp.int32(steps), jnp.float32)) == 1 - expected
        assert float(share_seen(1.0, jnp.int32(steps), jnp.float32)) == 0.0
    assert float(share_seen(0.9, jnp.int32(0), jnp.float32)) == 0.0


def test_traced_numbers_give_the_same():
    traced = jax.jit(lambda memory, count: share_seen(memory, count, jnp.float32))
    # A traced β is a float32, so that 1 - β has the rounding of β.
    np.testing.assert_allclose(
        traced(0.99, 3), share_seen(0.99, jnp.int32(3), jnp.float32), rtol=100 * 2.0**-24
    )
