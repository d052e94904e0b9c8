"""Decays multiplied together: pull × spectral multiplier × width multiplier × gate × schedule, in one call."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay import multipliers, pulls, thresholds
from tests.references import decays as references
from tests.support import toy

STEPS, EVERY, RATE, DECAY = 7, 3, 0.02, 0.4
FACTORS = ("huber", "spectral", "width", "cautious", "schedule")


def alpha(matrix):
    """Hill exponent of the upper half of the spectrum of the Gram matrix."""
    values = np.sort(np.linalg.svd(matrix, compute_uv=False) ** 2)
    start = len(values) // 2
    tail = values[start:]
    return 1 + len(tail) / np.sum(np.log(tail / tail[0]))


def as_matrices(name, w):
    """The hidden matrices of one leaf of the toy tree, in its own words: stacks over the first axis."""
    parts = w if name in toy.STACKED else w[None]
    return [part.reshape(part.shape[0], -1) for part in parts]


def spectral_multipliers(w, low, high):
    """One multiplier per slice, min-max over all hidden matrices."""
    alphas = {name: [alpha(m) for m in as_matrices(name, w[name])] for name in sorted(toy.HIDDEN)}
    flat = list(itertools.chain(*alphas.values()))
    span = max(flat) - min(flat)
    return {
        name: np.array([low + (high - low) * (a - min(flat)) / span for a in values])
        for name, values in alphas.items()
    }


def broadcast(name, values, w):
    return values.reshape((-1,) + (1,) * (w.ndim - 1)) if name in toy.STACKED else values[0]


def reference(chosen):
    """Weights after STEPS of Adam with the product of the chosen factors, in float64."""
    w = toy.flat_params()
    direction = references.adam_directions(0.9, 0.999, 1e-8)
    delta = references.thresholds("mean", 0.8, 0.0, toy.STACKED)
    m = spectral_multipliers(w, 0.5, 2.0)
    for t, g in enumerate(toy.flat_gradients(STEPS)):
        if t and (t + 1) % EVERY == 0:
            m = spectral_multipliers(w, 0.5, 2.0)
        lam = DECAY * (1 + t / STEPS) if "schedule" in chosen else DECAY
        new = {}
        for name in w:
            u = direction(name, g[name])
            new[name] = w[name] - RATE * u
            if name not in toy.HIDDEN:
                continue
            pull = w[name]
            if "huber" in chosen:
                pull = references.huber_pull(pull, delta(name, w[name]))
            term = lam * pull
            if "spectral" in chosen:
                term = term * broadcast(name, m[name], w[name])
            if "width" in chosen:
                term = term * np.sqrt(8 / 2)  # D is 8 here and 2 in the proxy
            if "cautious" in chosen:
                term = term * (u * w[name] >= 0)
            new[name] = w[name] - RATE * (u + term)
        w = new
    return w


def product(chosen):
    factors = []
    if "spectral" in chosen:
        factors.append(
            multipliers.spectral_alpha(
                refresh_every=EVERY,
                schedule="all",
                min_ratio=0.5,
                max_ratio=2.0,
                min_eigenvalues=2,
                method="svd",
            )
        )
    if "width" in chosen:
        factors.append(multipliers.width_power(2, 0.5))

    def lam(step):
        return DECAY * (1 + step.astype(float) / STEPS)

    link = optax_decay.decay(
        lam if "schedule" in chosen else DECAY,
        pull=pulls.huber(thresholds.mean_size(0.8)) if "huber" in chosen else pulls.l2(),
        multiplier=factors,
        cautious="cautious" in chosen,
        mask="hidden",
        axes=toy.AXES,
    )
    return optax.chain(optax.scale_by_adam(), link, optax.scale_by_learning_rate(RATE))


def run(chosen):
    with jax.enable_x64(True):
        weights, _ = toy.train(
            product(chosen), toy.params(jnp.float64), toy.gradients(STEPS, jnp.float64)
        )
        return toy.unnest(weights)


CHOICES = [*itertools.combinations(FACTORS, 2), FACTORS]


@pytest.mark.parametrize("chosen", CHOICES, ids="-".join)
def test_product_matches_reference(chosen):
    got, expected = run(chosen), reference(chosen)
    for name in got:
        # float64; eigenvalues lose a factor of their spread (below 1e4) of the 1e-16, and 7 steps pass it on.
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-10, atol=1e-10)


def test_every_factor_changes_the_product():
    """The references differ by far more than the tolerance when one factor is left out."""
    whole = reference(FACTORS)
    for left_out in FACTORS:
        other = reference(tuple(f for f in FACTORS if f != left_out))
        assert max(np.abs(whole[n] - other[n]).max() for n in toy.HIDDEN) > 1e-4, left_out
