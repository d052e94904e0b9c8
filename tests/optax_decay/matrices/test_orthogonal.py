"""Orthogonal factors and the top singular value, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_decay.matrices import orthogonal


def matrices(rows, columns, scale=1.0):
    rng = np.random.default_rng(rows)
    return (rng.standard_normal((2, rows, columns)) * scale).astype(np.float32)


def polar64(x):
    u, _, vt = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    return u @ vt


@pytest.mark.parametrize("rows,columns", [(7, 12), (12, 7)])
@pytest.mark.parametrize("method", ["svd", "eigh"])
def test_polar(rows, columns, method):
    x = matrices(rows, columns)
    condition = np.max(np.linalg.cond(x.astype(np.float64)))
    # Rounding is amplified by the condition number, through the Gram matrix by its square.
    tolerance = 40 * 2.0**-24 * condition ** (2 if method == "eigh" else 1)
    got = orthogonal.polar(jnp.asarray(x), method=method)
    assert np.max(np.abs(got - polar64(x))) < tolerance < 1e-2


def test_polar_leaves_null_directions_out():
    x = np.outer(np.arange(1.0, 5.0), np.arange(1.0, 7.0)).astype(np.float32)
    got = orthogonal.polar(jnp.asarray(x), method="eigh")
    np.testing.assert_allclose(got, x / np.linalg.norm(x), atol=1e-5)


@pytest.mark.parametrize("rows,columns", [(7, 12), (12, 7)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_newton_schulz_converges_to_the_polar_factor(rows, columns, scale):
    x = matrices(rows, columns, scale)
    got = orthogonal.newton_schulz(jnp.asarray(x), orthogonal.NEWTON_SCHULZ, eps=0.0)
    # Every step ends with 12 roundings of numbers up to one, and the fixed point does not amplify them.
    assert np.max(np.abs(got - polar64(x))) < 100 * 2.0**-24


def test_one_step_is_its_polynomial_of_the_singular_values():
    x = matrices(5, 9)
    a, b, c = orthogonal.MUON[0]
    got = orthogonal.newton_schulz(jnp.asarray(x), orthogonal.MUON[:1])
    for w, y in zip(x.astype(np.float64), np.asarray(got)):
        u, s, vt = np.linalg.svd(w / np.linalg.norm(w), full_matrices=False)
        np.testing.assert_allclose(y, (u * (a * s + b * s**3 + c * s**5)) @ vt, atol=1e-5)


def test_newton_schulz_takes_a_triple_per_step_and_traced_ones():
    x = jnp.asarray(matrices(5, 9))
    table = np.array([[3.0, -4.0, 2.0], [2.0, -1.5, 0.5], [1.875, -1.25, 0.375]])
    both = jax.jit(orthogonal.newton_schulz)(x, jnp.asarray(table, jnp.float32))
    # Only the first step normalises.
    one = orthogonal.newton_schulz(x, table[:1])
    for row in table[1:]:
        one = step(one, row)
    np.testing.assert_allclose(both, one, atol=1e-5)
    assert np.max(np.abs(both - orthogonal.newton_schulz(x, table[::-1]))) > 1e-2


def step(x, row):
    a, b, c = row
    gram = x @ jnp.swapaxes(x, -1, -2)
    return a * x + (b * gram + c * gram @ gram) @ x


def test_newton_schulz_of_zero_and_tiny_matrices():
    assert not np.any(orthogonal.newton_schulz(jnp.zeros((3, 4))))
    tiny = orthogonal.newton_schulz(jnp.asarray(matrices(3, 4, 1e-12)))
    # Far below eps the result stays small, at most 3.4445^5 times |x|/eps: not an orthogonal factor of noise.
    assert 0 < float(jnp.max(jnp.abs(tiny))) < 3.4445**5 * 4e-12 / 1e-7 < 0.03


def test_newton_schulz_dtypes():
    x = jnp.asarray(matrices(5, 9))
    assert orthogonal.newton_schulz(x.astype(jnp.bfloat16)).dtype == jnp.float32
    low = orthogonal.newton_schulz(x, dtype=jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    # 3 to 4 % in relative Frobenius norm is what bfloat16 is known to cost.
    full = orthogonal.newton_schulz(x)
    error = jnp.linalg.norm(low.astype(jnp.float32) - full) / jnp.linalg.norm(full)
    assert 1e-4 < float(error) < 0.1


def test_top_singular_value_from_below_and_exactly():
    x = matrices(8, 13)
    top = np.linalg.svd(x.astype(np.float64), compute_uv=False)[:, 0]
    few, vector = orthogonal.top_singular_value(jnp.asarray(x), iterations=3)
    more, _ = orthogonal.top_singular_value(jnp.asarray(x), vector, iterations=60)
    assert np.all(few < top * (1 + 1e-6)) and np.all(few > 0.7 * top)
    # Carried on for 60 iterations, an error of (σ_2/σ_1)^120 is left: the gap of these matrices is over 5 %.
    np.testing.assert_allclose(more, top, rtol=1e-4)
    exact, same = orthogonal.top_singular_value(jnp.asarray(x), vector, exact_below=9)
    np.testing.assert_allclose(exact, top, rtol=30 * 2.0**-24)
    np.testing.assert_array_equal(same, vector)


def test_top_singular_value_of_zero():
    value, vector = orthogonal.top_singular_value(jnp.zeros((4, 3)))
    assert float(value) == 0
    assert float(jnp.linalg.norm(vector)) == pytest.approx(1, abs=1e-6)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"\[K, 3\]"):
        orthogonal.newton_schulz(jnp.ones((2, 3)), [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="'eigh'"):
        orthogonal.polar(jnp.ones((2, 3)), method="qr")
    with pytest.raises(ValueError, match="iterations=0"):
        orthogonal.top_singular_value(jnp.ones((2, 3)), iterations=0)
