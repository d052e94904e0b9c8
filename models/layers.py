"""What several models are made of: linear maps, embeddings, layer norm, and the way through the layers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.products import on_cpu, platform, product

GPU_LAYERS = 48  # written out at most

Shape = tuple[int, ...]


class Linear(nnx.Module):
    """A matrix from the last axes of an array to new ones: kernel [*inputs, *outputs], bias [*outputs].

    The product itself has two axes a side: XLA for CPUs is twice as fast at the gradient of that
    than at one that sums over sequences and positions.
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
        return y + self.bias[...].astype(y.dtype) if hasattr(self, "bias") else y


class LayerNorm(nnx.Module):
    """Features of mean 0 and variance 1 (arXiv 1607.06450), in float32; then scale and bias."""

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
    """Where the activations of a model are; here, wherever XLA puts them.

    On a mesh whose axes split both sequences and weights a model is given one that says it
    (`jax.lax.with_sharding_constraint`), else XLA may gather sequences instead of weights.
    """

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Activations as they come from a layer, or go into the first."""
        return x_BTD

    def look_up(self, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        """The rows of the tokens [B, T, D], before anything is added to them."""
        return table_VD[tokens_BT]


class Embedding(nnx.Module):
    """One row of features per token or position."""

    def __init__(self, rows: int, width: int, std: float, rngs: nnx.Rngs):
        noise = jax.random.normal(rngs.params(), (rows, width), jnp.float32)
        self.embedding = nnx.Param(std * noise)


def in_turn(layer, x: jax.Array, stacks: Any, config: Any) -> jax.Array:
    """`layer` (x, part) -> (x, None) on every part of `stacks`, one after the other.

    What the backward pass recomputes is in a model's `Config.remat`.
    """
    together = unrolled(config)
    if config.remat != "none":
        # Where a loop is written out, nothing but a barrier keeps XLA from finding both computations equal.
        policy = dots if config.remat == "dots" else None
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=together > 1)
    return jax.lax.scan(layer, x, stacks, unroll=together)[0]


def dots(primitive: Any, *shapes: Any, **parameters: Any) -> Any:
    """What `remat="dots"` keeps: products of matrices, and all that attention has to be repeated for.

    Attention's result has a name for that. The kernel of NVIDIA GPUs has a second result that its backward pass
    needs: without it the kernel would run again.
    """
    kernel = "dot_product_attention_fwd" in primitive.name
    return kernel or _NAMED_AND_DOTS(primitive, *shapes, **parameters)


_NAMED_AND_DOTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("attention"),
)


def unrolled(config: Any) -> int:
    """How many layers are written out in each turn of the loop over them.

    A loop copies what every layer keeps for its backward pass, into arrays of all layers that begin as zeros, and keeps
    some of it several times. On CPUs with fast products that is a fourth of a step; compiled for an H200 it is a third
    or more of the least time and about half of the temporary memory, and 24 layers take 12 s to compile instead of 9.
    """
    if platform() == "gpu":
        return config.layers if config.layers <= GPU_LAYERS else 1
    few = config.layers <= 8 and config.dtype == "bfloat16" and on_cpu()
    return config.layers if few else 1
