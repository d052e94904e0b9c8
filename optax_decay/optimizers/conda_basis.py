"""The bases of Conda: which side of a matrix they rotate, and how they are computed and renewed.

Matrices are ``[B, inputs, outputs]`` and bases ``[B, r, r]``, unitary, with r the length of the rotated side. Rotating
the inputs means ``x̂ = Qᴴ x``, rotating the outputs ``x̂ = x Q``. The columns of Q are the singular vectors of the
momentum m on that side, largest singular value first. They come from a singular value decomposition or from the
eigenvectors of the Gram matrix; the two agree up to signs, and signs cancel.

Short directions are not determined by float32 numbers, and Adam enlarges them like long ones. Therefore steps of Conda
differ between devices more than those of other optimizers, although all products here are computed with all bits. In a
LLaMA of width 96, a change of the gradients by one rounding (6e-8) changes the first directions by 3e-2 on one and the
same CPU (value and out matrices), and by 6e-4 where the gradients are random; Adam's change by 5e-8.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from optax_decay.matrices.orthogonal import adjoint
from optax_decay.matrices.stacks import map_matrices
from optax_decay.parameters.axes import Signature

Side = Literal["smaller_or_inputs", "smaller_or_outputs", "inputs", "outputs"]
Method = Literal["eigh", "svd"]
SIDES = ("smaller_or_inputs", "smaller_or_outputs", "inputs", "outputs")
METHODS = ("eigh", "svd")
# Directions shorter than this many roundings (in float32) of the longest one are noise of the decomposition.
NOISE = 64.0

Leaves = Mapping[str, jax.Array]
Arrays = dict[str, jax.Array]


def rotated_side(signature: Signature, side: Side) -> str:
    """The side of this matrix that is rotated, ``"inputs"`` or ``"outputs"``.

    Raises:
        ValueError: a fixed side that is the larger one of this matrix.
    """
    fan_in, fan_out = signature.fan_in, signature.fan_out
    if side.startswith("smaller"):
        if fan_in == fan_out:
            return side.removeprefix("smaller_or_")
        return "inputs" if fan_in < fan_out else "outputs"
    if (fan_in > fan_out) if side == "inputs" else (fan_out > fan_in):
        raise ValueError(
            f"side={side!r} is the larger side of {signature.path!r} ({fan_in} inputs, {fan_out} outputs); "
            "use side='smaller_or_inputs'."
        )
    return side


def identity(zeros: jax.Array, signature: Signature, side: str) -> jax.Array:
    """The first basis, ``[*batch_shape, r, r]``, of a parameter whose first moment is `zeros`."""
    r = signature.fan_in if side == "inputs" else signature.fan_out
    # Adding a sum of zeros gives the basis the sharding of the parameter's batch axes.
    return jnp.eye(r, dtype=zeros.dtype) + jnp.sum(zeros, signature.reduced)[..., None, None]


def all_directions(bases: Leaves) -> Arrays:
    """The mask of directions (`carried_over`) for bases that are not renewed."""
    return {path: jnp.ones_like(q[..., 0], dtype=bool) for path, q in bases.items()}


def along(values: jax.Array, side: str) -> jax.Array:
    """One value per direction, ``[B, r]``, in a shape that broadcasts against ``[B, inputs, outputs]``."""
    return values[:, :, None] if side == "inputs" else values[:, None, :]


def _einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST)


def rotate(x: jax.Array, q: jax.Array, side: str) -> jax.Array:
    """Matrices in the coordinates of the basis."""
    if side == "inputs":
        return _einsum("bji,bjo->bio", jnp.conj(q), x)
    return _einsum("bij,bjo->bio", x, q)


def rotate_back(x: jax.Array, q: jax.Array, side: str) -> jax.Array:
    """The inverse of `rotate`."""
    if side == "inputs":
        return _einsum("bij,bjo->bio", q, x)
    return _einsum("bij,boj->bio", x, jnp.conj(q))


def square_form(m: jax.Array, side: str, method: Method) -> tuple[jax.Array, jax.Array]:
    """A ``[B, r, r]`` matrix with the left singular vectors of m on this side, and ``[B]``, False where m is zero.

    It is the Gram matrix for ``"eigh"``, and the triangular factor of a QR decomposition for ``"svd"``.
    """
    top = jnp.max(jnp.abs(m), axis=(1, 2))
    nonzero = top != 0  # true for nan, so that nan stays visible
    x = m / jnp.where(nonzero, top, 1)[:, None, None]  # squares neither under- nor overflow
    x = x if side == "inputs" else adjoint(x)
    if method == "eigh":
        return _einsum("bij,bkj->bik", x, jnp.conj(x)), nonzero
    return adjoint(jnp.linalg.qr(adjoint(x), mode="r")), nonzero


def singular_vectors(square: jax.Array, method: Method) -> jax.Array:
    """The basis from its `square_form`, largest singular value first."""
    if method == "eigh":
        return jnp.linalg.eigh(square, symmetrize_input=False)[1][..., ::-1]
    return jnp.linalg.svd(square, full_matrices=False)[0]


class Bases(NamedTuple):
    """How the bases of a set of matrices are renewed.

    Attributes:
        sides: the rotated side of each matrix, ``"inputs"`` or ``"outputs"``, by path.
        b1: decay of the first moment.
        method: ``"eigh"`` or ``"svd"``.
        stack_axes: mesh axes over which the decompositions are distributed, as in `scale_by_conda`.
        dtypes: of the gradients as they arrived, by path; their rounding is noise too.
    """

    sides: Mapping[str, str]
    b1: float | jax.Array
    method: Method
    stack_axes: str | Sequence[str] | None
    dtypes: Mapping[str, jax.typing.DTypeLike]

    def square_form(
        self, path: str, g: jax.Array, mu: jax.Array, q: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """`square_form` of the first moment after the gradient g, in the parameter's own coordinates."""
        side = self.sides[path]
        momentum = self.b1 * rotate_back(mu, q, side) + (1 - self.b1) * g
        return square_form(momentum, side, self.method)

    def carried_over(
        self, path: str, g: jax.Array, mu: jax.Array, old: jax.Array, new: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The rotated first moment in a new basis, and a mask of the directions that are more than noise.

        Along directions that neither the momentum nor the gradient has, projections are rounding errors (of the
        decomposition, or of gradients in 16 bits), which Adam would blow up to full size. They count as zero in the
        step that renews the basis.

        Returns:
            ``[B, inputs, outputs]`` and bool ``[B, r]``.
        """
        side = self.sides[path]
        mu = rotate(rotate_back(mu, old, side), new, side)
        present = self.b1 * mu + (1 - self.b1) * rotate(g, new, side)
        length = jnp.max(jnp.abs(present), axis=2 if side == "inputs" else 1)
        rounding = float(jnp.finfo(self.dtypes[path]).eps)
        share = max(NOISE * float(jnp.finfo(length.dtype).eps), rounding)
        floor = share * jnp.max(length, axis=1, keepdims=True)
        keep = ~(length <= floor)
        return jnp.where(along(keep, side), mu, 0), keep

    def refresh(self, grads: Leaves, mus: Leaves, bases: Leaves) -> tuple[Arrays, Arrays, Arrays]:
        """New bases of all matrices, with one compiled decomposition per size.

        Returns:
            Rotated first moments, bases and masks of directions (`carried_over`), by path. A matrix whose momentum is
            zero keeps its basis.
        """
        squares, nonzero = {}, {}
        for path, g in grads.items():
            squares[path], nonzero[path] = self.square_form(path, g, mus[path], bases[path])
        found = {}
        for paths in _by_size(squares).values():
            # One after the other: a batch would hold the workspace of all in memory during every step.
            stacks = map_matrices(
                lambda stack: singular_vectors(stack, self.method),
                [squares[path] for path in paths],
                stack_axes=self.stack_axes,
                entries_at_once=1,
            )
            found.update(zip(paths, stacks))
        new_mus, new_bases, keeps = {}, {}, {}
        for path, g in grads.items():
            old = bases[path]
            new = jnp.where(nonzero[path][:, None, None], found[path], old)
            new_bases[path] = new
            new_mus[path], keeps[path] = self.carried_over(path, g, mus[path], old, new)
        return new_mus, new_bases, keeps

    def refresh_staggered(
        self,
        grads: Leaves,
        mus: Leaves,
        bases: Leaves,
        count: jax.Array,
        refresh_every: int | jax.Array,
    ) -> tuple[Arrays, Arrays, Arrays]:
        """Renews those matrices whose turn it is.

        With T = `refresh_every` and t = `count`, the completed updates, matrix i of the n matrices of one size is
        renewed at steps with ``t mod T = floor(i T / n)``.

        Returns:
            As `refresh`.
        """
        mus, bases = dict(mus), dict(bases)
        keeps = all_directions(bases)
        for paths in _by_size(bases).values():
            leaf = [k for k, path in enumerate(paths) for _ in range(len(bases[path]))]
            index = [j for path in paths for j in range(len(bases[path]))]
            period = jnp.asarray(refresh_every, jnp.int32)
            phase = count % period
            first = -((-phase * len(leaf)) // period)
            last = -((-(phase + 1) * len(leaf)) // period)
            table = jnp.array([leaf, index], jnp.int32)

            def one(i: jax.Array, carry: Any, paths: Any = paths, table: Any = table) -> Any:
                return self._refresh_slice(table[0, i], table[1, i], carry, grads, paths)

            carry = tuple({p: x[p] for p in paths} for x in (mus, bases, keeps))
            carry = jax.lax.fori_loop(first, last, one, carry)
            for target, values in zip((mus, bases, keeps), carry):
                target.update(values)
        return mus, bases, keeps

    def _refresh_slice(
        self, k: jax.Array, j: jax.Array, carry: Any, grads: Leaves, paths: list[str]
    ) -> Any:
        """Renews slice j of leaf k. The decomposition is compiled once, not once per leaf."""
        mus, bases, _ = carry

        def slice_of(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, j, 1)

        def square_form_of(path: str) -> Any:
            arrays = (grads[path], mus[path], bases[path])
            return lambda: self.square_form(path, *(slice_of(x) for x in arrays))

        square, nonzero = jax.lax.switch(k, [square_form_of(path) for path in paths])
        found = singular_vectors(square, self.method)

        def write(path: str, values: Any) -> Any:
            mu, q, keep = values
            old = slice_of(q)
            new = jnp.where(nonzero[:, None, None], found, old)
            moved, alive = self.carried_over(path, slice_of(grads[path]), slice_of(mu), old, new)
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(whole, part, j, 0)
                for whole, part in ((mu, moved), (q, new), (keep, alive))
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


def _by_size(squares: Leaves) -> dict[int, list[str]]:
    """Paths of ``[B, r, r]`` arrays, grouped by r."""
    groups: dict[int, list[str]] = {}
    for path, square in squares.items():
        groups.setdefault(square.shape[1], []).append(path)
    return groups
