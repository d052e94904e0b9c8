"""Shapes of the learning rate, against float64 and against optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.config.parts.schedules import Constant, Cosine, Linear, Trapezoid

PEAK = 3e-3
CASES = [(8, 0.2, 40), (0, 0.1, 17), (20, 0.0, 200), (2000, 0.05, 10_000)]


def made(kind, warmup, final, steps):
    if kind is Constant:
        return Constant(warmup_steps=warmup)
    return kind(steps=steps, warmup_steps=warmup, final=final)


def of_optax(kind, warmup, final, steps):
    rest = steps - warmup
    after = {
        Cosine: optax.cosine_decay_schedule(PEAK, rest, final),
        Linear: optax.linear_schedule(PEAK, final * PEAK, rest),
        Constant: optax.constant_schedule(PEAK),
    }[kind]
    climb = optax.linear_schedule(PEAK / (warmup + 1), PEAK, max(1, warmup))
    return optax.join_schedules([climb, after], [warmup])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", [Cosine, Linear, Constant])
def test_rates_are_those_of_float64_and_optax_has_them_less_exactly(kind, case):
    warmup, final, steps = case
    numbers = np.arange(steps + 9)
    ours, theirs = (
        np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(numbers)), np.float64)
        for schedule in (made(kind, *case).build(PEAK), of_optax(kind, *case))
    )
    done = np.clip((numbers - warmup) / (steps - warmup), 0, 1)
    shape = {
        Cosine: final + (1 - final) * (1 + np.cos(np.pi * done)) / 2,
        Linear: final + (1 - final) * (1 - done),
        Constant: 1.0,
    }[kind]
    right = PEAK * np.minimum(1, (numbers + 1) / (warmup + 1)) * shape
    # float32: a handful of roundings of numbers up to the peak.
    np.testing.assert_allclose(ours, right, rtol=0, atol=2e-7 * PEAK)
    np.testing.assert_allclose(theirs, right, rtol=0, atol=2.5e-7 * PEAK)
    # The first rates of a climb are small: ours are right to a rounding, optax's to one of the peak.
    if warmup:
        climb = slice(0, warmup)
        np.testing.assert_allclose(ours[climb], right[climb], rtol=2.5e-7)
        assert np.abs(theirs / right - 1)[climb].max() > np.abs(ours / right - 1)[climb].max()


def test_a_trapezoid_holds_the_peak_and_falls_in_a_line():
    """As nanochat's: from the peak at T - fall T to the final share at T."""
    steps, warmup, fall, final = 200, 13, 0.65, 0.05
    rate = Trapezoid(steps, warmup, fall, final).build(PEAK)
    numbers = np.arange(steps + 9)
    left = (steps - np.minimum(numbers, steps)) / (fall * steps)
    right = np.minimum(left * 1.0 + (1 - left) * final, 1.0)
    right = PEAK * np.minimum((numbers + 1) / (warmup + 1), right)
    got = np.asarray(jax.jit(jax.vmap(rate))(jnp.asarray(numbers)), np.float64)
    np.testing.assert_allclose(got, right, rtol=0, atol=3e-7 * PEAK)
    # A fall that is longer than what the climb leaves begins where the climb ends.
    whole = Trapezoid(steps, warmup, 1.0, final).build(PEAK)
    np.testing.assert_allclose(whole(jnp.array(warmup)), PEAK, rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(whole)(jnp.asarray(numbers)),
        jax.vmap(Linear(steps, warmup, final).build(PEAK))(jnp.asarray(numbers)),
        atol=3e-7 * PEAK,
    )
