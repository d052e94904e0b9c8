"""The refresh on the host gives what the training step would, while other steps run."""

import importlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay import spectra
from tests.support.toy import nest

module = importlib.import_module("optax_decay.spectral.host_refresh")

AXES = (
    (r"blocks/attention/kernel", "L | D -> H E"),
    (r"blocks/down/kernel", "L | F -> D"),
    (r"mix/kernel", "KH | D -> G"),
    (r"head/kernel", "D -> V"),
)
OPTIONS = {
    "axes": AXES,
    "assignment": spectra.linear(high=4.0),
    "select": spectra.hidden_matrices(exclude=("down/kernel[1]",), min_eigenvalues=8),
}


def params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "blocks/attention/kernel": (2, 12, 3, 6),
        "blocks/down/kernel": (2, 18, 12),
        "mix/kernel": (3, 12, 14),
        "head/kernel": (12, 40),
    }
    return nest({p: jnp.asarray(rng.standard_normal(s), jnp.float32) for p, s in shapes.items()})


def optimizer(**changes):
    link = optax_decay.spectral_alpha_decay(0.1, **{**OPTIONS, **changes})
    return optax.chain(optax.scale_by_adam(), link, optax.scale_by_learning_rate(1e-3))


def in_graph(weights, **changes):
    tx = optimizer(**changes)
    zero = jax.tree.map(jnp.zeros_like, weights)
    return tx.update(zero, tx.init(weights), weights, refresh=True)[1]


def same(a, b):
    """Equal up to float32 rounding of 12 eigenvalues, which the exponents amplify by less than 100."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=12 * 100 * 2.0**-24)


@pytest.mark.parametrize(
    "changes",
    [{}, {"score": spectra.entropy(), "assignment": spectra.sigmoid()}],
    ids=["alpha", "entropy"],
)
def test_the_host_agrees_with_the_step(changes):
    weights = params()
    tx = optimizer(**changes)
    refresh = optax_decay.spectral_refresh(**{**OPTIONS, **changes})
    before = tx.init(weights)
    after = refresh(before, weights)
    same(after[1].multipliers[0], in_graph(weights, **changes)[1].multipliers[0])
    factors = after[1].multipliers[0].multiplier
    assert float(factors["blocks/down/kernel"][1]) == 1.0
    assert len({float(f) for f in factors["blocks/attention/kernel"]}) == 2
    # Nothing else in the state has changed.
    same(after[0], before[0])
    assert int(after[1].count) == 0


def test_training_goes_on_meanwhile(monkeypatch):
    """Steps run, and donate the weights, between start and finish; the scores are those of the start."""
    gate = threading.Event()
    original = module._one

    def slow(*args):
        assert gate.wait(60)
        return original(*args)

    monkeypatch.setattr(module, "_one", slow)
    tx = optimizer(refresh=spectra.once())
    refresh = optax_decay.spectral_refresh(**OPTIONS)
    weights = params()
    state = tx.init(weights)
    expected = in_graph(weights)[1].multipliers[0]

    def step(weights, state, g):
        updates, state = tx.update(g, state, weights, refresh=False)
        return optax.apply_updates(weights, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    pending = refresh.start(state, weights)
    for seed in range(3):
        weights, state = step(weights, state, params(seed + 5))
    assert not pending.done()
    assert int(state[1].multipliers[0].measured) == 0
    gate.set()
    state = refresh.finish(state, pending)
    same(state[1].multipliers[0], expected)
    assert int(state[1].count) == 3
    # The next compiled step takes the state as it is.
    step(weights, state, params(9))


def test_shardings_are_kept():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    place = jax.NamedSharding(mesh, jax.P())
    weights = jax.device_put(params(), place)
    state = jax.device_put(optimizer().init(weights), place)
    after = optax_decay.spectral_refresh(**OPTIONS)(state, weights)
    assert {x.sharding for x in jax.tree.leaves(after[1].multipliers[0])} == {place}


def test_what_is_refused():
    weights = params()
    with pytest.raises(ValueError, match="gradients"):
        optax_decay.spectral_refresh(score=spectra.gradient_norm())
    with pytest.raises(TypeError):
        optax_decay.spectral_refresh(axes=AXES, scores=spectra.hill())
    # Where and when the training step measures means nothing on the host.
    for option in ({"refresh": spectra.once()}, {"mesh": None}, {"param_specs": None}):
        with pytest.raises(TypeError):
            optax_decay.spectral_refresh(axes=AXES, **option)
    with pytest.raises(ValueError, match="holds 0"):
        optax_decay.spectral_refresh(axes=AXES)(optax.adam(0.1).init(weights), weights)
    other = optax_decay.spectral_refresh(
        axes=AXES, select=spectra.hidden_matrices(exclude=("mix/kernel",), min_eigenvalues=8)
    )
    with pytest.raises(ValueError, match="options and axes as the decay"):
        other(optimizer().init(weights), weights)
