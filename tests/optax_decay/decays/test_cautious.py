"""Cautious decay: the gate, its edge, and the scheduled form."""

import jax.numpy as jnp
import numpy as np
import pytest

import optax_decay
from optax_decay import couplings, pulls
from tests.references import neighbours as reference
from tests.support import neighbours, toy

DECAY = 0.6
PEAK = neighbours.RATES[0]


@pytest.mark.parametrize("coupling", ["learning_rate", "corrected"])
def test_matches_reference(coupling):
    build = lambda: neighbours.between(
        optax_decay.cautious_decay(
            DECAY,
            coupling=couplings.corrected(neighbours.rate, PEAK)
            if coupling == "corrected"
            else couplings.learning_rate(),
            axes=toy.AXES,
            mask="hidden",
        )
    )

    def term(t, n, w, u, *_):
        rate = DECAY * (neighbours.RATES[t] / PEAK if coupling == "corrected" else 1.0)
        return rate * np.where(u * w >= 0, w, 0.0)

    want = neighbours.agree(
        build, lambda w, g: reference.after_adam(w, g, neighbours.RATES, term, toy.HIDDEN)
    )
    full = lambda t, n, w, u, *_: term(t, n, w, w)
    plain = reference.after_adam(
        toy.flat_params(), toy.flat_gradients(12), neighbours.RATES, full, toy.HIDDEN
    )
    assert neighbours.moved(want, plain) > 1e-2


def test_pull_is_gated_after_the_learning_rate_too():
    build = lambda: neighbours.after(
        optax_decay.cautious_decay(0.05, coupling=couplings.independent(), pull=pulls.huber(0.2))
    )

    def prox(t, n, q, eta, w):
        u = w - q  # the step downhill
        return q - 0.05 * np.where(u * w >= 0, np.clip(w, -0.2, 0.2), 0.0)

    everything = frozenset(toy.SHAPES)
    neighbours.agree(build, lambda w, g: reference.last(w, g, neighbours.RATES, prox, everything))


def test_still_weights_decay_and_opposed_ones_do_not():
    w = {"w": jnp.array([2.0, 2.0, 2.0, -3.0, 0.0])}
    u = {"w": jnp.array([0.0, 0.5, -0.5, -0.5, 1.0])}
    tx = optax_decay.cautious_decay(0.1)
    got = tx.update(u, tx.init(w), w)[0]["w"]
    np.testing.assert_allclose(got, [0.2, 0.7, -0.5, -0.8, 1.0], rtol=1e-6)
