"""Elementwise decays compiled for a TPU: one fused pass per leaf, no more traffic than AdamW, no temporary.

Skipped where the TPU compiler is not installed.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_decay
from train import ahead_of_time

SHAPES = {"up": (4, 512, 1024), "down": (4, 1024, 512), "norm": (4, 512), "head": (512, 2048)}
AXES = (("up", "L | D -> F"), ("down", "L | F -> D"), ("norm", "L | D"), ("head", "D -> V"))


@pytest.fixture(scope="module")
def sharding():
    try:
        device = ahead_of_time.tpu_devices()[0]
    except ahead_of_time.NotInstalled as error:
        pytest.skip(str(error))
    return jax.sharding.SingleDeviceSharding(device)


def compiled(tx, sharding):
    def place(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = place({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in SHAPES.items()})
    return ahead_of_time.report(
        step, params, place(jax.eval_shape(tx.init, params)), params, donate=(0, 1)
    )


@pytest.mark.parametrize(
    "link",
    [
        optax_decay.decay(0.1, axes=AXES),
        optax_decay.decay(
            lambda step: 0.1, axes=AXES, coupling="schedule", peak_learning_rate=1e-3
        ),
        optax_decay.decay(0.1, cautious=True, mask="hidden", axes=AXES),
        optax_decay.huber_decay(0.1, threshold=0.05, axes=AXES),
        optax_decay.huber_decay(0.1, threshold=lambda step: 0.05, axes=AXES),
        optax_decay.decay(0.1, pull=optax_decay.pseudo_huber(0.05), axes=AXES),
        optax_decay.width_scaled_decay(0.1, base_width=128, axes=AXES),
    ],
    ids=["l2", "schedule", "cautious", "huber", "huber schedule", "pseudo_huber", "width"],
)
def test_one_pass_like_adamw(link, sharding):
    def chain(decay):
        return optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(1e-3))

    ours = compiled(chain(link), sharding)
    adamw = compiled(chain(optax.add_decayed_weights(0.1)), sharding)
    assert ours.fusions == adamw.fusions == len(SHAPES)
    # The counter of the schedule is read by every leaf, in tiles of up to 4 KiB; one more pass over the smallest matrix
    # would be 4 MiB of 382.
    assert ours.bytes_accessed - adamw.bytes_accessed < 4096 * len(SHAPES)
    assert ours.temporary - adamw.temporary < 4096 * len(SHAPES)
    assert not ours.collectives
