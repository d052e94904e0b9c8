"""The models on a mesh: weights over fsdp and tensor, sequences over data and fsdp."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from optax_decay.parameters import axes
from tests.models.test_models import (
    GPT,
    ODD,
    abstract,
    family,
    loss,
    rms,
    some_tokens,
    unseen,
    weights,
)
from train.step import sharding


def mesh_shardings(config, sizes):
    """A mesh (data, fsdp, tensor), where weights go on it, and where sequences go."""
    mesh = jax.make_mesh((1, *sizes), sharding.NAMES, sharding.KINDS)
    places = {"D": "fsdp", "H": "tensor", "K": "tensor", "F": "tensor", "V": "tensor"}
    weight_shardings = jax.tree.map(
        lambda s: NamedSharding(mesh, PartitionSpec(*(places.get(n) for n in s.names))),
        axes.resolve(family(config).axes(config), abstract(config)),
        is_leaf=lambda x: isinstance(x, axes.Signature),
    )
    return mesh, weight_shardings, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


@pytest.mark.parametrize(
    ("model", "dtype", "placed"),
    [
        (ODD, "float32", False),
        (ODD, "float32", True),
        (ODD, "bfloat16", False),
        (ODD, "bfloat16", True),
        (GPT, "float32", True),
    ],
)
def test_sharded_weights_change_nothing(model, dtype, placed):
    """Weights over fsdp and tensor, sequences over data and fsdp, model code untouched."""
    config = dataclasses.replace(model, width=32, heads=8, vocab_size=64, dtype=dtype)
    params, tokens = weights(config), some_tokens(config, B=8)
    mesh, weight_shardings, rows = mesh_shardings(config, (2, 2, 2))
    place = sharding.Activations(mesh) if placed else None
    step = jax.jit(jax.value_and_grad(lambda p, t: loss(config, p, t)))
    alone, alone_gradient = step(params, tokens)
    sharded = jax.device_put(params, weight_shardings)
    assert len(sharded["blocks"]["mlp"]["up"]["kernel"].addressable_shards[0].data[0]) == 16
    with jax.set_mesh(mesh):
        placed_step = jax.jit(jax.value_and_grad(lambda p, t: loss(config, p, t, place)))
        together, gradient = placed_step(sharded, jax.device_put(tokens, rows))
    # A sharded sum adds the same numbers in another order. In a sum of n numbers rounding errs by
    # about sqrt(n) units, as if each weight were off by that much: what that does is measured.
    unit = {"float32": 2.0**-24, "bfloat16": 2.0**-9}[dtype] * np.sqrt(config.mlp_width)
    rng = np.random.default_rng(1)
    off = jax.tree.map(lambda w: w * (1 + unit * rng.normal(size=w.shape)), params)
    off = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), off)
    off_loss, off_gradient = step(off, tokens)
    assert abs(float(alone - together)) < 8 * unit * float(alone)
    assert abs(float(alone - off_loss)) < 8 * unit * float(alone)
    trees = (alone_gradient, gradient, off_gradient)
    for (path, a), b, c in zip(
        jax.tree_util.tree_leaves_with_path(trees[0]), *map(jax.tree.leaves, trees[1:])
    ):
        assert unseen(path) or rms(a - b) < rms(a - c) < 0.5 * rms(a), path


def test_placed_activations_stay_with_their_sequences(as_for_users):
    """With fsdp, what travels between devices is weights: that is what `place` is for."""
    config = dataclasses.replace(ODD, width=32, heads=8, vocab_size=64)
    mesh, weight_shardings, rows = mesh_shardings(config, (1, 8, 1))
    tokens = jax.ShapeDtypeStruct((32, 65), np.int32)

    def most_communicated(place):
        step = jax.jit(
            jax.value_and_grad(lambda p, t: loss(config, p, t, place)),
            in_shardings=(weight_shardings, rows),
            out_shardings=(None, weight_shardings),
        )
        program = step.lower(abstract(config), tokens).compile().as_text()
        moved = r"= \(?f32\[([\d,]+)\]\S* (?:all-gather|all-reduce|reduce-scatter|all-to-all)"
        return max(
            np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(moved, program)
        )

    largest_matrix = max(leaf.size for leaf in jax.tree.leaves(abstract(config)))
    activations = 32 * 64 * config.width
    assert largest_matrix < activations
    assert most_communicated(sharding.Activations(mesh)) <= largest_matrix
    # If this fails, XLA has become wiser and `place` may not be needed any more.
    assert most_communicated(None) >= activations
