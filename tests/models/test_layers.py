"""On a GPU, maps of one array are one product, and the gated MLP has a backward pass of its own: same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import layers, llama, products
from models.layers import Linear, joined, side_by_side


def on_a_gpu(monkeypatch):
    for module in (products, layers):
        monkeypatch.setattr(module, "platform", lambda: "gpu")


def compared(found, right):
    # Sums of up to 100 products of about 1 in float32, in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, right)


@pytest.mark.parametrize("bias", [False, True])
def test_maps_of_one_array_are_one_product(monkeypatch, bias):
    rngs = nnx.Rngs(0)
    shapes = [(4, 6), (2, 6), (2, 6), (5,)]  # grouped queries, and sizes of no multiple of 8
    maps = [Linear((10,), shape, 0.5, rngs, bias) for shape in shapes]
    for i, one in enumerate(maps):
        if bias:
            one.bias[...] = jnp.arange(float(np.prod(shapes[i]))).reshape(shapes[i])
    x = np.random.default_rng(0).standard_normal((3, 7, 10)).astype(np.float32)
    graph, weights = nnx.split(tuple(maps))

    def graded(weights, x):
        def total(weights, x):
            found = side_by_side(x, *nnx.merge(graph, weights))
            assert [y.shape for y in found] == [(3, 7, *shape) for shape in shapes]
            return sum(jnp.sum(jnp.sin(i + y)) for i, y in enumerate(found)), found

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(weights, x)

    right, plain = graded(weights, x), jax.jit(graded).lower(weights, x).as_text()
    on_a_gpu(monkeypatch)
    text = jax.jit(lambda *a: graded(*a)).lower(weights, x).as_text()
    assert (plain.count("dot_general"), text.count("dot_general")) == (3 * 4, 3)
    compared(graded(weights, x), right)
    kernels = jnp.concatenate([one.kernel[...].reshape(10, -1) for one in maps], axis=1)
    compared(joined(x, *maps), x @ kernels)


def test_where_a_mesh_splits_arrays_maps_stay_apart(monkeypatch):
    on_a_gpu(monkeypatch)
    assert layers.joins()
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 4), ("data", "tensor"))):
        assert not layers.joins()
    mesh = jax.make_mesh((2,), ("member",), axis_types=(jax.sharding.AxisType.Auto,))
    seen = []

    def member(x):
        seen.append(layers.joins())
        return x

    split = jax.P("member")
    jax.jit(jax.shard_map(member, mesh=mesh, in_specs=split, out_specs=split))(jnp.ones(2))
    assert seen == [True]  # every device has an array of its own


def test_the_gated_mlp_on_a_gpu_has_the_gradients_of_the_plain_one(monkeypatch):
    config = llama.Config(width=12, mlp_width=20, layers=1, heads=2)
    mlp = llama.SwiGLU(config, nnx.Rngs(1))
    mlp.gate.kernel[...] *= 100  # gates from far below 0 to far above
    graph, weights = nnx.split(mlp)
    rng = np.random.default_rng(1)
    x = (3 * rng.standard_normal((2, 5, 12))).astype(np.float32)
    dy = rng.standard_normal((2, 5, 12)).astype(np.float32)

    def graded(weights, x):
        y, back = jax.vjp(lambda weights, x: nnx.merge(graph, weights)(x), weights, x)
        return y, back(dy)

    right = graded(weights, x)
    stacked = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), weights)
    both = [graded(jax.tree.map(lambda w, i=i: w[i], stacked), x) for i in range(2)]
    on_a_gpu(monkeypatch)
    assert "custom_jvp" in str(jax.make_jaxpr(lambda x: nnx.merge(graph, weights)(x))(x))
    compared(graded(weights, x), right)
    many = jax.vmap(graded, (0, None))(stacked, x)
    compared(many, jax.tree.map(lambda *each: jnp.stack(each), *both))
