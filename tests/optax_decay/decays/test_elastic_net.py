"""Elastic net against the released step and against its penalty, by search."""

import jax.numpy as jnp
import numpy as np
import pytest

import optax_decay
from optax_decay.product.pulls import elastic_net
from tests.references import decays as references
from tests.references import neighbours as reference
from tests.support import neighbours, toy

DECAY = 0.6


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_proximal_form_matches_the_released_step(ratio):
    build = lambda: neighbours.after(
        optax_decay.elastic_net_proximal_decay(
            DECAY, ratio, learning_rate=neighbours.rate, mask="hidden", axes=toy.AXES
        )
    )
    prox = lambda t, n, q, eta, w: reference.soft_threshold(
        q, eta * DECAY * ratio, eta * DECAY * (1 - ratio)
    )
    neighbours.agree(build, lambda w, g: reference.last(w, g, neighbours.RATES, prox, toy.HIDDEN))


def test_explicit_form():
    build = lambda: neighbours.between(optax_decay.elastic_net_decay(DECAY, 0.25))
    term = lambda t, n, w, u, *_: DECAY * (0.25 * np.sign(w) + 0.75 * w)
    neighbours.agree(
        build,
        lambda w, g: reference.after_adam(w, g, neighbours.RATES, term, frozenset(toy.SHAPES)),
    )


@pytest.mark.parametrize("theta", [-2.0, -0.05, 0.0, 0.3, 1.7])
def test_proximal_map_minimises_the_penalty(theta):
    penalty = lambda x: 0.3 * abs(x) + 0.7 * x * x / 2
    got = elastic_net(0.3).prox(jnp.asarray(theta), 0.4, None, jnp.asarray(9.0))
    # Golden section finds a minimum of a function of order one to the square root of float64's rounding.
    np.testing.assert_allclose(got, references.prox_by_search(penalty, theta, 0.4), atol=3e-8)


def test_l1_gives_exact_zeros_and_l2_none():
    w = {"w": jnp.linspace(-1.0, 1.0, 40)}
    zero = {"w": jnp.zeros(40)}
    for ratio, zeros in ((1.0, 20), (0.0, 0)):
        tx = optax_decay.elastic_net_proximal_decay(1.0, ratio, learning_rate=0.5)
        updates, _ = tx.update(zero, tx.init(w), w)
        assert int((w["w"] + updates["w"] == 0).sum()) == zeros


def test_bad_share_is_refused():
    with pytest.raises(ValueError, match=r"l1_ratio=1.2 .*nearest allowed value is 1"):
        optax_decay.elastic_net_proximal_decay(0.1, 1.2, learning_rate=0.1)
