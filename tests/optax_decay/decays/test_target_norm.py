"""Weight norm control against its equation, and where it settles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from tests.references import neighbours as reference
from tests.support import neighbours, toy

DECAY = 0.6


@pytest.mark.parametrize("target", [0.0, 0.4, "schedule", None])
def test_matches_reference(target):
    given = (
        (lambda count: 0.1 * (jnp.asarray(count, float) + 1)) if target == "schedule" else target
    )
    build = lambda: neighbours.between(
        optax_decay.target_norm_decay(DECAY, given, mask=("hidden", "head"), axes=toy.AXES)
    )
    first = {n: reference.rms(w, n in toy.STACKED) for n, w in toy.flat_params().items()}

    def term(t, n, w, u, *_):
        goal = {"schedule": 0.1 * (t + 1), None: first[n]}.get(target, target)
        return DECAY * (1 - goal / reference.rms(w, n in toy.STACKED)) * w

    neighbours.agree(
        build, lambda w, g: reference.after_adam(w, g, neighbours.RATES, term, toy.MATRICES)
    )


def test_norms_settle_at_the_target_from_both_sides():
    params = {
        "small": jnp.full((3, 4), 0.01),
        "large": jnp.full((4, 2), -5.0),
        "zero": jnp.zeros(3),
    }
    still = jax.tree.map(jnp.zeros_like, params)
    tx = optax.chain(optax_decay.target_norm_decay(1.0, 0.3), optax.scale_by_learning_rate(0.05))
    got, _ = toy.train(tx, params, [still] * 400)
    np.testing.assert_allclose(got["small"], 0.3, rtol=1e-5)
    np.testing.assert_allclose(got["large"], -0.3, rtol=1e-5)
    np.testing.assert_array_equal(got["zero"], 0.0)


def test_a_split_matrix_in_shard_map_has_the_norm_of_the_whole():
    w = {"w": jnp.arange(1.0, 17.0).reshape(8, 2)}
    tx = optax_decay.target_norm_decay(0.5, 2.0, axis_name="fsdp")
    whole = optax_decay.target_norm_decay(0.5, 2.0)
    want = whole.update(w, whole.init(w), w)[0]["w"]
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    step = lambda w: tx.update(w, tx.init(w), w)[0]
    spec = {"w": jax.P("fsdp")}
    got = jax.shard_map(step, mesh=mesh, in_specs=(spec,), out_specs=spec)(w)["w"]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_bad_targets_are_refused():
    with pytest.raises(ValueError, match=r"target=-1 .*nearest allowed value is 0"):
        optax_decay.target_norm_decay(0.1, -1)
    with pytest.raises(ValueError, match="target='inital' is not a number"):
        optax_decay.target_norm_decay(0.1, "inital")
