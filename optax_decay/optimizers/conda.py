"""Conda: Adam in a basis that follows the momentum.

Per hidden matrix, with g the gradient, m its average, Q the orthogonal basis of the smaller side, scale dimensionless
and t counting steps from 0::

    m ← b1 m + (1-b1) g
    Q ← singular vectors of m on the smaller side       if t mod refresh_every = 0
    ĝ, m̂ = g, m in the basis Q
    v ← b2 v + (1-b2) ĝ²                                elementwise, in the rotated space
    u = scale · sqrt(1-b2^(t+1))/(1-b1^(t+1)) · (m̂ / (sqrt(v) + eps)) turned back

All other parameters: the same with Q = 1 and scale = 1 (`adam_branch`). eps is in units of the gradient and is added
before the bias correction. v is neither reset nor turned when the basis changes: entry (i, j) goes on with the new
j-th direction. Despite the name nothing is reduced over columns.

Reference: "Conda: Column-Normalized Adam for Training Large Language Models Faster", arXiv 2509.24218, and the released
code (jie040109/Conda).

**Differs from the paper and the released code.**

* Between refreshes Q is constant, so m̂ is itself the average of ĝ. The state keeps m̂ instead of m, which saves one of
  three matrix products per step and changes results by rounding only.
* The basis comes from the eigenvectors of the Gram matrix by default (``basis="svd"`` for a decomposition of m).
* Matrices are ``[inputs, outputs]`` here and ``[outputs, inputs]`` in torch. ``side`` keeps the released names:
  ``"right"`` turns the inputs, ``"left"`` the outputs. For square matrices the released ``"std"`` turns the inputs, and
  so does ``square_side="inputs"``. Its sides ``"full"`` and ``"reverse_std"`` fail on most shapes and are left out.
* If the first gradient is zero (the matrix before a zero-initialised one), the released basis is arbitrary; here it is
  the identity until the next refresh. Directions that a rank-deficient momentum does not have are not moved by the
  step that renews the basis, instead of by rounding noise blown up to full size; afterwards they are turned like the
  rest, by vectors that are arbitrary but the same on every run.
* Moments and basis are float32 even for 16-bit parameters; the released code stores all three in the gradient's type.
* The released code treats each ``nn.Linear`` whose path holds attn or mlp as a matrix; here the role ``"hidden"`` of
  the axes decides, stacked layers are separate matrices and heads are merged. It decays every parameter; `conda`
  decays hidden matrices and the head by default.
* ``staggered=True`` spreads the refreshes over steps; the released code renews all bases at once.

**Cost.** State: 8 bytes per parameter and 4 r² per matrix. Two products with Q, 4 r operations per entry. Where
accumulated micro-steps run the transformation more often than weights change, own the refresh: see ``refresh`` in
`scale_by_conda`.
"""

import difflib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_decay.matrices.stacks import on_auto_axes
from optax_decay.optimizers import conda_basis
from optax_decay.optimizers import moments as adam_branch
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check
from optax_decay.product import masks
from optax_decay.product.couplings import now
from optax_decay.product.decay import as_decay
from optax_decay.product.product import Product, by_path, increment
from optax_decay.product.pulls import l2

_CHOICES = {
    "side": conda_basis.SIDES,
    "square_side": ("inputs", "outputs"),
    "basis": conda_basis.BASES,
}


class ScaleByCondaState(NamedTuple):
    """State of `scale_by_conda`.

    Attributes:
        count: int32 scalar, completed updates.
        mu: float32 tree like the parameters, first moment in units of the gradient; rotated for hidden matrices.
        nu: float32 tree like the parameters, second moment in units of the gradient squared; rotated likewise.
        basis: Q of hidden matrices by path, float32 ``[*batch_shape, r, r]``, orthogonal.
    """

    count: jax.Array
    mu: Any
    nu: Any
    basis: dict[str, jax.Array]


def scale_by_conda(
    b1: Any = 0.9,
    b2: Any = 0.99,
    eps: Any = 1e-8,
    refresh_every: Any = 2000,
    scale: Any = 0.25,
    side: str = "std",
    *,
    square_side: str = "inputs",
    basis: str = "eigh",
    staggered: bool = False,
    axes: axes_lib.Axes = None,
    stack_axes: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales gradients of hidden matrices by Conda and all others by Adam.

    ``update`` takes the extra argument ``refresh``, a bool that may be traced: it then decides about renewing all
    bases in this step, and ``refresh_every`` is not looked at. The first step must be given True.

    Args:
        b1, b2: dimensionless, in [0, 1).
        eps: in units of the gradient, >= 0.
        refresh_every: steps between renewals of the basis, the first of which is at the first step.
        scale: dimensionless factor of the updates of hidden matrices.
        side: which side is turned: ``"std"`` the smaller, ``"right"`` the inputs, ``"left"`` the outputs.
        square_side: what ``"std"`` turns of a square matrix: ``"inputs"`` or ``"outputs"``.
        basis: ``"eigh"`` or ``"svd"``.
        staggered: after the first step, spread the renewals evenly over steps.
        axes: what the parameters' axes mean (`axes.signatures`); leaves with the role ``"hidden"`` are turned.
        stack_axes: mesh axes over which decompositions are spread; None for all Auto axes of the mesh in context, ()
            for none.

    Returns:
        A transformation with a `ScaleByCondaState`; params are not needed.

    Raises:
        ValueError: a number out of its range or an unknown name; at ``init``, axes that do not fit the parameters, or
            a `side` that is the larger one of a matrix.

    >>> import jax.numpy as jnp, optax_decay
    >>> g = {"w": jnp.array([[0.5, 0.5, 0.0], [2.0, -2.0, 0.0]])}
    >>> tx = optax_decay.scale_by_conda(scale=1.0)
    >>> tx.update(g, tx.init(g))[0]["w"].round(3)
    Array([[ 1.,  1.,  0.],
           [ 1., -1.,  0.]], dtype=float32)
    """
    for name, value in (("b1", b1), ("b2", b2)):
        check(name, value, 0.0, 1.0, open_high=True)
    check("eps", eps, 0.0)
    check("refresh_every", refresh_every, 1)
    check("scale", scale, 0.0)
    for name, value in (("side", side), ("square_side", square_side), ("basis", basis)):
        allowed = _CHOICES[name]
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{name}={value!r} is not known; allowed: {', '.join(allowed)} (did you mean {near!r}?)."
            )

    def sides(signatures: dict[str, axes_lib.Signature]) -> dict[str, str]:
        return {
            path: conda_basis.rotated_side(s, side, square_side)
            for path, s in signatures.items()
            if s.role == "hidden"
        }

    def init(params: Any) -> ScaleByCondaState:
        mu = jax.tree.map(adam_branch.accumulator_like, params)
        nu = jax.tree.map(lambda x: adam_branch.accumulator_like(x, real=True), params)
        count = jnp.zeros([], jnp.int32)
        if not jax.tree.leaves(params):
            # optax.tree.map_params calls init with a leafless placeholder and needs a prefix of the real state.
            return ScaleByCondaState(count, mu, nu, jnp.zeros([], jnp.int32))  # type: ignore[arg-type]
        signatures, leaves = axes_lib.signatures(axes, params), by_path(mu)
        bases = {}
        for path, chosen in sides(signatures).items():
            bases[path] = conda_basis.identity(leaves[path], signatures[path], chosen)
        return ScaleByCondaState(count, mu, nu, bases)

    def turned(
        grads: Any, mus: Any, nus: Any, bases: Any, count: Any, due: Any, chosen: Any
    ) -> Any:
        """One step of the matrices ``[B, inputs, outputs]``: (updates, mus, nus, bases) by path."""

        def renew() -> Any:
            return conda_basis.refresh(
                grads, mus, bases, sides=chosen, b1=b1, method=basis, stack_axes=stack_axes
            )

        def keep() -> Any:
            if staggered and due is None:
                return conda_basis.refresh_staggered(
                    grads, mus, bases, count, refresh_every, sides=chosen, b1=b1, method=basis
                )
            return mus, bases, conda_basis.all_directions(bases)

        on_schedule = count == 0 if staggered else count % refresh_every == 0
        mus, bases, alive = jax.lax.cond(on_schedule if due is None else due, renew, keep)
        new: Any = ({}, {}, {}, bases)
        for path, g in grads.items():
            q, axis = bases[path], chosen[path]
            g = jnp.where(conda_basis.spread(alive[path], axis), conda_basis.rotate(g, q, axis), 0)
            mu, nu = adam_branch.moments(g, mus[path], nus[path], b1, b2)
            u = conda_basis.unrotate(mu / (jnp.sqrt(nu) + eps), q, axis)
            for target, value in zip(new, (u, mu, nu)):
                target[path] = value
        return new

    def update(
        updates: Any, state: Any, params: Any = None, *, refresh: Any = None, **extra: Any
    ) -> Any:
        del params, extra
        count = increment(state.count)
        treedef = jax.tree.structure(state.mu)
        mu, nu = by_path(state.mu), by_path(state.nu)
        if not mu:
            return updates, state._replace(count=count)
        grads = dict(zip(mu, treedef.flatten_up_to(updates)))
        signatures = axes_lib.signatures(axes, state.mu)
        bias, new, bases = adam_branch.bias_correction(b1, b2, count), dict(grads), state.basis
        present = {p: g.astype(mu[p].dtype) for p, g in grads.items() if g is not None}
        chosen = {p: s for p, s in sides(signatures).items() if p in present}
        for path in present.keys() - chosen.keys():
            mu[path], nu[path] = adam_branch.moments(present[path], mu[path], nu[path], b1, b2)
            u = jnp.asarray(bias, nu[path].dtype) * mu[path] / (jnp.sqrt(nu[path]) + eps)
            new[path] = u.astype(grads[path].dtype)
        if chosen:
            parts = tuple({p: x[p] for p in chosen} for x in (present, mu, nu, state.basis))
            like = (parts[0], *parts[1:])

            def step(parts: Any, before: Any, due: Any) -> Any:
                views = [_views(part, signatures) for part in parts[:3]]
                flat = {p: q.reshape(-1, *q.shape[-2:]) for p, q in parts[3].items()}
                *out, q = turned(views[0], views[1], views[2], flat, before, due, chosen)
                out = [
                    {p: axes_lib.from_matrix(x, signatures[p]) for p, x in part.items()}
                    for part in out
                ]
                return (*out, {p: q[p].reshape(parts[3][p].shape) for p in chosen})

            out = on_auto_axes(step, like, parts, state.count, refresh)
            for path, u in out[0].items():
                u = u * jnp.asarray(scale * bias, nu[path].dtype)
                new[path] = u.astype(grads[path].dtype)
            mu.update(out[1])
            nu.update(out[2])
            bases = {**state.basis, **out[3]}
        return treedef.unflatten(new.values()), ScaleByCondaState(
            count, treedef.unflatten(mu.values()), treedef.unflatten(nu.values()), bases
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _views(
    leaves: dict[str, jax.Array], signatures: dict[str, axes_lib.Signature]
) -> dict[str, jax.Array]:
    return {path: axes_lib.as_matrix(x, signatures[path]) for path, x in leaves.items()}


def _decay_stepped_weights(
    learning_rate: optax.ScalarOrSchedule, weight_decay: Any, mask: masks.Mask, axes: axes_lib.Axes
) -> optax.GradientTransformationExtraArgs:
    """``u ← u - η_t λ_t (w + u)``: decay of the weights after the step; stands last in the chain."""
    check("weight_decay", weight_decay, 0.0)
    masks.check_mask(mask)
    product = Product(l2(), (), mask, axes, False)

    def step(u: jax.Array, w: jax.Array, tau: Any, delta: Any) -> tuple[jax.Array, jax.Array]:
        del delta
        term = tau * (w + u)
        return u - term, term

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        rate = now(weight_decay, state.count) * now(learning_rate, state.count)
        return product.update(updates, state, params, extra, rate, step)

    return optax.GradientTransformationExtraArgs(product.init, update)


def conda(
    learning_rate: optax.ScalarOrSchedule,
    b1: Any = 0.9,
    b2: Any = 0.99,
    eps: Any = 1e-8,
    refresh_every: Any = 2000,
    scale: Any = 0.25,
    side: str = "std",
    weight_decay: Any = 0.0,
    *,
    decay_after_update: bool = True,
    square_side: str = "inputs",
    basis: str = "eigh",
    staggered: bool = False,
    mask: masks.Mask = masks.MATRICES,
    axes: axes_lib.Axes = None,
    stack_axes: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Conda with decoupled weight decay.

    One learning rate for two groups of parameters: hidden matrices move by about ``scale · η`` per entry and step, the
    rest (Adam) by η. The released recipes use η = 0.01, b2 = 0.99, ``refresh_every=2000``, ``scale=0.25``; the first
    step of their warm-up has η = 0. Decay acts on hidden matrices and the output head, not on embeddings, norms and
    biases; the released code decays everything (``mask=None``). Without `axes`, every leaf of exactly two dimensions
    counts as a hidden matrix, embeddings included: describe the axes of a language model.

    Args:
        learning_rate: η, a number or schedule.
        weight_decay: λ with AdamW's coupling, a number or schedule; or any transformation that belongs before
            ``scale_by_learning_rate``, such as ``huber_decay(0.1)``.
        decay_after_update: decay the weights after the step as the released code does, ``w ← (1 - ηλ)(w - ηu)``,
            instead of before it, ``w ← w - ηu - ηλw`` as AdamW does. They differ by η²λu. Ignored if `weight_decay`
            is a transformation.
        mask: what decays (`masks.strengths`), two names for one argument.
        b1, b2, eps, refresh_every, scale, side, square_side, basis, staggered, axes, stack_axes: as in
            `scale_by_conda`.

    >>> import optax_decay
    >>> tx = optax_decay.conda(0.01, weight_decay=0.1)
    """
    direction = scale_by_conda(
        b1,
        b2,
        eps,
        refresh_every,
        scale,
        side,
        square_side=square_side,
        basis=basis,
        staggered=staggered,
        axes=axes,
        stack_axes=stack_axes,
    )
    rate = optax.scale_by_learning_rate(learning_rate)
    if decay_after_update and not isinstance(weight_decay, optax.GradientTransformation):
        mask = mask
        last = _decay_stepped_weights(learning_rate, weight_decay, mask, axes)
        return optax.chain(direction, rate, last)
    link = as_decay(weight_decay, mask, axes)
    return optax.chain(direction, link, rate)
