"""AdamS against an Adam that keeps its whole second moment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_decay
from tests.references import neighbours as reference
from tests.support import neighbours, toy

DECAY = 0.15


def expected(decayed, b2=0.999):
    mean = reference.StableMean(b2)
    now = {}

    def term(t, n, w, u, weights, gradients):
        if t not in now:
            now[t] = mean(gradients)
        return DECAY * w / now[t]

    return lambda w, g: reference.after_adam(w, g, neighbours.RATES, term, decayed)


def test_ready_made_optimizer_matches_reference():
    neighbours.agree(
        lambda: optax_decay.adam_stable_decay(neighbours.rate, weight_decay=DECAY, axes=toy.AXES),
        expected(toy.MATRICES),
    )


def test_link_matches_reference_and_sees_gradients_that_do_not_decay():
    want = neighbours.agree(
        lambda: neighbours.between(optax_decay.stable_decay(DECAY, mask="hidden", axes=toy.AXES)),
        expected(toy.HIDDEN),
        extra=lambda params, g: {"gradients": g},
    )
    everything = expected(frozenset(toy.SHAPES))(toy.flat_params(), toy.flat_gradients(12))
    assert neighbours.moved(want, everything) > 1e-2


def test_decay_is_invariant_under_scaling_of_loss_and_rate_together():
    """λ has the units of a gradient: gradients and λ times c leave Adam's path unchanged, up to ε."""
    params, grads = toy.params(), toy.gradients(6)
    one, _ = toy.train(
        optax_decay.adam_stable_decay(0.05, weight_decay=DECAY, eps=1e-20, axes=toy.AXES),
        params,
        grads,
    )
    scaled = [jax.tree.map(lambda g: 64 * g, g) for g in grads]
    two, _ = toy.train(
        optax_decay.adam_stable_decay(0.05, weight_decay=64 * DECAY, eps=1e-20, axes=toy.AXES),
        params,
        scaled,
    )
    assert neighbours.moved(toy.unnest(one), toy.unnest(two)) < 1e-5
    three, _ = toy.train(
        optax_decay.adam_stable_decay(0.05, weight_decay=DECAY, eps=1e-20, axes=toy.AXES),
        params,
        scaled,
    )
    assert neighbours.moved(toy.unnest(one), toy.unnest(three)) > 1e-2


def test_zero_gradients_do_not_decay():
    params = {"w": jnp.ones((2, 3))}
    got, _ = toy.train(
        optax_decay.adam_stable_decay(0.1, weight_decay=1.0), params, [{"w": jnp.zeros((2, 3))}] * 2
    )
    np.testing.assert_array_equal(got["w"], params["w"])


def test_split_gradients_in_shard_map_have_the_mean_of_the_whole():
    w = {"w": jnp.arange(1.0, 17.0).reshape(8, 2), "b": jnp.array([3.0, -1.0])}
    specs = {"w": jax.P("fsdp"), "b": jax.P()}
    tx = optax_decay.stable_decay(0.5)
    step = lambda w: tx.update(w, tx.init(w), w, gradients=w)[0]
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    got = jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=specs)(w)
    for name, x in step(w).items():
        np.testing.assert_allclose(got[name], x, rtol=1e-6)


def test_missing_gradients_are_an_error():
    w = {"w": jnp.ones(2)}
    tx = optax_decay.stable_decay(0.1)
    with pytest.raises(ValueError, match="gradients=grads"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(ValueError, match=r"b2=1.0 .*below 1"):
        optax_decay.stable_decay(0.1, b2=1.0)


def test_a_broken_gradient_does_not_end_the_decay():
    """The average is shared: a NaN in one gradient leaves it as it was."""
    params, grads = {"a": jnp.full((2, 3), 0.5)}, {"a": jnp.full((2, 3), 0.1)}
    tx = optax_decay.stable_decay(0.3)
    _, state = tx.update(grads, tx.init(params), params, gradients=grads)
    broken = {"a": grads["a"].at[0, 1].set(jnp.nan)}
    _, state = tx.update(grads, state, params, gradients=broken)
    updates, _ = tx.update(grads, state, params, gradients=grads)
    assert jnp.isfinite(updates["a"]).all() and (updates["a"] > 0.1).all()
