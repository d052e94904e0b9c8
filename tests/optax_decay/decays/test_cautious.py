"""Cautious decay: the gate, its edge, and the scheduled form."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay import couplings, gates, pulls
from tests.references import neighbours as reference
from tests.references import norms
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


W = np.array([2.0, 2.0, -1.0, 0.0, -0.0, 1.5, -3.0, 0.7])
U = np.array([0.0, 0.5, -0.5, 0.0, 1.0, -0.5, -2.0, -0.0])


@pytest.mark.parametrize(
    ("gate", "keeps"),
    [
        (True, U * W >= 0),
        (gates.agreement(), U * W >= 0),
        (gates.strict_agreement(), U * W > 0),
        (gates.same_sign_bits(), np.signbit(U) == np.signbit(W)),
    ],
    ids=["default", "agreement", "strict", "bits"],
)
def test_gates_differ_where_something_is_zero(gate, keeps):
    tx = optax_decay.decay(0.1, cautious=gate)
    params = {"w": jnp.asarray(W, jnp.float32)}
    got = tx.update({"w": jnp.asarray(U, jnp.float32)}, tx.init(params), params)[0]["w"]
    np.testing.assert_allclose(got, U + 0.1 * np.where(keeps, W, 0), rtol=1e-6, atol=1e-7)
    # The same behind the learning rate, where updates point downhill.
    tx = optax_decay.decay(0.01, cautious=gate, coupling=couplings.independent())
    step = {"w": jnp.asarray(-0.1 * U, jnp.float32)}
    got = tx.update(step, tx.init(params), params)[0]["w"]
    np.testing.assert_allclose(got, -0.1 * U - 0.01 * np.where(keeps, W, 0), rtol=1e-6, atol=1e-8)
    assert len({tuple(np.asarray(k)) for k in (U * W >= 0, U * W > 0)}) == 2


def test_the_record_decays_the_braked_and_stepped_weight():
    """Record 46 of track 3: the radius is pinned first, then w ← w (1 - ηλ) where the step and the new weight agree."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((5, 8))
    grads = rng.standard_normal((12, 5, 8))
    rate = lambda t: 0.05 * (1 - t / 20)
    schedule = lambda count: 0.05 * (1 - count / 20)
    tx = optax.chain(
        optax.scale_by_learning_rate(schedule),
        optax_decay.radial_brake(rule="first_order"),
        optax_decay.decay(
            optax_decay.schedules.palm(0.5, schedule),
            cautious=gates.on_stepped_weight(),
            coupling=couplings.independent(),
        ),
    )
    got, _ = toy.train(
        tx, {"w": jnp.asarray(w, jnp.float32)}, [{"w": jnp.asarray(g, jnp.float32)} for g in grads]
    )
    for t, g in enumerate(grads):
        x = norms.brake_first_order(w, g, rate(t), 0.5, 1.0)
        w = x * np.where((w - x) * x > 0, 1 - 0.5 * rate(t), 1.0)
    # Twelve steps of float32; a sign that flips in between would be seen at 1e-2.
    np.testing.assert_allclose(got["w"], w, rtol=1e-4, atol=1e-5)


def test_gates_that_do_not_fit_say_what_does():
    with pytest.raises(ValueError, match=r"finished step: put the decay last.*strict_agreement"):
        optax_decay.decay(0.1, cautious=gates.on_stepped_weight())
    with pytest.raises(ValueError, match=r"did you mean optax_decay.gates.strict_agreement"):
        optax_decay.decay(0.1, cautious="strict")
    with pytest.raises(ValueError, match=r"cautious=1 is not True, False or one of"):
        optax_decay.toward_initial_decay(0.1, cautious=1)
