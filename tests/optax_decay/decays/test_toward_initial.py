"""Pulls towards the initial weights: the released arithmetic, where the anchor comes from, and where it is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_decay import couplings, soda_decay, toward_initial_decay
from tests.references import neighbours as reference
from tests.support import neighbours, toy


def soda(decayed, start=2):
    """The released wrapper: the base's step, then (w_0 - w)/(k + 2) with w the weight before the step."""

    def run(params, gradients):
        def prox(k, path, theta, eta, w):
            return theta + (params[path] - w) / (k + start)

        return reference.last(params, gradients, neighbours.RATES, prox, decayed)

    return run


@pytest.mark.parametrize("start", [2.0, 5.0])
def test_soda_matches_the_released_wrapper(start):
    want = neighbours.agree(
        lambda: neighbours.after(soda_decay(start, mask="hidden", axes=toy.AXES)),
        soda(toy.HIDDEN, start),
    )
    plain = soda(frozenset())(toy.flat_params(), toy.flat_gradients(neighbours.STEPS))
    assert neighbours.moved(want, plain) > 0.01


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("coupling", ["learning_rate", "independent"])
def test_l2_sp(cautious, coupling):
    decay = 3.0 if coupling == "learning_rate" else 0.1

    def trajectory(params, gradients):
        def term(t, path, w, u, weights, grads):
            away = w - params[path]
            scale = decay / (1 if coupling == "learning_rate" else neighbours.RATES[t])
            return scale * away * (u * away >= 0 if cautious else 1.0)

        everything = frozenset(toy.SHAPES)
        return reference.after_adam(params, gradients, neighbours.RATES, term, everything)

    place = neighbours.between if coupling == "learning_rate" else neighbours.after
    link = dict(cautious=cautious, coupling=getattr(couplings, coupling)())
    neighbours.agree(lambda: place(toward_initial_decay(decay, **link)), trajectory)


def test_the_first_step_feels_nothing_and_the_limit_is_the_anchor():
    w = {"w": jnp.array([[1.0, -2.0]])}
    tx = soda_decay()
    state, zero = tx.init(w), {"w": jnp.zeros((1, 2))}
    updates, state = tx.update(zero, state, w)
    np.testing.assert_array_equal(updates["w"], 0)
    far = {"w": w["w"] + 3.0}
    for _ in range(2000):
        updates, state = tx.update(zero, state, far)
        far = optax.apply_updates(far, updates)
    np.testing.assert_allclose(far["w"], w["w"], atol=0.01)  # prod (1 - 1/(k+2)) = 1/2001 of 3


def test_the_anchor_is_the_state_and_not_the_weights_found():
    """A run that goes on elsewhere is pulled to its first weights, not to those it was continued from."""
    tx = optax.chain(optax.adam(0.05), soda_decay())
    grads = toy.gradients(8)
    want, _ = toy.train(tx, toy.params(), grads)
    half, state = toy.train(tx, toy.params(), grads[:4])
    step = jax.jit(tx.update)
    for g in grads[4:]:
        updates, state = step(g, state, half)
        half = optax.apply_updates(half, updates)
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=1e-6)
    for path, w in toy.flat_params().items():
        np.testing.assert_allclose(state[1].initial[path], w, rtol=1e-6)


def test_the_copy_is_float32_and_only_of_what_decays():
    tx = soda_decay(mask="hidden", axes=toy.AXES)
    for state in (tx.init(toy.params(jnp.bfloat16)), jax.eval_shape(tx.init, toy.shapes())):
        assert set(state.initial) == toy.HIDDEN
        assert {x.dtype for x in state.initial.values()} == {jnp.dtype(jnp.float32)}


def test_a_state_made_from_shapes_must_be_restored():
    tx = toward_initial_decay(0.1)
    state = tx.init({"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)})
    updates, _ = tx.update({"w": jnp.ones((2, 3))}, state, {"w": jnp.ones((2, 3))})
    assert jnp.isnan(updates["w"]).all()


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_the_copy_is_sharded_as_the_weights_are(mode):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(getattr(jax.sharding.AxisType, mode),))
    place = jax.NamedSharding(mesh, jax.P("fsdp"))
    with jax.set_mesh(mesh):
        w = {"w": jax.device_put(jnp.ones((8, 4)), place)}
        assert soda_decay().init(w).initial["w"].sharding.is_equivalent_to(place, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: toward_initial_decay(-0.1), r"weight_decay=-0.1 .*nearest allowed value is 0"),
        (lambda: soda_decay(0.0), r"start=0.0 .*nearest allowed value is 1"),
        (lambda: soda_decay(mask="hiden"), r"did you mean 'hidden'"),
        (lambda: toward_initial_decay(coupling="independent"), r"is not a Coupling"),  # type: ignore
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
