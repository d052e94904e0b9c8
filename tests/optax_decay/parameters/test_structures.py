"""Results that depend on a tree's structure are computed once for each, and never from values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay.parameters.structures import once_per_structure
from tests.support import toy


def test_once_for_each_structure_shape_and_dtype():
    seen = []
    known = once_per_structure(lambda shapes: seen.append(shapes) or len(seen))
    one = {"a": jnp.zeros((2, 3)), "b": None}
    assert known(one) == known({"a": jnp.ones((2, 3)), "b": None}) == 1
    assert isinstance(seen[0]["a"], jax.ShapeDtypeStruct) and seen[0]["b"] is None
    others = [
        {"a": jnp.zeros((3, 2)), "b": None},
        {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": None},
        {"a": jnp.zeros((2, 3)), "b": optax.MaskedNode()},
        {"a": jnp.zeros((2, 3)), "c": None},
    ]
    assert [known(tree) for tree in others] == [2, 3, 4, 5]
    assert known(one) == 1


def test_static_data_of_a_container_belongs_to_its_structure():
    @jax.tree_util.register_pytree_node_class
    class Loose:
        def __init__(self, w, names):
            self.w, self.names = w, names

        def tree_flatten(self):
            return (self.w,), self.names

        @classmethod
        def tree_unflatten(cls, names, children):
            return cls(*children, names)

    seen = []
    known = once_per_structure(lambda shapes: seen.append(shapes) or len(seen))
    trees = [Loose(jnp.ones(2), {"not": name}) for name in ("hashable", "hashable", "the same")]
    assert [known(tree) for tree in trees] == [1, 1, 2]


def test_a_decay_reads_its_mask_once_and_two_decays_share_nothing():
    calls = []

    def mask(shapes):
        calls.append(1)
        return jax.tree.map(lambda x: x.ndim > 1, shapes)

    one, two = optax_decay.decay(0.1, mask=mask), optax_decay.decay(0.1, mask="head", axes=toy.AXES)
    weights, g = toy.params(), toy.gradients(1)[0]
    state = one.init(weights)
    for _ in range(3):
        updates, state = jax.jit(one.update)(g, state, weights)
    assert len(calls) == 1
    other, _ = two.update(g, two.init(weights), weights)
    assert np.any(updates["mix"]["kernel"] != g["mix"]["kernel"])
    np.testing.assert_array_equal(other["mix"]["kernel"], g["mix"]["kernel"])
    with pytest.raises(ValueError, match="no axes rule matches"):
        two.init({**weights, "new": jnp.ones((2, 2))})
