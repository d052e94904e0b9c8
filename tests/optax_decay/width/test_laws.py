"""The laws of single optimizers: how the norm of one update grows with width, and the laws at work in them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay.width import OPTIMIZERS, law
from tests.support import toy

AXES = ((r"w", "D -> F"),)
DIRECTIONS = {
    "adam": lambda: optax.scale_by_adam(0.9, 0.99),
    "lion": lambda: optax.scale_by_lion(0.9, 0.99),
    "conda": lambda: optax_decay.scale_by_conda(refresh_every=5, axes=AXES),
    "root": lambda: optax_decay.scale_by_root(axes=AXES),
    "muon": lambda: optax_decay.scale_by_root(update_rms=None, threshold=1e9, axes=AXES),
}


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_the_rate_exponent_is_that_of_the_norm_of_an_update(name):
    """Spectral norm of the update ∝ d^r, for a gradient that is one rank-one signal in full-rank noise.

    Square matrices of 24 and 96, 20 steps, noise with 1 % of the signal's entries. Entries of the singular vectors
    are random, so that norms vary by about 1/sqrt(2d), 14 % and 7 %: the exponent by 0.16/log 4 = 0.11 at one draw and
    by 0.06 at the mean of four; twice that is allowed.
    """
    norms = {}
    for d in (24, 96):
        for draw in range(4):
            rng = np.random.default_rng(10 * draw + 1)
            tx = DIRECTIONS[name]()
            update = jax.jit(tx.update)
            signal = np.outer(rng.standard_normal(d), rng.standard_normal(d)) / d
            params = {"w": jnp.zeros((d, d))}
            state = tx.init(params)
            for _ in range(20):
                noise = rng.standard_normal((d, d)) / d * 0.01
                g = {"w": jnp.asarray(signal + noise, jnp.float32)}
                u, state = update(g, state, params)
            norms.setdefault(d, []).append(np.linalg.norm(np.asarray(u["w"]), 2))
    exponent = math.log(np.mean(norms[96]) / np.mean(norms[24])) / math.log(4)
    assert exponent == pytest.approx(OPTIMIZERS[name].rate, abs=0.12)


@pytest.mark.parametrize(
    ("name", "make", "direction"),
    [
        ("conda", optax_decay.conda, lambda: optax_decay.scale_by_conda(axes=toy.AXES)),
        ("root", optax_decay.root, lambda: optax_decay.scale_by_root(axes=toy.AXES)),
    ],
)
def test_matrix_optimizers_take_the_law_as_their_decay(name, make, direction):
    """``weight_decay=width_scaling(..., law=law(optimizer=name))``: η m^-½ and λ m^½ on hidden matrices, with m = 4."""
    link = optax_decay.width_scaling(0.3, 2, law=law(optimizer=name), axes=toy.AXES)
    got, _ = toy.train(make(0.02, weight_decay=link, axes=toy.AXES), toy.params(), toy.gradients(1))
    tx = direction()
    u, _ = tx.update(toy.gradients(1)[0], tx.init(toy.params()), toy.params())
    u, w, got = toy.unnest(u), toy.unnest(toy.params()), toy.unnest(got)
    for path in toy.SHAPES:
        m = 4.0 if path in toy.HIDDEN else 1.0
        decay = 0.3 * math.sqrt(m) if path in toy.HIDDEN else 0.0
        want = w[path] - 0.02 / math.sqrt(m) * (u[path] + decay * w[path])
        # One step in float32; the direction is computed twice, jitted and not.
        np.testing.assert_allclose(got[path], want, rtol=1e-5, atol=2e-5)
    plain, _ = toy.train(
        make(0.02, weight_decay=0.3, axes=toy.AXES), toy.params(), toy.gradients(1)
    )
    assert np.abs(got["mix/kernel"] - toy.unnest(plain)["mix/kernel"]).max() > 1e-3
