"""Spectra: eigenvalues, metrics and exponents against float64, the guards, and where matrices live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_decay import spectra
from tests.references import spectra as reference

EPS32 = 2.0**-24


def random_orthogonal(rng, rows, columns):
    return np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))[0][
        :rows, :columns
    ]


def with_spectrum(rng, lam, columns):
    """A matrix with the given eigenvalues of its Gram matrix."""
    n = len(lam)
    left = np.linalg.qr(rng.standard_normal((n, n)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, n)))[0]
    return (left * np.sqrt(lam)) @ right.T


def power_law(n, alpha):
    return (1 - (np.arange(n) + 0.5) / n) ** (-1 / (alpha - 1))


def bank(n=60, m=91):
    """Spectra with exponents between 1.4 and 6; none square, one of them tall."""
    rng = np.random.default_rng(7)
    gauss = rng.standard_normal((n, m))
    return {
        "gaussian": gauss * 0.02,
        "tall": rng.standard_normal((m, n)) * 0.3,
        "student": rng.standard_t(3, (n, m)),
        "heavy": with_spectrum(rng, power_law(n, 2.0), m),
        "steep": with_spectrum(rng, power_law(n, 6.0), m),
        "spiked": gauss + 2 * np.sqrt(m) * np.outer(gauss[:, 0], gauss[1]) / n,
        "rows": gauss * np.exp(rng.standard_normal((n, 1))),
        "log-normal": with_spectrum(rng, np.exp(1.5 * rng.standard_normal(n)), m),
    }


BANK = bank()


def sensitivity(w, start):
    """How far alpha moves per relative float32 rounding of the Gram matrix: (α-1)² dH, with dH <= dλ/λ at the start."""
    lam = reference.eigenvalues(w)
    alpha = reference.exponent(lam, start)
    return (alpha - 1) ** 2 * lam[-1] / lam[start]


measure = jax.jit(spectra.measure, static_argnames="score")
# The scores of weights, by the names that the reference and the released program give them.
SCORES = {
    "alpha": spectra.hill,
    "alphahat": spectra.alphahat,
    "stable_rank": spectra.stable_rank,
    "entropy": spectra.entropy,
    "spectral_norm": spectra.spectral_norm,
    "fnorm": spectra.frobenius_norm,
}
FITS = {"median": spectra.median(), "goodness-of-fit": spectra.goodness_of_fit()}
FITS["fix-finger"] = spectra.fix_finger()
METHODS = {"matmul": spectra.matrix_products()}


def measured(w, metric="alpha", dtype=jnp.float32, **options):
    return measure(jnp.asarray(w, dtype), score=SCORES[metric](**options))


@pytest.mark.parametrize("method", ["exact", "eigh", "svd"])
@pytest.mark.parametrize("name", BANK)
def test_alpha_is_that_of_float64_singular_values(name, method):
    w = BANK[name].astype(np.float32)
    expected = reference.metric(w, "alpha")
    got = measured(w, "alpha", method=method)
    # Rounding of a sum of 91 products, and of an n = 60 orthogonal reduction: below 60 roundings of the largest value.
    tolerance = 60 * EPS32 * sensitivity(w, 30) + 1e-6
    assert bool(got.stable)
    assert abs(float(got.value) - expected) <= tolerance
    assert tolerance < 2e-3


@pytest.mark.parametrize("metric", ["alphahat", "stable_rank", "entropy", "spectral_norm", "fnorm"])
@pytest.mark.parametrize("name", ["tall", "heavy", "log-normal"])
def test_other_metrics(metric, name):
    w = BANK[name].astype(np.float32)
    expected = reference.metric(w, metric)
    # Norms are sums of squares (91 roundings); alphahat multiplies alpha's error by log10 of the largest eigenvalue.
    tolerance = 100 * EPS32 * (sensitivity(w, 30) if metric == "alphahat" else 1)
    got = measured(w, metric)
    assert bool(got.stable)
    assert float(got.value) == pytest.approx(expected, rel=tolerance)


def test_metrics_differ_from_each_other():
    w = BANK["heavy"]
    values = [reference.metric(w, metric) for metric in SCORES]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 0.01


@pytest.mark.parametrize("fit", ["goodness-of-fit", "fix-finger"])
@pytest.mark.parametrize("name", ["gaussian", "student", "heavy", "spiked", "log-normal"])
def test_scanned_fits(name, fit):
    w = BANK[name].astype(np.float32)
    expected = reference.metric(w, "alpha", fit=fit)
    got = measured(w, "alpha", fit=FITS[fit])
    # The same start must be found; the rest is the error of singular values, squared: 2·60 roundings.
    assert bool(got.stable)
    assert float(got.value) == pytest.approx(expected, rel=120 * EPS32 * (expected + 1))


def test_scanned_fits_are_not_the_median():
    assert any(
        abs(reference.metric(w, "alpha", fit=fit) - reference.metric(w, "alpha")) > 0.1
        for w in BANK.values()
        for fit in ("goodness-of-fit", "fix-finger")
    )


@pytest.mark.parametrize("xmin_pos", [1.5, 3.0, 2.5])
def test_start_of_the_tail(xmin_pos):
    w = BANK["rows"].astype(np.float32)
    expected = reference.metric(w, "alpha", xmin_pos=xmin_pos)
    assert abs(expected - reference.metric(w, "alpha")) > 1e-2
    tolerance = 60 * EPS32 * sensitivity(w, int(60 / xmin_pos))
    assert float(measured(w, "alpha", fit=spectra.median(xmin_pos)).value) == pytest.approx(
        expected, abs=tolerance
    )


@pytest.mark.parametrize("fit", ["median", "goodness-of-fit"])
def test_filter_zeros(fit):
    rng = np.random.default_rng(3)
    lam = np.concatenate([np.full(25, 1e-8), power_law(35, 2.5) * 1e-3])
    w = with_spectrum(rng, lam, 80).astype(np.float32)
    expected = reference.metric(w, "alpha", fit=fit, filter_zeros=True)
    if fit == "median":
        assert abs(expected - reference.metric(w, "alpha")) > 0.02
    got = measured(w, "alpha", fit=FITS[fit], filter_zeros=True)
    assert float(got.value) == pytest.approx(expected, rel=1e-4)
    # Nothing above the threshold: everything is kept.
    small = w * 1e-4
    expected = reference.metric(small, "alpha", filter_zeros=True)
    assert float(measured(small, "alpha", filter_zeros=True).value) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("metric", SCORES)
def test_kernel_positions_are_pooled(metric):
    rng = np.random.default_rng(4)
    w = (rng.standard_normal((6, 11, 17)) * np.arange(1, 7)[:, None, None] * 0.1).astype(np.float32)
    expected = reference.metric(w, metric)
    flat = reference.metric(w.transpose(1, 0, 2).reshape(11, -1), metric)
    assert abs(expected / flat - 1) > 0.01
    assert float(measured(w, metric).value) == pytest.approx(expected, rel=2e-4)


def test_float64():
    with jax.enable_x64(True):
        for metric in SCORES:
            w = BANK["heavy"]
            got = measured(w, metric, dtype=jnp.float64).value
            assert got.dtype == jnp.float64
            # 60 roundings times the sensitivity of at most 1e2, as above.
            assert float(got) == pytest.approx(reference.metric(w, metric), rel=1e-12)


def test_low_precision_weights_are_measured_in_float32():
    w = jnp.asarray(BANK["student"], jnp.bfloat16)
    got = measured(w, dtype=jnp.bfloat16)
    assert got.value.dtype == jnp.float32
    exact = reference.metric(np.asarray(w, np.float64), "alpha")
    assert abs(exact - reference.metric(BANK["student"], "alpha")) > 1e-5
    assert float(got.value) == pytest.approx(
        exact, abs=60 * EPS32 * sensitivity(np.asarray(w, np.float64), 30)
    )


@pytest.mark.parametrize("power", [-60, 50])
def test_scale_does_not_matter(power):
    """Squares of these weights are outside float32; scaling by a power of two must not change one bit of alpha."""
    w = BANK["student"].astype(np.float32)
    scaled = np.ldexp(w, power)
    assert float(measured(scaled).value) == float(measured(w).value)
    for x, factor in ((scaled, 2.0**power), (w, 1)):
        norm = np.sqrt(float(measured(x / factor, "spectral_norm").value))
        assert norm == pytest.approx(np.linalg.norm(w.astype(np.float64), 2), rel=1e-5)


def degenerate():
    rng = np.random.default_rng(0)
    nan = rng.standard_normal((50, 61))
    nan[3, 4] = np.nan
    infinite = np.where(np.isnan(nan), np.inf, nan)
    return {
        "zero": np.zeros((50, 61)),
        "nan": nan,
        "inf": infinite,
        "flat": random_orthogonal(rng, 50, 61),
        "rank": rng.standard_normal((50, 20)) @ rng.standard_normal((20, 61)),
        "one row": rng.standard_normal((1, 61)),
        "two columns": rng.standard_normal((50, 2)),
        "one number": np.ones((1, 1)),
    }


@pytest.mark.parametrize("method", ["exact", "eigh", "svd", "matmul"])
@pytest.mark.parametrize("name", degenerate())
def test_spectra_without_an_exponent_are_flagged(name, method):
    got = measured(degenerate()[name], "alpha", method=METHODS.get(method, method))
    assert not bool(got.stable)
    assert float(got.value) == 0
    assert all(np.isfinite(np.asarray(x)) for x in got)


@pytest.mark.parametrize("metric", SCORES)
def test_other_metrics_of_degenerate_matrices(metric):
    matrices = degenerate()
    for name in ("zero", "nan", "inf"):
        got = measured(matrices[name], metric)
        assert not bool(got.stable) and float(got.value) == 0, name
    if metric in ("stable_rank", "entropy"):
        flat = measured(matrices["flat"], metric)
        assert bool(flat.stable)
        assert float(flat.value) == pytest.approx(
            reference.metric(matrices["flat"], metric), rel=1e-5
        )


@pytest.mark.parametrize("ratio,stable", [(2e-5, True), (5e-6, False)])
def test_the_guard_sits_at_median_over_largest_1e_5(ratio, stable):
    rng = np.random.default_rng(1)
    lam = np.concatenate([np.linspace(0.5, 1, 30) * ratio, np.geomspace(ratio, 1, 31)])
    assert bool(measured(with_spectrum(rng, lam, 70)).stable) is stable


def test_eigenvalues():
    rng = np.random.default_rng(5)
    w = rng.standard_normal((2, 3, 21, 13)).astype(np.float32)
    expected = np.sort(np.linalg.svd(w.astype(np.float64), compute_uv=False) ** 2, axis=-1)
    for method in ("exact", "eigh", "svd"):
        got = spectra.eigenvalues(jnp.asarray(w), method=method)
        assert got.shape == (2, 3, 13)
        # Absolute error in units of the largest eigenvalue: 21 + 13 roundings and bisection to one more.
        assert np.max(np.abs(got - expected) / expected[..., -1:]) < 40 * EPS32
        top = spectra.eigenvalues(jnp.asarray(w), largest=4, method=method)
        np.testing.assert_allclose(top, expected[..., -4:], rtol=40 * EPS32 * 2)


def test_eigenvalues_of_a_matrix_that_decouples():
    """Diagonal matrices have off-diagonals of exactly zero, on which plain bisection divides 0 by 0."""
    lam = np.array([4.0, 0.25, 9.0, 0.0, 1.0, 2.25])
    got = spectra.eigenvalues(jnp.asarray(np.diag(np.sqrt(lam)), jnp.float32))
    np.testing.assert_allclose(got, np.sort(lam), atol=9 * 4 * EPS32)


@pytest.mark.parametrize("aspect", [1.0, 8 / 3])
def test_random_matrices_have_the_exponent_of_marchenko_and_pastur(aspect):
    drawn = reference.marchenko_pastur_alpha(aspect, size=240, draws=8)
    closed = spectra.random_matrix_alpha(240, round(240 * aspect))
    # One draw at this size deviates by 0.014, the mean of eight by 0.005; finite size adds as much (2.143 at 256).
    assert drawn == pytest.approx(closed, abs=0.035)
    assert closed == spectra.random_matrix_alpha(round(240 * aspect), 240)


def test_random_matrix_values():
    values = {(1, 1): 2.122, (3, 8): 2.99, (1, 3): 3.12, (1, 4): 3.45}
    for (rows, columns), value in values.items():
        assert spectra.random_matrix_alpha(rows, columns) == pytest.approx(value, abs=6e-3)
    assert spectra.random_matrix_alpha(1, 1, 4.0) < 2.0


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: spectra.measure(jnp.ones((3, 4)), "alpha_hat"), ["alphahat"]),
        (lambda: spectra.measure(jnp.ones((3, 4)), spectra.gradient_norm()), ["gradient_norm"]),
        (lambda: spectra.hill(method="lanczos"), ["exact"]),
        (lambda: spectra.hill(fit="means"), ["median"]),
        (lambda: spectra.alphahat(fit=spectra.fix_finger), ["spectra.fix_finger()"]),
        (lambda: spectra.median(1.0), ["1.0", "(1, inf)"]),
        (lambda: spectra.entropy(method=spectra.matrix_products()), ["exact"]),
        (
            lambda: spectra.hill(spectra.fix_finger(), method=spectra.matrix_products()),
            ["exact"],
        ),
        (lambda: spectra.hill(filter_zeros=True, method=spectra.matrix_products()), ["exact"]),
    ],
)
def test_arguments_are_checked(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words)


def test_methods_compute_what_they_are_named_after():
    """The traced programs differ; `everywhere=False` is what `auto` does for large matrices, with another dtype."""
    small, large = jnp.ones((30, 40)), jnp.ones((513, 520))

    def text(w, **options):
        return str(jax.make_jaxpr(lambda w: spectra.measure(w, spectra.hill(**options)))(w))

    assert "tridiagonal[" in text(small, method="exact") and "svd[" in text(small, method="svd")
    products = text(small, method=spectra.matrix_products())
    assert "tridiagonal[" not in products and "bf16" in products
    in_single = text(small, method=spectra.matrix_products(jnp.float32))
    assert "bf16" not in in_single and "cholesky" in in_single
    where_fast = spectra.matrix_products(jnp.float32, everywhere=False)
    assert text(small, method=where_fast) == text(small)
    assert "bf16" in text(large) and "bf16" not in text(large, method=where_fast)
    assert "cholesky" in text(large, method=where_fast)


def test_eigenvalue_arguments_are_checked():
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        spectra.eigenvalues(jnp.ones((3, 4)), largest=4)
    with pytest.raises(ValueError, match="'svd'"):
        spectra.eigenvalues(jnp.ones((3, 4)), method="matmul")
    with pytest.raises(ValueError, match="no matrices"):
        spectra.eigenvalues(jnp.ones(3), largest=1)
