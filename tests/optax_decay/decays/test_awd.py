"""AWD against the released scheduler, coupled and decoupled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_decay
from tests.references import neighbours as reference
from tests.support import neighbours, toy

DECAY = 0.4
EVERYTHING = frozenset(toy.SHAPES)


def expected(run, decayed=EVERYTHING):
    def trajectory(w, g):
        ratio = reference.AdaptiveRatio(DECAY)
        now = {}

        def term(t, n, x, u, weights, gradients):
            if t not in now:
                some = lambda tree: {name: tree[name] for name in decayed}
                now[t] = ratio(some(weights), some(gradients))
            return now[t] * x

        return run(w, g, neighbours.RATES, term, decayed)

    return trajectory


def test_coupled_form_is_the_programs():
    neighbours.agree(
        lambda: neighbours.before(optax_decay.awd_decay(DECAY)), expected(reference.before_adam)
    )


def test_decoupled_form_needs_the_gradients_and_uses_them():
    link = lambda: optax_decay.awd_decay(DECAY, mask="hidden", axes=toy.AXES)
    want = neighbours.agree(
        lambda: neighbours.between(link()),
        expected(reference.after_adam, toy.HIDDEN),
        extra=lambda params, g: {"gradients": g},
    )
    got, _ = toy.train(neighbours.between(link()), toy.params(), toy.gradients(12))
    assert neighbours.moved(toy.unnest(got), want) > 1e-2


def test_the_decay_term_is_lambda_times_as_long_as_the_gradient():
    w, g = toy.params(), toy.gradients(1)[0]
    tx = optax_decay.awd_decay(DECAY, memory=0.0)
    term = jax.tree.map(lambda u, g: u - g, tx.update(g, tx.init(w), w)[0], g)
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(x)) for x in toy.unnest(tree).values()))
    np.testing.assert_allclose(norm(term), DECAY * norm(g), rtol=1e-5)


def test_split_weights_in_shard_map_have_the_norms_of_the_whole():
    w = {"w": jnp.arange(1.0, 17.0).reshape(8, 2), "b": jnp.array([3.0, -1.0])}
    g = jax.tree.map(jnp.sin, w)
    specs = {"w": jax.P("fsdp"), "b": jax.P()}
    tx = optax_decay.awd_decay(0.5)
    step = lambda w, g: tx.update(g, tx.init(w), w)[0]
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    got = jax.shard_map(step, mesh=mesh, in_specs=(specs, specs), out_specs=specs)(w, g)
    for name, x in step(w, g).items():
        np.testing.assert_allclose(got[name], x, rtol=1e-6)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"memory=1 .*below 1"):
        optax_decay.awd_decay(0.1, memory=1)
    with pytest.raises(ValueError, match=r"eps=-1 .*nearest allowed value is 0"):
        optax_decay.awd_decay(0.1, eps=-1)


def test_a_broken_matrix_does_not_spread():
    """The ratio is shared: a NaN in one gradient leaves it as it was, and the other matrices decay as before."""
    params = {"a": jnp.full((2, 3), 0.5), "b": jnp.full((3, 4), -0.25)}
    grads = {"a": jnp.full((2, 3), 0.1), "b": jnp.full((3, 4), 0.2)}
    broken = grads | {"a": grads["a"].at[1, 2].set(jnp.nan)}
    tx = optax_decay.awd_decay(DECAY)
    _, state = tx.update(grads, tx.init(params), params)
    updates, after = tx.update(broken, state, params)
    assert jnp.isnan(updates["a"]).sum() == 1 and jnp.isfinite(updates["b"]).all()
    np.testing.assert_array_equal(after.multipliers[0], state.multipliers[0])
    np.testing.assert_allclose(updates["b"] - 0.2, DECAY * state.multipliers[0] * -0.25, rtol=1e-6)
    assert float(tx.update(grads, after, params)[1].multipliers[0]) > float(state.multipliers[0])
