"""Conda's rotations: on which side a matrix is turned, by which basis, and how the basis is renewed.

Matrices are ``[B, inputs, outputs]``, bases ``[B, r, r]`` unitary with r the rotated side. ``inputs``: ``x̂ = Qᴴ x``;
``outputs``: ``x̂ = x Q``. The basis is that of the singular vectors of the momentum m on that side, largest singular
value first, either from a singular value decomposition or from the eigenvectors of the Gram matrix, which are the
same up to signs, and signs cancel.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_decay.matrices.orthogonal import adjoint
from optax_decay.matrices.stacks import map_matrices
from optax_decay.parameters.axes import Signature

SIDES = ("std", "left", "right")
BASES = ("eigh", "svd")
# A direction that holds less than this fraction of the largest one, in float32, is rounding noise.
NOISE = 64.0

Leaves = Mapping[str, jax.Array]


def rotated_side(signature: Signature, side: str, square_side: str) -> str:
    """``"inputs"`` or ``"outputs"``, whichever is turned.

    Raises:
        ValueError: a fixed side that is the larger one of this matrix.
    """
    fan_in, fan_out = signature.fan_in, signature.fan_out
    if side == "std":
        if fan_in == fan_out:
            return square_side
        return "inputs" if fan_in < fan_out else "outputs"
    chosen = "inputs" if side == "right" else "outputs"
    if (fan_in > fan_out) if chosen == "inputs" else (fan_out > fan_in):
        raise ValueError(
            f"side={side!r} turns the {chosen}, the larger side of {signature.path!r} ({fan_in} inputs, "
            f"{fan_out} outputs); use side='std'."
        )
    return chosen


def identity(zeros: jax.Array, signature: Signature, side: str) -> jax.Array:
    """The first basis, ``[*batch_shape, r, r]``, of a parameter whose first moment is `zeros`."""
    r = signature.fan_in if side == "inputs" else signature.fan_out
    # A sum of zeros, so that the basis lives where its slices of the parameter live.
    return jnp.eye(r, dtype=zeros.dtype) + jnp.sum(zeros, signature.reduced)[..., None, None]


def all_directions(bases: Leaves) -> dict[str, jax.Array]:
    """The mask of `renewed` where nothing is renewed."""
    return {path: jnp.ones_like(q[..., 0], dtype=bool) for path, q in bases.items()}


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST)


def rotate(x: jax.Array, q: jax.Array, side: str) -> jax.Array:
    """Into the basis."""
    if side == "inputs":
        return _einsum("bji,bjo->bio", jnp.conj(q), x)
    return _einsum("bij,bjo->bio", x, q)


def unrotate(x: jax.Array, q: jax.Array, side: str) -> jax.Array:
    """Out of the basis."""
    if side == "inputs":
        return _einsum("bij,bjo->bio", q, x)
    return _einsum("bij,boj->bio", x, jnp.conj(q))


def core(m: jax.Array, side: str, method: str) -> tuple[jax.Array, jax.Array]:
    """A ``[B, r, r]`` matrix whose left singular vectors are the basis, and ``[B]``, False where m is zero."""
    top = jnp.max(jnp.abs(m), axis=(1, 2))
    nonzero = top != 0  # true for nan, so that nan stays visible
    x = m / jnp.where(nonzero, top, 1)[:, None, None]  # squares neither under- nor overflow
    x = x if side == "inputs" else adjoint(x)
    if method == "eigh":
        return _einsum("bij,bkj->bik", x, jnp.conj(x)), nonzero
    return adjoint(jnp.linalg.qr(adjoint(x), mode="r")), nonzero


def directions(stack: jax.Array, method: str) -> jax.Array:
    """The basis from the core, largest singular value first."""
    if method == "eigh":
        return jnp.linalg.eigh(stack, symmetrize_input=False)[1][..., ::-1]
    return jnp.linalg.svd(stack, full_matrices=False)[0]


def momentum(g: jax.Array, mu: jax.Array, q: jax.Array, side: str, b1: Any) -> jax.Array:
    """The first moment after this gradient, in the parameter's own coordinates."""
    return b1 * unrotate(mu, q, side) + (1 - b1) * g


def renewed(
    g: jax.Array, mu: jax.Array, old: jax.Array, new: jax.Array, side: str, b1: Any
) -> tuple[jax.Array, jax.Array]:
    """The rotated first moment carried over to a new basis, and which directions are more than noise.

    In directions that neither the momentum nor the gradient has, projections are rounding errors, which Adam would
    blow up to full size. They count as zero in the step that renews the basis.

    Returns:
        ``[B, inputs, outputs]`` and bool ``[B, r]``.
    """
    mu = rotate(unrotate(mu, old, side), new, side)
    present = b1 * mu + (1 - b1) * rotate(g, new, side)
    length = jnp.max(jnp.abs(present), axis=2 if side == "inputs" else 1)
    floor = NOISE * jnp.finfo(length.dtype).eps * jnp.max(length, axis=1, keepdims=True)
    keep = ~(length <= floor)
    return jnp.where(spread(keep, side), mu, 0), keep


def spread(keep: jax.Array, side: str) -> jax.Array:
    return keep[:, :, None] if side == "inputs" else keep[:, None, :]


def refresh(
    grads: Leaves,
    mus: Leaves,
    bases: Leaves,
    *,
    sides: Mapping[str, str],
    b1: Any,
    method: str,
    stack_axes: Any,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
    """New bases of every matrix, by one decomposition program per size.

    Returns:
        Rotated first moments, bases and masks of directions (`renewed`), by path. A momentum of zero keeps its basis.
    """
    cores, nonzero = {}, {}
    groups: dict[int, list[str]] = {}
    for path, g in grads.items():
        m = momentum(g, mus[path], bases[path], sides[path], b1)
        cores[path], nonzero[path] = core(m, sides[path], method)
        groups.setdefault(cores[path].shape[1], []).append(path)
    found = {}
    for paths in groups.values():
        # One after the other: a batch would hold the workspace of all in memory during every step.
        stacks = map_matrices(
            lambda stack: directions(stack, method),
            [cores[path] for path in paths],
            stack_axes=stack_axes,
            entries_at_once=1,
        )
        found.update(zip(paths, stacks))
    new_mus, new_bases, keeps = {}, {}, {}
    for path, g in grads.items():
        old = bases[path]
        new_bases[path] = jnp.where(nonzero[path][:, None, None], found[path], old)
        new_mus[path], keeps[path] = renewed(g, mus[path], old, new_bases[path], sides[path], b1)
    return new_mus, new_bases, keeps


def refresh_staggered(
    grads: Leaves,
    mus: Leaves,
    bases: Leaves,
    count: jax.Array,
    refresh_every: Any,
    *,
    sides: Mapping[str, str],
    b1: Any,
    method: str,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
    """Renews the matrices whose turn it is: matrix i of the n of one size at steps with ``t mod T = floor(i T / n)``.

    Args:
        count: t, completed updates.
        refresh_every: T.

    Returns:
        As `refresh`.
    """
    mus, bases = dict(mus), dict(bases)
    keeps = all_directions(bases)
    groups: dict[int, list[str]] = {}
    for path, q in bases.items():
        groups.setdefault(q.shape[1], []).append(path)
    for paths in groups.values():
        owner = [k for k, path in enumerate(paths) for _ in range(len(bases[path]))]
        index = [j for path in paths for j in range(len(bases[path]))]
        period = jnp.asarray(refresh_every, jnp.int32)
        phase = count % period
        first = -((-phase * len(owner)) // period)
        last = -((-(phase + 1) * len(owner)) // period)
        table = jnp.array([owner, index], jnp.int32)

        def one(i: jax.Array, carry: Any, paths: Any = paths, table: Any = table) -> Any:
            k, j = table[0, i], table[1, i]
            return _refresh_one(k, j, carry, grads, paths, sides, b1, method)

        carry = tuple({p: x[p] for p in paths} for x in (mus, bases, keeps))
        carry = jax.lax.fori_loop(first, last, one, carry)
        for target, values in zip((mus, bases, keeps), carry):
            target.update(values)
    return mus, bases, keeps


def _refresh_one(
    k: jax.Array,
    j: jax.Array,
    carry: Any,
    grads: Leaves,
    paths: list[str],
    sides: Mapping[str, str],
    b1: Any,
    method: str,
) -> Any:
    """Renews slice j of leaf k; the decomposition is compiled once, whichever leaf it is for."""
    mus, bases, _ = carry

    def one(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, j, 1)

    def core_of(path: str) -> Any:
        def branch() -> tuple[jax.Array, jax.Array]:
            arrays = (one(grads[path]), one(mus[path]), one(bases[path]))
            return core(momentum(*arrays, sides[path], b1), sides[path], method)

        return branch

    matrix, nonzero = jax.lax.switch(k, [core_of(path) for path in paths])
    found = directions(matrix, method)

    def write(path: str, values: Any) -> Any:
        mu, q, keep = values
        new = jnp.where(nonzero[:, None, None], found, one(q))
        parts = (*renewed(one(grads[path]), one(mu), one(q), new, sides[path], b1),)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old, part, j, 0)
            for old, part in ((mu, parts[0]), (q, new), (keep, parts[1]))
        )

    out: Any = ({}, {}, {})
    for number, path in enumerate(paths):
        values = jax.lax.cond(
            k == number,
            lambda v, path=path: write(path, v),
            lambda v: v,
            tuple(x[path] for x in carry),
        )
        for target, value in zip(out, values):
            target[path] = value
    return out
