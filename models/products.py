"""Matrix products: one function that every model uses, with a fast path for bfloat16 on CPUs.

    y = a b,    ∂a = ∂y bᵀ,    ∂b = aᵀ ∂y      each summed in float32, then rounded to its own dtype

On accelerators this is `jnp.matmul` and its derivative. There ∂b is first rounded to the dtype of `a`, and summed over
devices in that dtype.

XLA for CPUs uses the processor's bfloat16 units only under two conditions: both factors, [n, k] and [k, m], are
contiguous along their last axis in memory, and the result is float32. The CPU path meets these conditions, also for the
transposed matrices of the backward pass, which it copies to the required layout. Its products are one and a half to
three times as fast as float32 products.

The fast products of GPUs need rows of a multiple of 16 bytes. On an H200, the MLP of LLaMA-1B, which is 5461 wide, runs
at a third of the speed of one that is 5504 wide. On accelerators the factors are therefore padded with zeros where an
axis of a matrix is no multiple of `ALIGNED`, and the result is cut; XLA does this in the elementwise kernels beside the
product. The results are those of the plain product.

In float32, GPUs of NVIDIA round both factors to TF32, which has 10 bits after the leading one, and TPUs to bfloat16;
sums are float32. This is the default of JAX. The models keep it, because its rounding is smaller than or equal to that
of bfloat16, in which models are usually trained. `jax_default_matmul_precision="highest"` asks for all bits. The
optimizers of optax_decay ask for them wherever a rounded product would be amplified: bases, Gram matrices, exact
orthogonal factors.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType

ALIGNED = 8  # elements: 16 bytes of bfloat16
TILE = 128  # elements: products of GPUs work on tiles of this size


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


def split_by_mesh() -> bool:
    """Whether arrays here may be split over several devices. Inside `jax.shard_map` over all axes they are not."""
    return bool(_splits())


def _splits() -> list[int]:
    """Sizes above 1 of the mesh axes that arrays here may be split over."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_sizes, mesh.axis_types)
    return [n for n, kind in kinds if n > 1 and kind != AxisType.Manual]


def aligned(size: int) -> int:
    """The size to which an axis of a matrix is padded: itself on CPUs, and where it is a multiple of `ALIGNED`.

    Other sizes become a multiple of `TILE` where that adds less than 2 %, else the next multiple of `ALIGNED`. An axis
    that a mesh of several devices may split evenly keeps its size, because padding would move data between them.
    """
    if on_cpu() or size % ALIGNED == 0 or any(size % n == 0 for n in _splits()):
        return size
    tiles = -(-size // TILE) * TILE
    return tiles if tiles <= 1.02 * size else -(-size // ALIGNED) * ALIGNED


def padded(x: jax.Array, *sides: int) -> jax.Array:
    """`x` with zeros behind its last axes, so that these have the given `sides`."""
    last = [(0, side - size, 0) for side, size in zip(sides, x.shape[-len(sides) :])]
    if not any(behind for _, behind, _ in last):
        return x
    return jax.lax.pad(x, jnp.zeros([], x.dtype), [(0, 0, 0)] * (x.ndim - len(sides)) + last)


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
    m, (K, M) = b.shape[-1], map(aligned, b.shape[-2:])
    a, b = padded(a, K), padded(b.astype(a.dtype), K, M)
    return jnp.matmul(a, b, preferred_element_type=dtype)[..., :m]


def gradients(a: jax.Array, b: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients ∂a and ∂b of `product(a, b)` in float32, from ∂y rounded to the dtype of `a`."""
    dy, b = dy.astype(a.dtype), b.astype(a.dtype)
    if uses_cpu_kernel(a):
        return _matmul_of_rows(dy, b.mT), _matmul_of_rows(a.mT, dy)
    (k, m), (K, M) = b.shape[-2:], map(aligned, b.shape[-2:])
    a, b, dy = padded(a, K), padded(b, K, M), padded(dy, M)
    return _matmul(dy, b.mT)[..., :k], _matmul(a.mT, dy)[..., :k, :m]


def contiguous(x: jax.Array) -> jax.Array:
    """`x` in a memory layout whose last axis is contiguous."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _matmul_of_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    # XLA for CPUs cannot run this product with another layout of the result.
    return contiguous(_matmul(contiguous(a), contiguous(b)))


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
