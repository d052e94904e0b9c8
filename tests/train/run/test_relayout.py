"""Layers as a stack or one by one: a run goes on in the other layout with the same bits, radii included."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from tests.support import toy
from train.config.fields import Config, UserError
from train.config.tree import replace
from train.run import relayout
from train.run.checkpoints import Checkpoints, describe, flat

RATE = 0.05
STACKED = (("blocks/up", "L | D -> F"), ("blocks/gain", "L | D"), ("head", "D -> V"))
UNROLLED = {
    "numbered": ((r"blocks_[0-9]+/up", "D -> F"), (r"blocks_[0-9]+/gain", "D"), ("head", "D -> V")),
    "list": ((r"blocks/[0-9]+/up", "D -> F"), (r"blocks/[0-9]+/gain", "D"), ("head", "D -> V")),
}


def optimizer(axes):
    return optax.chain(
        optax.scale_by_adam(),
        optax_decay.toward_initial_decay(0.1, mask="head", axes=axes),
        optax.scale_by_learning_rate(RATE),
        optax_decay.hyperball(learning_rate=RATE, axes=axes),
    )


def stacked(seed=0, layers=3):
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return {"blocks": {"up": make(layers, 4, 6), "gain": make(layers, 4)}, "head": make(4, 9)}


def unrolled(params, layout):
    parts = [jax.tree.map(lambda x, k=k: x[k], params["blocks"]) for k in range(3)]
    if layout == "numbered":
        return {**{f"blocks_{k}": part for k, part in enumerate(parts)}, "head": params["head"]}
    return {"blocks": parts, "head": params["head"]}


def saved_and_restored(folder, params, tx, grads, other_params, other_tx):
    """Trains, saves, and restores as another layout; the state before and after."""
    params, state = toy.train(tx, params, grads)
    before = {"params": params, "optimizer": state, "step": jnp.asarray(len(grads), jnp.int32)}
    with Checkpoints(folder, 3) as checkpoints:
        checkpoints.save(before, describe(Config(), "text", before), len(grads))
        checkpoints.wait()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    empty = lambda: {
        "params": other_params,
        "optimizer": other_tx.init(other_params),
        "step": jnp.asarray(0, jnp.int32),
    }
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), jax.eval_shape(empty)
    )
    meta = describe(replace(Config(), {"optimizer.b1": 0.8}), "text", abstract)
    said = []
    with Checkpoints(folder, 3) as checkpoints:
        found = checkpoints.restore(abstract, meta, said.append, other_tx.init)
    assert found is not None
    return before, found[0], said


@pytest.mark.parametrize("layout", UNROLLED)
@pytest.mark.parametrize("way", ["apart", "together"])
def test_a_run_goes_on_in_the_other_layout_with_the_same_bits(layout, way, tmp_path):
    stack, apart = optimizer(STACKED), optimizer(UNROLLED[layout])
    grads = [stacked(seed) for seed in range(1, 7)]
    ways = {
        "apart": (lambda x: x, stack, lambda x: unrolled(x, layout), apart),
        "together": (lambda x: unrolled(x, layout), apart, lambda x: x, stack),
    }
    first, tx, second, other = ways[way]
    before, after, said = saved_and_restored(
        tmp_path,
        first(stacked()),
        tx,
        [first(g) for g in grads[:3]],
        second(stacked(seed=9)),
        other,
    )
    assert "reset" not in said[0] and "dropped" not in said[0]
    # Weights and moments, to the last bit.
    want = {"params": before["params"], "mu": before["optimizer"][0].mu}
    got = {"params": after["params"], "mu": after["optimizer"][0].mu}
    for name in want:
        a, b = (want[name], got[name]) if way == "apart" else (got[name], want[name])
        jax.tree.map(np.testing.assert_array_equal, unrolled(a, layout), b)
    # Radii: of the first step, which the weights in the other layout have forgotten.
    radii = [state["optimizer"][3].radius for state in (before, after)]
    whole, parts = radii if way == "apart" else radii[::-1]
    name = {"numbered": "blocks_{}/up", "list": "blocks/{}/up"}[layout]
    for k in range(3):
        np.testing.assert_array_equal(whole["blocks/up"][k], parts[name.format(k)])
    np.testing.assert_array_equal(
        after["optimizer"][1].initial["head"], before["optimizer"][1].initial["head"]
    )
    # It is the same run.
    params, state = after["params"], after["optimizer"]
    for g in grads[3:]:
        updates, state = other.update(second(g), state, params)
        params = optax.apply_updates(params, updates)
    straight, _ = toy.train(tx, first(stacked()), [first(g) for g in grads])
    a, b = (straight, params) if way == "apart" else (params, straight)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), unrolled(a, layout), b
    )


def test_another_number_of_layers_is_another_model(tmp_path):
    fewer = {"blocks_0": {"up": jnp.ones((4, 6)), "gain": jnp.ones(4)}, "head": jnp.ones((4, 9))}
    with pytest.raises(UserError, match="Only the optimizer of a run can change, not its model"):
        saved_and_restored(
            tmp_path,
            stacked(),
            optimizer(STACKED),
            [stacked(1)],
            fewer,
            optimizer(UNROLLED["numbered"]),
        )


def test_only_whole_stacks_of_equal_type_are_taken_apart():
    of = lambda tree: {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in flat(tree).items()}
    old = of({"a": np.zeros((2, 3), np.float32)})
    both = {f"a_{k}": np.zeros(3, np.float32) for k in range(2)}
    assert relayout.pieces(old, of(both)) == {"a_0": (("a", 0),), "a_1": (("a", 1),)}
    assert relayout.pieces(of(both), old) == {"a": (("a_0", None), ("a_1", None))}
    assert not relayout.pieces(old, of({"a_0": np.zeros(3, np.float32)}))
    assert not relayout.pieces(old, of({p: x.astype(np.float16) for p, x in both.items()}))
    # Where both layouts have the same array, nothing is taken from the other.
    same = {"a": np.zeros((2, 3), np.float32)}
    assert not relayout.pieces(of({**both, **same}), of({**same, **both}))
