"""The inverse as a loop of products is as accurate as a Cholesky factorisation, and TPUs take it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_decay.matrices.inverse import BLOCK, inverse
from optax_decay.spectral import chebyshev


def positive(n, deviation, seed=0):
    """A symmetric matrix whose eigenvalues are the median plus log-normal ones, and its inverse in float64."""
    rng = np.random.default_rng(seed)
    values = np.exp(deviation * rng.standard_normal(n))
    values += np.median(values)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    return (q * values) @ q.T, (q / values) @ q.T


@pytest.mark.parametrize(("n", "deviation"), [(5, 1), (BLOCK, 2), (BLOCK + 1, 3), (300, 4)])
def test_an_inverse_is_as_accurate_as_by_cholesky(as_for_users, n, deviation):
    a, right = positive(n, deviation)
    library = jax.jit(
        lambda a: jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(a), True), jnp.eye(n))
    )
    found, other = (np.asarray(f(jnp.asarray(a, jnp.float32))) for f in (jax.jit(inverse), library))
    # Both have the same bound, n eps times the condition; they round in another order.
    error, usual = (np.linalg.norm(x - right) / np.linalg.norm(right) for x in (found, other))
    assert error < 4 * usual + 1e-6 and usual < 0.05


def test_an_inverse_in_float64_and_of_an_indefinite_matrix():
    a, right = positive(BLOCK + 7, 1)
    with jax.enable_x64(True):
        np.testing.assert_allclose(inverse(jnp.asarray(a)), right, atol=1e-13)
    a[3, 3] = -1
    assert np.isnan(np.asarray(inverse(jnp.asarray(a, jnp.float32)))).all()


def test_tpus_factorise_no_matrix_at_once():
    gram = jax.ShapeDtypeStruct((300, 300), jnp.float32)
    traced = jax.jit(lambda g: chebyshev.cayley(g, jnp.float32(0.5))).trace(gram)
    text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("tpu", "cuda", "cpu")}
    names = {p: "cholesky" in t or "potrf" in t for p, t in text.items()}
    assert names == {"tpu": False, "cuda": True, "cpu": True}
