"""The exponent from matrix products: its moments exactly, its error, and that it knows when it is weak."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_decay.spectral import chebyshev
from tests.optax_decay.spectral.test_spectra import power_law, with_spectrum
from tests.references import spectra as reference

N = 160
TAIL = N // 2


def symmetric(rng, values):
    q = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    return (q * values) @ q.T


def gram_of(w, dtype=np.float32):
    w = np.asarray(w, np.float64)
    return jnp.asarray((w @ w.T)[None], dtype)


estimate = jax.jit(
    chebyshev.tail_exponent, static_argnames=("tail", "baby", "giant", "product_dtype")
)


def spectra():
    rng = np.random.default_rng(11)
    gauss = rng.standard_normal((N, 3 * N))
    return {
        "gaussian": gauss,
        "power 2.5": with_spectrum(rng, power_law(N, 2.5), N + 9),
        "power 1.5": with_spectrum(rng, power_law(N, 1.5), N + 9),
        "log-normal": with_spectrum(rng, np.exp(1.5 * rng.standard_normal(N)), N + 9),
        "spiked": gauss + 6 * np.outer(gauss[:, 0], gauss[1]) / np.sqrt(N),
    }


def one_eigenvalue(lam):
    """How much alpha depends on where a single eigenvalue lies: dα = (α-1)² d ln λ, with twice the mean spacing."""
    start = len(lam) // 2
    spacing = np.log(lam[start + 8] / lam[start - 8]) / 16
    return 2 * (reference.exponent(lam, start) - 1) ** 2 * spacing


def test_cayley_maps_eigenvalues_to_tanh_of_half_their_log():
    rng = np.random.default_rng(0)
    lam = np.exp(rng.uniform(-4, 6, 31))
    with jax.enable_x64(True):
        got = np.linalg.eigvalsh(
            chebyshev.cayley(jnp.asarray(symmetric(rng, lam)), jnp.asarray(2.5))
        )
    np.testing.assert_allclose(got, np.sort(np.tanh(np.log(lam / 2.5) / 2)), atol=1e-12)


@pytest.mark.parametrize("baby,giant,most", [(2, 1, 2), (3, 5, 5), (8, 4, 8)])
def test_moments_are_exact(baby, giant, most):
    """Every moment, against cosines of the eigenvalues' angles; zeros beyond the giant steps asked for."""
    rng = np.random.default_rng(1)
    y = rng.uniform(-1, 1, 23)
    count = (giant + 1) * baby
    expected = np.cos(np.outer(np.arange(count + 1), np.arccos(y))).sum(1)
    with jax.enable_x64(True):
        got = jax.jit(chebyshev.moments, static_argnums=(1, 3, 4))(
            jnp.asarray(symmetric(rng, y)), baby, giant, most, jnp.float64
        )
    assert got.shape == ((most + 1) * baby + 1,)
    np.testing.assert_allclose(got[: count + 1], expected, atol=1e-10)
    np.testing.assert_array_equal(got[count + 1 :], 0)


def test_the_integral_is_the_hill_statistic_of_a_smooth_density():
    """Angles at the quantiles of a density whose cosine series ends: nothing is left for smoothing to do."""
    n, k = 4000, 1500
    # density (1 + a cos φ + b cos 2φ)/π, cumulative φ + a sin φ + b sin(2φ)/2
    a, b = 0.5, -0.3
    grid = np.linspace(0, np.pi, 400001)
    cumulative = (grid + a * np.sin(grid) + b * np.sin(2 * grid) / 2) / np.pi
    phi = np.interp((np.arange(n) + 0.5) / n, cumulative, grid)
    z = 2 * np.arctanh(np.cos(phi))
    mu = np.zeros(65)
    mu[:3] = n, n * a / 2, n * b / 2
    with jax.enable_x64(True):
        h, start, density = chebyshev.hill_from_moments(jnp.asarray(mu), 1000, k)
    # Midpoints of n cells stand for the density: the statistic itself deviates by the order of 1/n.
    assert float(h) == pytest.approx(np.mean(z[:k] - z[k - 1]), rel=2 / k)
    assert float(start) == pytest.approx(z[k - 1], abs=1e-4)
    assert float(density) == pytest.approx(10 / (z[k - 6] - z[k + 4]), rel=1e-2)


@pytest.mark.parametrize("product_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", spectra())
def test_estimates(name, product_dtype):
    w = spectra()[name]
    lam = reference.eigenvalues(w)
    found = estimate(gram_of(w), None, tail=TAIL, product_dtype=product_dtype)
    exact = reference.metric(w, "alpha")
    # The statistic's own dependence on single eigenvalues, the tolerance a look accepts, and bfloat16's 0.002.
    allowed = one_eigenvalue(lam) + 0.01 * (exact - 1) + 0.002
    assert abs(float(found.alpha) - exact) < allowed < 0.1 * exact
    assert bool(found.resolved)
    median = np.log(lam[N - TAIL] / lam.mean())
    assert float(found.centre) == pytest.approx(median, abs=3 * 2 * np.pi / 72)
    assert float(found.ratio) == pytest.approx(lam[N - TAIL] / lam[-1], rel=0.35)


def test_the_carried_centre_saves_the_second_look():
    gram = gram_of(spectra()["power 1.5"])
    first = estimate(gram, None, tail=TAIL)
    again = estimate(gram, first.centre, tail=TAIL)
    assert int(first.passes) == 2 and int(again.passes) == 1
    # Both are within the tolerance of a look; the centre moves where the smoothing sits.
    assert float(again.alpha) == pytest.approx(float(first.alpha), rel=0.01)


def test_a_cliff_below_the_median_is_seen_and_resolved_better():
    """A pure power law of exponent 6 starts 0.14 below its median in ln λ, at 1.6 times the resolution of a look."""
    w = with_spectrum(np.random.default_rng(2), power_law(N, 6.0), N + 9)
    exact = reference.metric(w, "alpha")
    gram = gram_of(w)
    found = estimate(gram, None, tail=TAIL, product_dtype=jnp.float32)
    assert int(found.passes) > 1
    y = chebyshev.cayley(gram[0], np.trace(gram[0]) / N / 2)
    mu = chebyshev.moments(y, 8, 8, 8, jnp.float32)
    one_look = 1 + 1 / float(chebyshev.hill_from_moments(mu, 72, TAIL)[0])
    assert abs(one_look - exact) > 3 * abs(float(found.alpha) - exact)
    assert abs(float(found.alpha) - exact) < 0.02 * (exact - 1)


def test_what_cannot_be_resolved_is_reported():
    """A spectrum much narrower than the resolution has an exponent, but not one that these moments can see."""
    rng = np.random.default_rng(3)
    w = with_spectrum(rng, np.linspace(1, 1.01, N), N + 9)
    found = estimate(gram_of(w), None, tail=TAIL, product_dtype=jnp.float32)
    assert not bool(found.resolved)
    assert float(found.error) > chebyshev.FLAT * (float(found.alpha) - 1)


def test_pooled_matrices_add_their_moments():
    rng = np.random.default_rng(4)
    w = np.stack([spectra()["gaussian"], 0.5 * rng.standard_normal((N, 3 * N))])
    lam = np.sort(np.linalg.svd(w, compute_uv=False).ravel() ** 2)
    gram = jnp.asarray(w @ w.transpose(0, 2, 1), jnp.float32)
    found = estimate(gram, None, tail=N, product_dtype=jnp.float32)
    exact = reference.exponent(lam, N)
    assert abs(exact - reference.metric(w[0], "alpha")) > 0.05
    assert abs(float(found.alpha) - exact) < one_eigenvalue(lam) + 0.01 * (exact - 1)


def test_only_products_and_one_factorisation():
    """No SVD, no eigenvalues, and one Cholesky factorisation per look, in the traced program."""
    text = str(
        jax.make_jaxpr(lambda g: chebyshev.tail_exponent(g, None, tail=TAIL))(
            jnp.ones((1, N, N), jnp.float32)
        )
    )
    assert len(re.findall(r"= cholesky\b", text)) == 1
    assert not any(word in text for word in ("eigh", "svd", "tridiagonal[", "random_bits"))
    assert "bf16" in text
