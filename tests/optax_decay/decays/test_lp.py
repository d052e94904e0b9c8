"""p-norm decay against the authors' arithmetic, its limits, and its zeros."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay.product.pulls import lp, padam
from tests.references import decays as references
from tests.references import neighbours as reference
from tests.support import neighbours, toy

DECAY = 0.3


@pytest.mark.parametrize("where", ["old", "new"])
@pytest.mark.parametrize("p", [0.5, 0.8, 1.0, 1.5, 2.0])
def test_proximal_form_is_padam(p, where):
    build = lambda: neighbours.after(
        optax_decay.lp_proximal_decay(
            DECAY,
            p,
            learning_rate=neighbours.rate,
            linearize_at=where,
            mask=("hidden", "head"),
            axes=toy.AXES,
        )
    )
    prox = lambda t, n, q, eta, w: reference.padam(q, w, eta * DECAY, p, where == "new")
    # |w|^(2-p) has an infinite slope at 0 for p > 1, so that rounding of weights that cross 0 grows without bound:
    # start them at |w| > 1, from where 12 steps of 0.05 do not get to 0. For p < 1 small weights are amplified by
    # 2 - p per step on their way to 0, which leaves errors of at most ten times those of the other weights.
    params = toy.flat_params()
    if p > 1:
        params = {n: np.sign(w) * (1 + np.abs(w)) for n, w in params.items()}
    want = neighbours.agree(
        build,
        lambda w, g: reference.last(w, g, neighbours.RATES, prox, toy.MATRICES),
        params=params,
        float32=10 * neighbours.FLOAT32 if p < 1 else neighbours.FLOAT32,
    )
    other = lambda t, n, q, eta, w: reference.padam(q, w, eta * DECAY, p, where == "old")
    rest = reference.last(params, toy.flat_gradients(12), neighbours.RATES, other, toy.MATRICES)
    assert (neighbours.moved(want, rest) > 1e-3) == (p < 2)


@pytest.mark.parametrize("p", [1.0, 1.3, 2.0])
def test_explicit_form(p):
    build = lambda: neighbours.between(optax_decay.lp_decay(DECAY, p))
    term = lambda t, n, w, u, *_: DECAY * p * np.abs(w) ** (p - 1) * np.sign(w)
    neighbours.agree(
        build,
        lambda w, g: reference.after_adam(w, g, neighbours.RATES, term, frozenset(toy.SHAPES)),
    )


def test_p_two_is_implicit_decay_at_twice_the_rate():
    params, grads = toy.params(), toy.gradients(5)
    ours, _ = toy.train(
        optax.chain(optax.adam(0.1), optax_decay.lp_proximal_decay(0.2, 2.0, learning_rate=0.1)),
        params,
        grads,
    )
    implicit, _ = toy.train(
        optax.chain(optax.adam(0.1), optax_decay.proximal_decay(0.4, learning_rate=0.1)),
        params,
        grads,
    )
    adamw, _ = toy.train(optax.adamw(0.1, weight_decay=0.4), params, grads)
    assert neighbours.moved(toy.unnest(ours), toy.unnest(adamw)) > 1e-4
    assert neighbours.moved(toy.unnest(ours), toy.unnest(implicit)) < 1e-6


def test_p_one_touches_the_soft_threshold_where_it_is_linearised():
    """The majorising quadratic has the penalty's slope at w: a small step agrees to second order."""
    w = np.array([0.5, -2.0, 1.0])
    for tau, order in ((1e-2, 1e-3), (1e-3, 1e-5)):
        ours = padam(1.0).prox(jnp.asarray(w), tau, None, jnp.asarray(w))
        exact = np.array([references.prox_by_search(abs, x, tau) for x in w])
        assert 0 < np.abs(ours - exact).max() < order


def test_exact_zeros_are_absorbing_at_the_old_weight_only():
    w, u = {"w": jnp.array([0.0, 0.3])}, {"w": jnp.array([0.2, 0.0])}
    for where, expected in (("old", 0.0), ("new", 0.2 * 0.2 / (0.2 + 0.1 * 0.5))):
        tx = optax_decay.lp_proximal_decay(0.5, 1.0, learning_rate=0.1, linearize_at=where)
        updates, _ = tx.update(u, tx.init(w), w)
        np.testing.assert_allclose(w["w"][0] + updates["w"][0], expected, rtol=1e-6)


def test_rate_zero_changes_nothing_even_at_zero():
    w, u = {"w": jnp.array([0.0, 0.3])}, {"w": jnp.array([0.2, 0.1])}
    tx = optax_decay.lp_proximal_decay(0.0, 0.5, learning_rate=0.1)
    updates, _ = tx.update(u, tx.init(w), w)
    np.testing.assert_array_equal(w["w"] + updates["w"], w["w"] + u["w"])


def test_small_p_makes_exact_zeros_where_l2_makes_none():
    params, grads = toy.params(), [toy.gradients(1)[0]] * 60
    still = [{**g, "head": {"kernel": jnp.zeros((8, 10))}} for g in grads]
    zeros = {}
    for p in (0.5, 2.0):
        tx = optax.chain(
            optax.adam(0.01), optax_decay.lp_proximal_decay(1.0, p, learning_rate=0.01)
        )
        got, _ = toy.train(tx, params, still)
        zeros[p] = int((got["head"]["kernel"] == 0).sum())
    assert zeros[0.5] > 10 and zeros[2.0] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: padam(0.0), r"p=0.0 .*above 0"),
        (lambda: padam(2.5), r"p=2.5 .*nearest allowed value is 2"),
        (lambda: lp(2.5), r"p=2.5 .*nearest allowed value is 2"),
        (lambda: padam(1.0, "newest"), r"did you mean 'new'"),
        (lambda: optax_decay.lp_decay(0.1, 0.8), r"p=0.8 .*nearest allowed value is 1"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_each_form_refuses_the_pull_of_the_other():
    """The pull is infinite at 0 for p < 1, and the quadratic of the proximal step has no pull of its own."""
    with pytest.raises(ValueError, match="use proximal_decay"):
        optax_decay.decay(0.1, pull=padam(0.8))
    with pytest.raises(ValueError, match="no closed-form proximal map"):
        optax_decay.proximal_decay(0.1, learning_rate=0.1, pull=lp(1.5))
