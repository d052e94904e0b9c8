"""Stochastic rounding and Kahan summation: decay acts on bfloat16 weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay

pytestmark = pytest.mark.filterwarnings("ignore::optax_decay.LowPrecisionDecayWarning")
ETA, LAMBDA = 1e-3, 0.1


def adamw():
    return optax.chain(
        optax.scale_by_adam(), optax_decay.decay(LAMBDA), optax.scale_by_learning_rate(ETA)
    )


def test_rounding_is_unbiased_and_goes_to_a_neighbour():
    x = jnp.asarray([1.0 + 2.0**-10, -3.3, 1e-20, -7e30, 0.1], jnp.float32)
    n = 40_000
    draws = jax.vmap(lambda key: optax_decay.low_precision.round_stochastically(x, key))(
        jax.random.split(jax.random.key(0), n)
    ).astype(jnp.float32)
    spacing = np.abs(np.asarray(x)) * 2.0**-7  # bfloat16 neighbours are at most this far apart
    assert np.all(np.abs(np.asarray(draws) - np.asarray(x)) < spacing)
    assert all(len(np.unique(column)) == 2 for column in np.asarray(draws).T)
    # A draw between neighbours has standard deviation at most half the spacing; 5 deviations of the mean.
    error = np.abs(np.asarray(draws, np.float64).mean(0) - np.asarray(x, np.float64))
    assert np.all(error < 5 * spacing / 2 / np.sqrt(n))


def test_exact_values_infinities_and_nan_stay():
    x = jnp.asarray([0.0, -0.0, 1.5, -256.0, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    for seed in range(20):
        got = optax_decay.low_precision.round_stochastically(x, jax.random.key(seed)).astype(
            jnp.float32
        )
        np.testing.assert_array_equal(got, x)


def decayed_norm_ratio(apply):
    """‖w‖ after 1000 AdamW steps with zero gradients, over ‖w‖ before; float32 gives (1-1e-4)^1000 = 0.905."""
    w = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((50, 200)), jnp.bfloat16)}
    tx = adamw()
    zero = {"w": jnp.zeros((50, 200), jnp.float32)}

    def body(carry, step):
        weights, state, memory = carry
        updates, state = tx.update(zero, state, weights)
        weights, memory = apply(weights, updates, memory, step)
        return (weights, state, memory), None

    start = (w, tx.init({"w": w["w"].astype(jnp.float32)}), optax_decay.kahan_init(w))
    (end, _, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(1000)))(start)
    norm = lambda t: float(jnp.linalg.norm(t["w"].astype(jnp.float32)))
    return norm(end) / norm(w)


def test_decay_acts_where_plain_bfloat16_loses_it():
    expected = (1 - ETA * LAMBDA) ** 1000
    plain = decayed_norm_ratio(lambda w, u, m, t: (optax.apply_updates(w, u), m))
    key = jax.random.key(1)
    stochastic = decayed_norm_ratio(
        lambda w, u, m, t: (
            optax_decay.apply_updates(w, u, key=jax.random.fold_in(key, t)),
            m,
        )
    )
    kahan = decayed_norm_ratio(lambda w, u, m, t: optax_decay.kahan_apply_updates(w, u, m))
    assert plain == 1.0
    # 10,000 weights, each a random walk of 1000 roundings of at most 2^-8 of it: spread of the squared norm below
    # 2 · 2^-8 · sqrt(1000 · 1e-4/2^-8) / sqrt(10,000) ≈ 4e-4 plus the walk's own variance (26 · 2^-16 = 4e-4).
    assert stochastic == pytest.approx(expected, abs=2e-3)
    # The compensation has 8 bits below the weight's 8: steps of 1e-4 |w| are 6.5 times its resolution of 2^-16.
    assert kahan == pytest.approx(expected, rel=1e-2)


def test_float32_is_optax():
    w = {"a": jnp.asarray([0.1, 0.2]), "b": None}
    u = {"a": jnp.asarray([1e-3, -1e-3]), "b": None}
    got = optax_decay.apply_updates(w, u)
    np.testing.assert_array_equal(got["a"], optax.apply_updates(w, u)["a"])
    assert got["b"] is None
    got, lost = optax_decay.kahan_apply_updates(w, u, optax_decay.kahan_init(w))
    np.testing.assert_array_equal(got["a"], optax.apply_updates(w, u)["a"])
    assert lost["a"].shape == ()


def test_kahan_keeps_what_was_lost():
    w = {"w": jnp.asarray([1.0], jnp.bfloat16)}
    lost = optax_decay.kahan_init(w)
    u = {"w": jnp.asarray([-(2.0**-11)], jnp.float32)}
    step = jax.jit(optax_decay.kahan_apply_updates)
    for _ in range(16):
        w, lost = step(w, u, lost)
    assert w["w"].dtype == lost["w"].dtype == jnp.bfloat16
    assert float(w["w"][0]) + float(lost["w"][0]) == 1 - 2.0**-7


def test_missing_key_and_float16():
    w16 = {"w": jnp.ones(3, jnp.bfloat16)}
    with pytest.raises(ValueError, match="pass key"):
        optax_decay.apply_updates(w16, w16)
    half = {"w": jnp.ones(3, jnp.float16)}
    with pytest.raises(ValueError, match="kahan_apply_updates"):
        optax_decay.apply_updates(half, half, key=jax.random.key(0))


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_sharded_weights(mode):
    axis_type = getattr(jax.sharding.AxisType, mode)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((8, 12)), jnp.bfloat16)
    u = jnp.asarray(rng.standard_normal((8, 12)) * 1e-3, jnp.float32)
    expected = optax_decay.apply_updates({"w": w}, {"w": u}, key=jax.random.key(3))["w"]
    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, jax.P("x", "y"))
        tree = {"w": jax.device_put(w, place)}
        update = {"w": jax.device_put(u, place)}
        got = jax.jit(lambda w, u: optax_decay.apply_updates(w, u, key=jax.random.key(3)))(
            tree, update
        )
        assert got["w"].sharding.is_equivalent_to(place, 2)
    np.testing.assert_array_equal(np.asarray(got["w"]), np.asarray(expected))
