"""Matrix products: one function that every model uses, with a fast path for bfloat16 on CPUs.

    y = a b,    ∂a = ∂y bᵀ,    ∂b = aᵀ ∂y      each summed in float32, then rounded to its own dtype

On accelerators this is `jnp.matmul` and its derivative. There ∂b is first rounded to the dtype of `a`, and summed over
devices in that dtype.

XLA for CPUs uses the processor's bfloat16 units only under two conditions: both factors, [n, k] and [k, m], are
contiguous along their last axis in memory, and the result is float32. The CPU path meets these conditions, also for the
transposed matrices of the backward pass, which it copies to the required layout. Its products are one and a half to
three times as fast as float32 products.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def platform() -> str:
    """The platform that is traced for: "cpu", "gpu" or "tpu"; that of the mesh in context, else JAX's default."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def on_cpu() -> bool:
    return platform() == "cpu"


def uses_cpu_kernel(a: jax.Array) -> bool:
    """Whether products with `a` as the first factor take the CPU path."""
    return a.dtype == jnp.bfloat16 and on_cpu()


def product(a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
    """The matrix product a b over the last two axes. The leading axes of both factors are equal.

    Args:
      a: [..., n, k].
      b: [..., k, m]; rounded to the dtype of `a` first.
      dtype: of the result; None means the dtype of `a`.

    Returns:
      [..., n, m].
    """
    dtype = jnp.dtype(dtype or a.dtype)
    if uses_cpu_kernel(a):
        return _on_cpu(dtype, a, b)
    return jnp.matmul(a, b.astype(a.dtype), preferred_element_type=dtype)


def gradients(a: jax.Array, b: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients ∂a and ∂b of `product(a, b)` in float32, from ∂y rounded to the dtype of `a`."""
    dy, matmul = dy.astype(a.dtype), _matmul_of_rows if uses_cpu_kernel(a) else _matmul
    return matmul(dy, b.mT.astype(a.dtype)), matmul(a.mT, dy)


def _rows(x: jax.Array) -> jax.Array:
    """`x` in a memory layout whose last axis is contiguous."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _matmul_of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    # XLA for CPUs cannot run this product with another layout of the result.
    return _rows(_matmul(_rows(a), _rows(b)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_cpu(dtype: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    return _matmul_of_rows(a, b.astype(a.dtype)).astype(dtype)


def _forward(dtype: Any, a: jax.Array, b: jax.Array) -> tuple[jax.Array, Any]:
    return _matmul_of_rows(a, b.astype(a.dtype)).astype(dtype), (a, b)


def _backward(dtype: Any, kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    del dtype
    a, b = kept
    da, db = gradients(a, b, dy)
    return da.astype(a.dtype), db.astype(b.dtype)


_on_cpu.defvjp(_forward, _backward)
