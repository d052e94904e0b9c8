"""EXAdam against its float64 reference, its documented properties, and its cost beside Adam's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay.optimizers.exadam import exadam, scale_by_exadam
from tests.references import exadam as reference_exadam

SETTINGS = {
    "defaults": {},
    "betas": {"b1": 0.8, "b2": 0.95, "eps": 1e-6},
    "zero betas": {"b1": 0.0, "b2": 0.0, "eps": 1e-4},
    "log growth": {"log_growth": True},
    "decay": {"weight_decay": 0.3, "eps": 1e-3},
    "decay, log growth": {"weight_decay": 0.3, "log_growth": True, "b2": 0.99},
}
RATES = np.geomspace(1e-3, 2e-2, 12)


def problem(dtype=np.float64, seed=0):
    """Weights and 12 gradients of a tall, a wide, a square and a 1-D parameter, with zeros and four scales."""
    rng = np.random.default_rng(seed)
    shapes = {"tall": (7, 3), "wide": (3, 5), "square": (4, 4), "vector": (6,)}
    scales = {"tall": 1.0, "wide": 1e-2, "square": 1e-5, "vector": 10.0}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    gradients = [
        {name: scales[name] * rng.normal(size=shape) for name, shape in shapes.items()}
        for _ in range(12)
    ]
    for g in gradients:
        g["tall"][0] = 0.0  # a row that never gets a gradient
    gradients[3]["vector"][:] = 0.0
    return cast(params, dtype), [cast(g, dtype) for g in gradients]


def cast(tree, dtype):
    return jax.tree.map(lambda x: np.asarray(x, dtype), tree)


def run(tx, params, gradients):
    state = tx.init(params)
    update = jax.jit(tx.update)
    history = []
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history, state


def expected(params, gradients, **settings):
    """The reference's weights, as a list of trees."""
    columns = {
        name: reference_exadam.exadam(
            w, [g[name] for g in gradients], learning_rate=RATES, **settings
        )
        for name, w in params.items()
    }
    return [{name: columns[name][t] for name in columns} for t in range(len(gradients))]


def rates():
    return lambda count: jnp.asarray(RATES)[count]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_trajectory_in_float32(settings):
    params, gradients = problem(np.float32)
    history, _ = run(exadam(rates(), mask=None, **settings), params, gradients)
    # A step is at most 16 rate = 0.3; a few roundings of it and of |w| <= 5 per step, 12 steps: below 2e-6 * max(1, w).
    for got, want in zip(history, expected(params, gradients, **settings), strict=True):
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_trajectory_in_float64(settings):
    with jax.enable_x64(True):
        params, gradients = problem(np.float64)
        history, _ = run(exadam(rates(), mask=None, **settings), params, gradients)
        for got, want in zip(history, expected(params, gradients, **settings), strict=True):
            for name in want:
                # float64 rounds at 1.1e-16; 12 steps of about 20 operations on numbers of order 1.
                np.testing.assert_allclose(
                    got[name], want[name], rtol=1e-12, atol=1e-13, err_msg=name
                )


def test_the_two_versions_differ_by_the_growing_step():
    g, params = {"w": jnp.array([0.7, -3.0])}, {"w": jnp.array([1.0, 2.0])}
    plain, growing = scale_by_exadam(), scale_by_exadam(log_growth=True)
    u1, _ = plain.update(g, plain.init(params))
    u2, _ = growing.update(g, growing.init(params))
    np.testing.assert_allclose(u2["w"] / u1["w"], 0.5 * np.log(4.0), rtol=1e-6)


def test_first_step_is_sixteen_learning_rates():
    tx = scale_by_exadam()
    g = jnp.array([0.7, -3.0, 1e-6])  # the last one has g² far below eps
    u, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(u[:2], [15.95, -15.95], rtol=1e-3)
    # v = 1e-15: d1 = 1 + 1e-7, d2 = 1 + 9e-7, and the denominator 1e-6 + eps is 1 % above sqrt(v̂).
    np.testing.assert_allclose(u[2], 11.0 / 1.01, rtol=1e-3)


def test_long_run_is_quasi_hyperbolic_adam_at_twice_the_learning_rate():
    rng = np.random.default_rng(0)
    settings = {"b1": 0.9, "b2": 0.9}
    tx, adam = scale_by_exadam(**settings), optax.scale_by_adam(**settings)
    zeros = jnp.zeros(5)
    state, adam_state = tx.init(zeros), adam.init(zeros)
    for _ in range(300):
        g = jnp.asarray(rng.normal(size=5), jnp.float32)
        u, state = tx.update(g, state)
        a, adam_state = adam.update(g, adam_state)
    assert not np.allclose(u, a, rtol=0.2)
    # 0.9**300 = 2e-14: both debiasings are gone.
    np.testing.assert_allclose(u, a + g / np.sqrt(adam_state.nu), rtol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [{"eps": 0.0}, {"eps": -1e-8}, {"b1": 1.0}, {"b2": -0.1}, {"b2": 1.0}],
)
def test_bad_numbers_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*nearest allowed"):
        exadam(1e-3, **bad)


def test_traced_zero_eps_gives_no_nan():
    @jax.jit
    def step(eps, g):
        tx = scale_by_exadam(eps=eps)
        return tx.update(g, tx.init(g))[0]

    u = step(0.0, jnp.array([0.0, 2.0]))
    assert u[0] == 0.0
    np.testing.assert_allclose(u[1], 15.95, rtol=1e-3)


def test_traced_hyperparameters_agree_with_numbers():
    params, gradients = problem(np.float32)
    injected = optax.inject_hyperparams(exadam)(1e-2, b1=0.8, b2=0.97, eps=1e-6)
    got, state = run(injected, params, gradients)
    want, _ = run(exadam(1e-2, b1=0.8, b2=0.97, eps=1e-6), params, gradients)
    assert state.hyperparams["b2"].dtype == jnp.float32
    for name in params:
        # float32(0.97) is off by 1e-8, which 1 - b2 = 0.03 turns into 4e-7.
        np.testing.assert_allclose(got[-1][name], want[-1][name], rtol=2e-6, atol=2e-6)


def test_state_keeps_its_dtypes_and_none_passes_through():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "hole": jnp.ones(2)}
    tx = scale_by_exadam(mu_dtype=jnp.bfloat16)
    state = tx.init(params)
    assert (state.mu["w"].dtype, state.nu["w"].dtype) == (jnp.bfloat16, jnp.float32)
    g = {"w": jnp.full((2, 3), 0.3, jnp.float32), "hole": None}
    updates, new = tx.update(g, state, params, unknown=1)
    assert updates["hole"] is None and updates["w"].dtype == jnp.float32
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
    np.testing.assert_array_equal(new.mu["hole"], state.mu["hole"])


def test_complex_weights_follow_the_reference():
    rng = np.random.default_rng(1)
    w = rng.normal(size=(3, 2)) + 1j * rng.normal(size=(3, 2))
    gradients = [rng.normal(size=(3, 2)) + 1j * rng.normal(size=(3, 2)) for _ in range(5)]
    want = reference_exadam.exadam(w, gradients, learning_rate=1e-2, b2=0.9)[-1]
    history, state = run(
        exadam(1e-2, b2=0.9), jnp.asarray(w, jnp.complex64), cast(gradients, np.complex64)
    )
    assert state[0].nu.dtype == jnp.float32
    np.testing.assert_allclose(history[-1], want, rtol=2e-6, atol=2e-6)


def test_decay_may_be_a_transformation_and_the_default_mask_spares_embeddings():
    axes = (("embed", "V -> D"), ("kernel", "D -> H"), ("scale", "D"))
    params = {
        "embed": jnp.full((5, 3), 2.0),
        "kernel": jnp.full((3, 4), 2.0),
        "scale": jnp.full(3, 2.0),
    }
    zero = jax.tree.map(jnp.zeros_like, params)
    plain = exadam(0.1, weight_decay=0.5, axes=axes)
    updates, _ = plain.update(zero, plain.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    assert not updates["embed"].any() and not updates["scale"].any()
    huber = exadam(0.1, weight_decay=optax_decay.huber_decay(0.5, threshold=0.25))
    updates, _ = huber.update(zero, huber.init(params), params)
    np.testing.assert_allclose(updates["embed"], -0.1 * 0.5 * 0.25, rtol=1e-6)
