"""Rotational AdamW against the released arithmetic, its invariants, and the equilibrium it is made from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from tests.references import neighbours as reference
from tests.references import rotational as reference_rotational
from tests.support import neighbours, toy

DECAY = 0.4


def as_rows(path, w, per_neuron):
    """[matrices, rows, inputs] of one leaf of the toy tree: axis 1 of a stacked leaf (0 of others) is the input."""
    stack = w if path in toy.STACKED else w[None]
    flat = stack.reshape(*stack.shape[:2], -1)
    if not per_neuron:
        return flat.reshape(len(flat), 1, -1)
    return np.swapaxes(flat, 1, 2)


def from_rows(path, rows, like, per_neuron):
    if per_neuron:
        rows = np.swapaxes(rows, 1, 2)
    return rows.reshape(like.shape)


def centred(per_neuron):
    """The toy weights as the released constructor leaves them."""
    params = toy.flat_params()
    for path in toy.HIDDEN:
        rows = as_rows(path, params[path], per_neuron)
        rows = np.stack([reference_rotational.centred(x) for x in rows])
        params[path] = from_rows(path, rows, params[path], per_neuron)
    return params


def expected(per_neuron, zero_mean, memory, eps):
    def trajectory(params, gradients):
        rotations = {}
        for path in toy.HIDDEN:
            rows = as_rows(path, params[path], per_neuron)
            rotations[path] = [reference_rotational.Rotation(memory, eps, zero_mean) for _ in rows]

        def step(t, path, theta, eta, w):
            u = (w - theta) / eta
            if path not in toy.HIDDEN:
                return theta - eta * DECAY * w if path == "head/kernel" else theta
            angle = np.sqrt(2 * eta * DECAY * (1 - 0.9) / (1 + 0.9))
            rows = zip(
                rotations[path],
                as_rows(path, w, per_neuron),
                as_rows(path, u, per_neuron),
                strict=True,
            )
            new = np.stack([rotate(p, d, angle) for rotate, p, d in rows])
            return from_rows(path, new, w, per_neuron)

        return reference.last(params, gradients, neighbours.RATES, step, frozenset(toy.SHAPES))

    return trajectory


@pytest.mark.parametrize(
    ("per_neuron", "zero_mean", "memory"),
    [(True, True, 0.9), (True, False, 0.5), (False, True, 0.0), (False, False, 0.9)],
)
def test_matches_the_released_arithmetic(per_neuron, zero_mean, memory):
    # Adam's first direction is ±1. A row in which all signs agree has nothing left after centring, and rounding decides
    # where it turns: give every row both signs.
    gradients = toy.flat_gradients(neighbours.STEPS)
    for path in toy.HIDDEN:
        g = gradients[0][path]
        inputs = g.shape[1] if path in toy.STACKED else g.shape[0]
        signs = ((-1.0) ** np.arange(inputs)).reshape(
            (-1,) + (1,) * (g.ndim - (path in toy.STACKED) - 1)
        )
        gradients[0][path] = np.abs(g) * signs
    neighbours.agree(
        lambda: optax_decay.rotational_adamw(
            neighbours.rate,
            weight_decay=DECAY,
            per_neuron=per_neuron,
            zero_mean=zero_mean,
            memory=memory,
            axes=toy.AXES,
        ),
        expected(per_neuron, zero_mean, memory, 1e-8),
        params=centred(per_neuron) if zero_mean else None,
        gradients=gradients,
        # Sums of 12 to 256 terms on the way to every norm.
        float32=4 * neighbours.FLOAT32,
    )


@pytest.mark.parametrize("per_neuron", [True, False])
def test_center_rows_is_the_released_constructor(per_neuron):
    got = optax_decay.center_rows(toy.params(), per_neuron=per_neuron, axes=toy.AXES)
    want = centred(per_neuron)
    assert neighbours.moved(want, toy.flat_params()) > 0.01
    for path, w in toy.unnest(got).items():
        np.testing.assert_allclose(w, want[path], rtol=1e-5, atol=1e-6)


def test_a_direction_without_any_turn_does_not_turn():
    """All mean (equal entries) or all radial: what float32 leaves of it is noise."""
    params = optax_decay.center_rows(kernel(shape=(50, 2)))
    u = {"kernel": jnp.stack([jnp.full(50, 0.3), 1.7 * params["kernel"][:, 1]], axis=1)}
    tx = optax_decay.rotational_update(0.1, 0.5)
    updates, _ = tx.update(u, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], 0.0, atol=1e-6)


def kernel(seed=0, shape=(6, 5)):
    return {"kernel": jax.random.normal(jax.random.key(seed), shape)}


def test_norms_never_change_and_rows_stay_centred():
    params = optax_decay.center_rows(kernel())
    grads = [kernel(i + 1) for i in range(20)]
    tx = optax_decay.rotational_adamw(0.1, weight_decay=0.5)
    got, _ = toy.train(tx, params, grads)
    norm = lambda tree: jnp.linalg.norm(tree["kernel"], axis=0)  # axis 0 is the input
    np.testing.assert_allclose(norm(got), norm(params), rtol=1e-6)
    np.testing.assert_allclose(jnp.mean(got["kernel"], axis=0), 0.0, atol=1e-6)
    plain, _ = toy.train(optax.adamw(0.1, weight_decay=0.5), params, grads)
    assert np.abs(norm(plain) / norm(params) - 1).max() > 0.1


def test_without_averaging_every_step_turns_by_the_same_angle():
    eta, decay = 0.02, 0.3
    tx = optax.chain(
        optax.scale_by_adam(),
        optax_decay.rotational_update(eta, decay, memory=0.0, zero_mean=False),
    )
    params = kernel()
    state = tx.init(params)
    angle = np.arctan(np.sqrt(2 * eta * decay * (1 - 0.9) / (1 + 0.9)))
    for i in range(5):
        updates, state = tx.update(kernel(i + 1), state, params)
        new = optax.apply_updates(params, updates)
        a, b = (np.asarray(x["kernel"], "f8") for x in (params, new))
        cosine = (a * b).sum(0) / np.linalg.norm(a, axis=0) / np.linalg.norm(b, axis=0)
        np.testing.assert_allclose(np.arccos(cosine), angle, rtol=1e-4)
        params = new


def test_it_is_the_rotation_that_adamw_settles_at():
    """Pure noise: after many time scales 1/(ηλ) = 20 steps AdamW rotates by ρ per step."""
    eta, decay, shape = 0.1, 0.5, (400, 10)
    params = {"kernel": jax.random.normal(jax.random.key(0), shape)}
    tx = optax.adamw(eta, b2=0.99, weight_decay=decay)

    def body(carry, key):
        params, state = carry
        updates, state = tx.update({"kernel": jax.random.normal(key, shape)}, state, params)
        new = optax.apply_updates(params, updates)
        a, b = params["kernel"], new["kernel"]
        cosine = jnp.sum(a * b, 0) / jnp.linalg.norm(a, axis=0) / jnp.linalg.norm(b, axis=0)
        return (new, state), jnp.mean(jnp.arccos(cosine))

    keys = jax.random.split(jax.random.key(1), 400)
    _, angles = jax.lax.scan(body, (params, tx.init(params)), keys)
    rho = np.sqrt(2 * eta * decay * (1 - 0.9) / (1 + 0.9))
    # The paper's formula is for ηλ -> 0; here ηλ = 0.05.
    np.testing.assert_allclose(np.mean(angles[-100:]), rho, rtol=0.1)


def test_rows_of_zeros_take_plain_steps():
    params = {"kernel": jnp.zeros((3, 2)).at[:, 0].set(jnp.array([1.0, -2.0, 1.0]))}
    u = {"kernel": jnp.array([[0.1, 0.2], [0.0, 0.3], [0.4, -0.5]])}
    tx = optax_decay.rotational_update(0.1, 0.5)
    updates, _ = tx.update(u, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"][:, 1], -0.1 * u["kernel"][:, 1], rtol=1e-6)
    assert jnp.isfinite(updates["kernel"]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optax_decay.rotational_update(0.1, 0.0), r"weight_decay=0.0 .*above 0"),
        (lambda: optax_decay.rotational_update(0.1, memory=1.0), r"memory=1.0 .*below 1"),
        (lambda: optax_decay.rotational_update(0.1, mask="hiden"), r"did you mean 'hidden'"),
        (
            lambda: optax_decay.rotational_update(0.1, mask=None).init({"b": jnp.ones(3)}),
            r"'b' of shape \(3,\) cannot rotate",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_split_matrices_in_shard_map_are_refused():
    params = {"kernel": jnp.ones((8, 2))}
    tx = optax_decay.rotational_update(0.1, 0.5, zero_mean=False)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = {"kernel": jax.P("fsdp")}
    step = lambda w: tx.update(w, tx.init(w), w)[0]
    with pytest.raises(ValueError, match=r"whole matrices inside shard_map.*\['fsdp'\]"):
        jax.shard_map(step, mesh=mesh, in_specs=(spec,), out_specs=spec)(params)
