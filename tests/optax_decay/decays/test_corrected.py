"""AdamC: the square of the rate on normalised layers only."""

import jax.numpy as jnp
import pytest

import optax_decay
from tests.references import neighbours as reference
from tests.support import neighbours, toy

DECAY = 0.6
PEAK = neighbours.RATES[0]


@pytest.mark.parametrize("normalized", [("hidden",), "head"])
def test_matches_reference(normalized):
    corrected = toy.HIDDEN if normalized == ("hidden",) else frozenset({"head/kernel"})
    build = lambda: neighbours.between(
        optax_decay.corrected_decay(
            DECAY,
            learning_rate=neighbours.rate,
            peak_learning_rate=PEAK,
            normalized=normalized,
            mask=("hidden", "head"),
            axes=toy.AXES,
        )
    )

    def term(t, n, w, u, *_):
        return DECAY * (neighbours.RATES[t] / PEAK if n in corrected else 1.0) * w

    want = neighbours.agree(
        build, lambda w, g: reference.after_adam(w, g, neighbours.RATES, term, toy.MATRICES)
    )
    everywhere = lambda t, n, w, u, *_: DECAY * (neighbours.RATES[t] / PEAK) * w
    other = reference.after_adam(
        toy.flat_params(), toy.flat_gradients(12), neighbours.RATES, everywhere, toy.MATRICES
    )
    assert neighbours.moved(want, other) > 1e-3


def test_a_constant_rate_is_its_own_peak():
    params, grads = toy.params(), toy.gradients(3)
    tx = optax_decay.corrected_decay(
        DECAY, learning_rate=0.05, multiplier=optax_decay.multipliers.constant(2.0), axes=toy.AXES
    )
    plain = optax_decay.decay(2 * DECAY, axes=toy.AXES)
    got, _ = toy.train(neighbours.between(tx), params, grads)
    want, _ = toy.train(neighbours.between(plain), params, grads)
    assert neighbours.moved(toy.unnest(got), toy.unnest(want)) < 1e-6


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="pass peak_learning_rate"):
        optax_decay.corrected_decay(learning_rate=lambda count: jnp.float32(0.1))
    with pytest.raises(ValueError, match="did you mean 'hidden'"):
        optax_decay.corrected_decay(learning_rate=0.1, normalized="hiden")
    with pytest.raises(ValueError, match=r"peak_learning_rate=0 .*above 0"):
        optax_decay.corrected_decay(learning_rate=0.1, peak_learning_rate=0)
