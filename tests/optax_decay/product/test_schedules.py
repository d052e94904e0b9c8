"""Schedules of λ: the shrink per step of the released programs, in a chain; and the dial of time scales."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_decay import couplings, decay, decay_table, schedules, width
from tests.references import schedules as reference

STEPS = 45
PEAK = 0.05


def rate(count):
    return PEAK * jnp.minimum((count + 1) / 5, 1 - 0.9 * jnp.asarray(count, float) / STEPS)


def shrinks(weight_decay, coupling):
    """What a weight without gradient loses at each step, as a fraction."""
    tx = optax.chain(decay(weight_decay, coupling=coupling), optax.scale_by_learning_rate(rate))
    w, lost = jnp.ones([]), []
    state = tx.init({"w": w})
    for _ in range(STEPS):
        updates, state = tx.update({"w": jnp.zeros([])}, state, {"w": w})
        lost.append(-float(updates["w"] / w))
    return lost


@pytest.mark.parametrize(
    ("weight_decay", "coupling", "expected"),
    [
        (
            schedules.to_zero(0.3, STEPS),
            couplings.learning_rate(),
            lambda t, eta: reference.nanochat(t, decay=0.3, steps=STEPS, rate=eta),
        ),
        (
            schedules.log_time(STEPS),
            couplings.schedule(PEAK),
            lambda t, eta: reference.adana(t, steps=STEPS, rate=eta, peak=PEAK),
        ),
        (
            schedules.hold_drop_ramp(0.3, STEPS),
            couplings.learning_rate(),
            lambda t, eta: reference.slowrun(t, decay=0.3, steps=STEPS, rate=eta),
        ),
        (
            schedules.palm(7.0, rate),
            couplings.learning_rate(),
            lambda t, eta: reference.palm(t, decay=7.0, rate=eta),
        ),
    ],
    ids=["to_zero", "log_time", "hold_drop_ramp", "palm"],
)
def test_shrink_per_step(weight_decay, coupling, expected):
    got = shrinks(weight_decay, coupling)
    want = [expected(t, float(rate(t))) for t in range(STEPS)]
    assert max(want) > 1.5 * min(want)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)


def test_palm_is_the_corrected_coupling():
    corrected = shrinks(7.0 * PEAK, couplings.corrected(rate, PEAK))
    np.testing.assert_allclose(
        shrinks(schedules.palm(7.0, rate), couplings.learning_rate()), corrected, rtol=1e-5
    )


@pytest.mark.parametrize(
    "coupling", [couplings.corrected(rate, PEAK), couplings.schedule(PEAK)], ids=lambda c: c.name
)
def test_the_rate_is_not_counted_twice(coupling):
    with pytest.raises(ValueError, match="count the learning rate twice"):
        shrinks(schedules.palm(7.0, rate), coupling)


def test_log_time_sums_up_to_omega_log_eleven():
    steps = 10_000
    total = np.sum(schedules.log_time(steps)(np.arange(steps)))
    np.testing.assert_allclose(total, 4 * np.log(11), rtol=1e-3)


def test_linear_to_zero_and_after_the_end():
    schedule = schedules.to_zero(0.4, 8, "linear")
    np.testing.assert_allclose([schedule(t) for t in (0, 2, 8, 9)], [0.4, 0.3, 0.0, 0.0])


def test_numbers_may_be_traced():
    t = jnp.int32(7)
    for make in (
        lambda x: schedules.to_zero(x, 20),
        lambda x: schedules.log_time(20, x),
        lambda x: schedules.hold_drop_ramp(x, 20),
        lambda x: schedules.palm(x, 0.1),
        lambda x: schedules.soda(1 + x),
    ):
        values = jax.jit(jax.vmap(lambda x, make=make: make(x)(t)))(jnp.array([0.1, 0.4]))
        np.testing.assert_allclose(values, [make(0.1)(t), make(0.4)(t)], rtol=1e-6)
        assert values[0] != values[1]


def test_the_dial_turns_both_ways():
    run = dict(learning_rate=2e-3, tokens=3e9, tokens_per_step=2e5)
    for fraction in (0.05, 0.3, 2.0):
        value = schedules.weight_decay_of(fraction, **run)
        found = schedules.timescale(value, **run)
        np.testing.assert_allclose(found.fraction, fraction, rtol=1e-12)
        np.testing.assert_allclose(found.tokens, fraction * 3e9, rtol=1e-12)
        np.testing.assert_allclose(
            value, width.timescale_weight_decay(2e-3, steps=fraction * 3e9 / 2e5), rtol=1e-12
        )
        row = decay_table(
            {"w": jnp.ones((3, 4))}, value, learning_rate=2e-3, tokens_per_step=200_000
        ).rows[0]
        np.testing.assert_allclose(row.tokens, found.tokens, rtol=1e-6)


def test_after_so_many_steps_a_weight_is_a_fraction_e_of_itself():
    value = schedules.weight_decay_of(0.2, learning_rate=0.01, tokens=1e6, tokens_per_step=1e3)
    np.testing.assert_allclose((1 - 0.01 * value) ** 200, np.exp(-1), rtol=1e-2)


def test_transfer_keeps_the_fraction_if_the_rate_follows_the_batch():
    old = dict(learning_rate=1e-3, tokens=1e9, tokens_per_step=1e5)
    new = dict(learning_rate=1e-3 * 4**0.5, tokens=7e9, tokens_per_step=4e5)
    value = schedules.transferred(
        0.2, tokens=7e9, tokens_per_step=4e5, from_tokens=1e9, from_tokens_per_step=1e5
    )
    before, after = schedules.timescale(0.2, **old), schedules.timescale(value, **new)
    np.testing.assert_allclose(after.fraction, before.fraction, rtol=1e-12)
    assert abs(value - 0.2) > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.to_zero(0.1, 0), r"steps=0 .*nearest allowed value is 1"),
        (lambda: schedules.to_zero(0.1, 5, "cosin"), r"did you mean 'cosine'"),
        (lambda: schedules.log_time(10, -1.0), r"omega=-1.0"),
        (lambda: schedules.hold_drop_ramp(0.1, 9, ((0.0, 1.0), (0.5, 2.0))), r"rise from 0 to 1"),
        (lambda: schedules.hold_drop_ramp(0.1, 9, ((0.0, 1.0), (1.0, -2.0))), r"=-2.0 is outside"),
        (lambda: schedules.soda(0.5), r"start=0.5"),
        (
            lambda: schedules.timescale(0.0, learning_rate=1.0, tokens=1.0, tokens_per_step=1.0),
            r"weight_decay=0.0 .*above 0",
        ),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
