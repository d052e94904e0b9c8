"""The quantile that counts instead of sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_decay.matrices.quantile import exact_quantile


def _awkward(name: str, rng: np.random.Generator) -> np.ndarray:
    normal = rng.normal(size=(7, 53)).astype(np.float32)
    tiny = np.finfo(np.float32).smallest_subnormal
    return {
        "normal": normal,
        "magnitudes": np.abs(normal),
        "ties": np.round(normal),
        "zeros": normal * (rng.random(normal.shape) < 0.05),
        "signed zeros": np.where(normal > 0, 0.0, -0.0).astype(np.float32),
        "scales": normal * 10.0 ** rng.integers(-30, 30, normal.shape).astype(np.float32),
        "denormals": (rng.integers(-40, 40, normal.shape) * tiny).astype(np.float32),
        "infinities": np.where(normal > 1, np.inf, normal).astype(np.float32),
        "one value": np.full_like(normal, -2.75),
    }[name]


NAMES = (
    "normal",
    "magnitudes",
    "ties",
    "zeros",
    "signed zeros",
    "scales",
    "denormals",
    "infinities",
    "one value",
)


@pytest.mark.parametrize("name", NAMES)
def test_order_statistics_are_exact(name):
    """At every rank the bits are those of the sorted array, denormals included."""
    x = _awkward(name, np.random.default_rng(1))[0]
    n = x.size
    ours = np.array([exact_quantile(jnp.asarray(x), k / (n - 1)) for k in range(0, n, 4)])
    expected = np.sort(x)[::4]
    np.testing.assert_array_equal(ours, expected)
    # DAZ arithmetic would call two denormals equal; their bits are not.
    nonzero = expected != 0
    np.testing.assert_array_equal(
        ours[nonzero].view(np.int32), expected[nonzero].view(np.int32), strict=True
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n != "infinities"])
@pytest.mark.parametrize("q", [0.0, 0.123, 0.5, 0.9, 0.997, 1.0])
def test_interpolation_follows_numpy(name, q):
    x = _awkward(name, np.random.default_rng(2))
    expected = np.quantile(x.astype(np.float64), q, axis=1)
    ours = jax.jit(exact_quantile, static_argnames=("q", "axis"))(jnp.asarray(x), q=q, axis=1)
    assert ours.dtype == jnp.float32
    # One rounding of the difference, of the product and of the sum, each relative to the larger neighbour, which is
    # at most the largest entry; and what flush-to-zero loses.
    np.testing.assert_array_less(
        np.abs(ours - expected), 3 * 6e-8 * np.abs(x).max(axis=1) + 1.2e-38
    )


def test_interpolation_beside_infinity():
    x = jnp.array([1.0, jnp.inf, jnp.inf])
    assert exact_quantile(x, 0.25) == jnp.inf
    assert exact_quantile(x, 0.75) == jnp.inf  # between two equal infinities, not nan
    assert exact_quantile(-x, 0.25) == -jnp.inf


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bits(dtype):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 301)), dtype)
    expected = np.quantile(np.asarray(x, np.float64), 0.9, axis=1)
    ours = exact_quantile(x, 0.9, axis=-1)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=3e-7)
    # 0.9 of 300 is rank 270: nothing to interpolate.
    np.testing.assert_array_equal(ours, np.sort(np.asarray(x, np.float32))[:, 270])


def test_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(4).normal(size=(3, 4, 501))
        ours = exact_quantile(jnp.asarray(x), 0.9, axis=(0, 2), keepdims=True)
        assert ours.dtype == jnp.float64 and ours.shape == (1, 4, 1)
        expected = np.quantile(x, 0.9, axis=(0, 2), keepdims=True)
        np.testing.assert_allclose(ours, expected, rtol=4e-16)


def test_traced_q_and_nan():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(2, 999)), jnp.float32)
    ours = jax.jit(lambda q: exact_quantile(x, q, axis=1))(0.9)
    np.testing.assert_allclose(ours, exact_quantile(x, 0.9, axis=1), rtol=1e-4)
    assert np.isnan(exact_quantile(x.at[1, 3].set(-jnp.nan), 0.5, axis=1)).tolist() == [False, True]


def test_size_that_float32_cannot_index():
    """Above 2^22 a rank computed in float32 is off by a fraction; ours is computed exactly."""
    n, q = 5_000_001, 0.9000002254
    x = np.random.default_rng(6).permutation(n).astype(np.float32) - 4_500_000
    expected = q * (n - 1) - 4_500_000
    naive = float(np.float32(q) * np.float32(n - 1)) - 4_500_000
    assert abs(naive - expected) > 0.05
    np.testing.assert_allclose(exact_quantile(jnp.asarray(x), q), expected, rtol=3e-7)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_counts_travel_not_data(kind, as_for_users):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    x = np.random.default_rng(7).normal(size=(3, 64, 32)).astype(np.float32)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "a", "b")))
    f = jax.jit(lambda x: exact_quantile(jnp.abs(x), 0.9, axis=(1, 2)))
    np.testing.assert_array_equal(f(sharded), f(x))
    text = f.lower(sharded).compile().as_text()
    assert " all-reduce(" in text
    assert " all-gather(" not in text and " all-to-all(" not in text and " sort(" not in text


def test_inside_shard_map():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jnp.asarray(np.random.default_rng(8).normal(size=(64, 30)), jnp.float32)
    f = jax.shard_map(
        lambda x: exact_quantile(x, 0.9, axis_name=("a", "b")),
        mesh=mesh,
        in_specs=jax.P("a", "b"),
        out_specs=jax.P(),
    )
    np.testing.assert_array_equal(f(x), exact_quantile(x, 0.9))
    local = jax.shard_map(
        lambda x: exact_quantile(x, 0.9, axis=1),
        mesh=mesh,
        in_specs=jax.P("a"),
        out_specs=jax.P("a"),
    )
    np.testing.assert_array_equal(local(x), exact_quantile(x, 0.9, axis=1))


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"q=1\.5 .* \[0, 1\]; the nearest allowed value is 1"):
        exact_quantile(jnp.ones(3), 1.5)
    with pytest.raises(ValueError, match="int32"):
        exact_quantile(jnp.arange(3), 0.5)
    with pytest.raises(ValueError, match="no numbers"):
        exact_quantile(jnp.zeros((0, 4)), 0.5, axis=0)
