"""Modules that several models share: linear maps, embeddings, layer norm, and the loop over the layers."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.embedding import rows
from models.products import contiguous, on_cpu, platform, product, split_by_mesh

GPU_LAYERS = 48  # models with more layers run them in a loop on GPUs

Shape = tuple[int, ...]


class Linear(nnx.Module):
    """A linear map from the last axes of an array to new axes: kernel [*inputs, *outputs], bias [*outputs].

    Both factors of the product are reshaped to two axes. XLA for CPUs computes the gradient of such a product twice as
    fast as that of a product which sums over the two axes of sequences and positions.
    """

    def __init__(
        self, inputs: Shape, outputs: Shape, std: float, rngs: nnx.Rngs, bias: bool = False
    ):
        self.inputs, self.outputs = inputs, outputs
        shape = (*inputs, *outputs)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, x: jax.Array, dtype: Any = None) -> jax.Array:
        matrix = self.kernel[...].reshape(math.prod(self.inputs), -1)
        y = product(x.reshape(-1, matrix.shape[0]), matrix, dtype)
        y = y.reshape(*x.shape[: x.ndim - len(self.inputs)], *self.outputs)
        return self.biased(y)

    def biased(self, y: jax.Array) -> jax.Array:
        """The result with the bias, where there is one."""
        return y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y


def joins() -> bool:
    """Whether several linear maps of one array are one product: on one GPU."""
    return platform() == "gpu" and not split_by_mesh()


def joined(x: jax.Array, *maps: Linear) -> jax.Array:
    """The results of linear maps of one array without their biases, behind one another: [..., outputs of all maps].

    One product with all their matrices reads `x` once instead of once per map, and its backward pass needs no sum of
    the gradients that the maps would have.
    """
    matrices = [one.kernel[...].reshape(math.prod(one.inputs), -1).astype(x.dtype) for one in maps]
    y = product(x.reshape(-1, matrices[0].shape[0]), jnp.concatenate(matrices, axis=1))
    return y.reshape(*x.shape[: x.ndim - len(maps[0].inputs)], -1)


def side_by_side(x: jax.Array, *maps: Linear) -> list[jax.Array]:
    """The results of several linear maps of one array, [map(x) for map in maps]; on one GPU from one product."""
    if not joins():
        return [one(x) for one in maps]
    y = joined(x, *maps)
    ends = list(itertools.accumulate(math.prod(one.outputs) for one in maps))
    parts = jnp.split(y, ends[:-1], axis=-1)
    return [one.biased(part.reshape(*y.shape[:-1], *one.outputs)) for one, part in zip(maps, parts)]


class LayerNorm(nnx.Module):
    """Layer norm (arXiv 1607.06450): features of mean 0 and variance 1, computed in float32; then scale and bias."""

    def __init__(self, width: int, eps: float, bias: bool = True):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        y_BTD = x_BTD.astype(jnp.float32)
        y_BTD -= jnp.mean(y_BTD, axis=-1, keepdims=True)
        y_BTD *= jax.lax.rsqrt(jnp.mean(y_BTD**2, axis=-1, keepdims=True) + self.eps)
        y_BTD *= self.scale[...]
        if hasattr(self, "bias"):
            y_BTD += self.bias[...]
        return y_BTD.astype(x_BTD.dtype)


class Placement:
    """Constrains the sharding of a model's activations. This class leaves the choice to XLA.

    On a mesh whose axes split both sequences and weights, pass a subclass that uses `jax.lax.with_sharding_constraint`.
    Without it, XLA may gather sequences instead of weights.
    """

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """The activations after a layer, or before the first one."""
        return x_BTD

    def look_up(self, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        """The rows of the embedding for the tokens, [B, T, D]."""
        return rows(table_VD, tokens_BT)


class Embedding(nnx.Module):
    """A table with one row of features per token or position."""

    def __init__(self, rows: int, width: int, std: float, rngs: nnx.Rngs):
        noise = jax.random.normal(rngs.params(), (rows, width), jnp.float32)
        self.embedding = nnx.Param(std * noise)


def with_positions(x_BTD: jax.Array, position_TD: jax.Array) -> jax.Array:
    """x + position.

    On one GPU, the features of the sum stay contiguous in memory. XLA would otherwise put the batch last, as it likes
    for the gradient of the positions, which is summed over the batch. All activations that are added to x would follow,
    and they would be transposed before and after every norm.
    """
    y_BTD = x_BTD + position_TD
    one = jax.sharding.get_abstract_mesh().size <= 1
    return contiguous(y_BTD) if one and platform() == "gpu" else y_BTD


def apply_layers(layer, x: jax.Array, stacks: Any, config: Any) -> jax.Array:
    """Applies `layer`, a function (x, part) -> (x, None), with one part of `stacks` after the other.

    `Config.remat` of the model says what the backward pass recomputes.
    """
    together = layers_per_iteration(config)
    if config.remat != "none":
        # In an unrolled loop XLA would merge the recomputation with the first computation; prevent_cse stops it.
        policy = dots if config.remat == "dots" else None
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=together > 1)
    return jax.lax.scan(layer, x, stacks, unroll=together)[0]


def dots(primitive: Any, *shapes: Any, **parameters: Any) -> Any:
    """The policy of `remat="dots"`: keeps products of matrices and the results of attention.

    The models name the result of attention for this purpose. The attention kernel of NVIDIA GPUs has a second result
    that its backward pass needs; if it were not kept, the kernel would run again.
    """
    kernel = "dot_product_attention_fwd" in primitive.name
    return kernel or _NAMED_AND_DOTS(primitive, *shapes, **parameters)


_NAMED_AND_DOTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("attention"),
)


def layers_per_iteration(config: Any) -> int:
    """The number of layers that each iteration of the loop holds: all of them (the loop is unrolled), or one.

    A loop copies what every layer keeps for its backward pass into arrays of all layers that start as zeros, and keeps
    some of it several times. On CPUs with fast products this takes a fourth of a step. Compiled for an H200 it is a
    third or more of the estimated time and about half of the temporary memory. Unrolled, 24 layers take 12 s to compile
    instead of 9.
    """
    if platform() == "gpu":
        return config.layers if config.layers <= GPU_LAYERS else 1
    few = config.layers <= 8 and config.dtype == "bfloat16" and on_cpu()
    return config.layers if few else 1
