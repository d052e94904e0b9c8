"""Conda: Adam in a basis that follows the momentum.

For each hidden matrix, with g the gradient, m its running mean, Q the orthogonal basis of the smaller side, `scale` a
dimensionless factor and t counting steps from 0::

    m ← b1 m + (1-b1) g
    Q ← singular vectors of m on the smaller side       if t mod refresh_every = 0
    ĝ, m̂ = g, m in the basis Q
    v ← b2 v + (1-b2) ĝ²                                elementwise, in the rotated space
    u = scale · sqrt(1-b2^(t+1))/(1-b1^(t+1)) · (m̂ / (sqrt(v) + eps)) rotated back

All other parameters follow the same equations with Q = 1 and scale = 1 (`adam_branch`). eps has the units of the
gradient and is added before the bias correction. When the basis changes, v is neither reset nor rotated: entry (i, j)
continues with the new j-th direction. In spite of the paper's title, nothing is normalized over columns.

Reference: "Conda: Column-Normalized Adam for Training Large Language Models Faster", arXiv 2509.24218, and the released
code (jie040109/Conda).

**Differs from the paper and the released code.**

* Between two refreshes Q is constant, so m̂ is itself the running mean of ĝ. The state holds m̂ instead of m. This saves
  one of three matrix products per step and changes results by rounding only.
* By default the basis consists of eigenvectors of the Gram matrix. ``basis="svd"`` decomposes m itself.
* Matrices are ``[inputs, outputs]`` here and ``[outputs, inputs]`` in torch, so `side` names the rotated side. The
  released code calls ``"smaller_or_inputs"`` ``"std"``, ``"inputs"`` ``"right"`` and ``"outputs"`` ``"left"``. Its
  sides ``"full"`` and ``"reverse_std"`` fail on most shapes and are left out.
* If the first gradient of a matrix is zero (the matrix stands before a zero-initialised one), the released basis is
  arbitrary. Here it is the identity until the next refresh. A momentum of low rank has directions of size zero. The
  step that renews the basis does not move the weights along them, where the released code blows rounding errors up to
  full size. Later steps rotate them like all others, by vectors that are arbitrary but the same in every run.
* Moments and basis are float32 even for 16-bit parameters. The released code stores all three in the gradient's dtype.
  Gradients that arrive in 16 bits are rounded before Conda sees them. Along directions below that rounding, updates
  still differ from those of float32 gradients, by a third of their norm and more in the steps after a renewal. The
  basis is arbitrary there, and Adam gives every direction full size; even float32 and float64 differ so where the
  momentum has low rank. Pass float32 gradients where this matters.
* The released code treats each ``nn.Linear`` whose path contains attn or mlp as a matrix. Here the role ``"hidden"`` of
  the axes decides, each layer of a stacked leaf is a separate matrix, and heads are merged. The released code decays
  every parameter; `conda` decays hidden matrices and the head by default.
* ``staggered=True`` spreads the refreshes over the steps; the released code renews all bases in one step.

**Cost.** State: 8 bytes per parameter and 4 r² bytes per matrix, r being its rotated side. Each step has two products
with Q, 4 r operations per entry. If accumulated micro-steps call ``update`` more often than the weights change, decide
about refreshes yourself: see the extra argument ``refresh`` of `scale_by_conda`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_decay.matrices.stacks import on_auto_axes
from optax_decay.optimizers import adam_branch, conda_basis
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, one_of, passes_options_to
from optax_decay.parameters.placeholders import has_no_leaves, placeholder_state
from optax_decay.parameters.structures import once_per_structure
from optax_decay.product import masks
from optax_decay.product.couplings import now
from optax_decay.product.decay import as_decay
from optax_decay.product.links import scale_by_learning_rate
from optax_decay.product.product import Product, by_path, increment
from optax_decay.product.pulls import l2


class ScaleByCondaState(NamedTuple):
    """State of `scale_by_conda`.

    Attributes:
        count: int32 scalar, completed updates.
        mu: float32 tree like the parameters, first moment in units of the gradient; rotated for hidden matrices.
        nu: float32 tree like the parameters, second moment in units of the gradient squared; rotated likewise.
        basis: Q of each hidden matrix by path, float32 ``[*batch_shape, r, r]``, orthogonal.
    """

    count: jax.Array
    mu: Any
    nu: Any
    basis: dict[str, jax.Array]


class CondaOptions(TypedDict, total=False):
    """Keyword arguments that `conda` passes on to `scale_by_conda`, which describes them."""

    b1: float | jax.Array
    b2: float | jax.Array
    eps: float | jax.Array
    refresh_every: int | jax.Array
    scale: float | jax.Array
    side: conda_basis.Side
    basis: conda_basis.Method
    staggered: bool
    stack_axes: str | Sequence[str] | None


class _Rotated(NamedTuple):
    """The equations of hidden matrices, given as ``[B, inputs, outputs]`` by path."""

    b1: float | jax.Array
    b2: float | jax.Array
    eps: float | jax.Array
    refresh_every: int | jax.Array
    staggered: bool
    bases: conda_basis.Bases

    def renewed(
        self, grads: Any, mus: Any, bases: Any, count: jax.Array, refresh: jax.Array | bool | None
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
        """First moments, bases and masks of directions after the refresh of this step, if there is one."""

        def renew() -> Any:
            return self.bases.refresh(grads, mus, bases)

        def keep() -> Any:
            if self.staggered and refresh is None:
                return self.bases.refresh_staggered(grads, mus, bases, count, self.refresh_every)
            return mus, bases, conda_basis.all_directions(bases)

        on_schedule = count == 0 if self.staggered else count % self.refresh_every == 0
        return jax.lax.cond(on_schedule if refresh is None else refresh, renew, keep)

    def step(
        self,
        grads: Any,
        mus: Any,
        nus: Any,
        bases: Any,
        count: jax.Array,
        refresh: jax.Array | bool | None,
    ) -> Any:
        """One step: updates before bias correction, first moments, second moments and bases, by path."""
        mus, bases, alive = self.renewed(grads, mus, bases, count, refresh)
        new: Any = ({}, {}, {}, bases)
        for path, g in grads.items():
            q, side = bases[path], self.bases.sides[path]
            rotated = conda_basis.rotate(g, q, side)
            g = jnp.where(conda_basis.along(alive[path], side), rotated, 0)
            mu, nu = adam_branch.new_moments(g, mus[path], nus[path], self.b1, self.b2)
            u = conda_basis.rotate_back(mu / (jnp.sqrt(nu) + self.eps), q, side)
            for target, value in zip(new, (u, mu, nu)):
                target[path] = value
        return new

    def step_of_leaves(
        self,
        leaves: tuple[dict[str, jax.Array], ...],
        signatures: dict[str, axes_lib.Signature],
        count: jax.Array,
        refresh: jax.Array | bool | None,
    ) -> Any:
        """`step` on (gradients, first moments, second moments, bases) in the shapes of the parameters."""

        def step(leaves: Any, count: jax.Array, refresh: jax.Array | bool | None) -> Any:
            grads, mus, nus = (
                {path: axes_lib.as_matrix(x, signatures[path]) for path, x in part.items()}
                for part in leaves[:3]
            )
            stacks = {p: q.reshape(-1, *q.shape[-2:]) for p, q in leaves[3].items()}
            *out, q = self.step(grads, mus, nus, stacks, count, refresh)
            out = [
                {p: axes_lib.from_matrix(x, signatures[p]) for p, x in part.items()} for part in out
            ]
            return (*out, {path: q[path].reshape(old.shape) for path, old in leaves[3].items()})

        return on_auto_axes(step, leaves, leaves, count, refresh)


def scale_by_conda(
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.99,
    eps: float | jax.Array = 1e-8,
    refresh_every: int | jax.Array = 2000,
    scale: float | jax.Array = 0.25,
    *,
    side: conda_basis.Side = "smaller_or_inputs",
    basis: conda_basis.Method = "eigh",
    staggered: bool = False,
    axes: axes_lib.Axes = None,
    stack_axes: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales gradients of hidden matrices by Conda and all others by Adam.

    ``update`` takes the extra argument ``refresh``, a bool that may be traced. If it is given, it decides whether this
    step renews all bases, and `refresh_every` and `staggered` have no effect. Give True in the first step.

    Args:
        b1: decay of the first moment, dimensionless, in [0, 1).
        b2: decay of the second moment, dimensionless, in [0, 1).
        eps: added to the root of the second moment, in units of the gradient, >= 0.
        refresh_every: steps between two renewals of the basis. The first step is a renewal.
        scale: dimensionless factor of the updates of hidden matrices, >= 0.
        side: the side of a matrix that is rotated: ``"smaller_or_inputs"`` and ``"smaller_or_outputs"`` choose the
            smaller side, and the inputs or outputs of square matrices; ``"inputs"`` and ``"outputs"`` are fixed.
        basis: how the singular vectors are computed: ``"eigh"`` (of the Gram matrix) or ``"svd"``.
        staggered: after the first step, spread the renewals of different matrices evenly over the steps.
        axes: what the parameters' axes mean (`axes.signatures`). Leaves with the role ``"hidden"`` are rotated.
        stack_axes: mesh axes over which the decompositions are distributed. None: all Auto axes of the mesh in
            context; (): none.

    Returns:
        A transformation with a `ScaleByCondaState`. Its ``update`` does not need params.

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
    check("b1", b1, 0.0, 1.0, open_high=True)
    check("b2", b2, 0.0, 1.0, open_high=True)
    check("eps", eps, 0.0)
    check("refresh_every", refresh_every, 1)
    check("scale", scale, 0.0)
    one_of("side", side, conda_basis.SIDES)
    one_of("basis", basis, conda_basis.METHODS)

    @once_per_structure
    def described(shapes: optax.Params) -> tuple[dict[str, axes_lib.Signature], dict[str, str]]:
        """Signatures of all leaves, and the rotated sides of hidden matrices, by path."""
        signatures = axes_lib.signatures(axes, shapes)
        masks.warn_of_guesses("Conda", signatures)
        hidden = {path: s for path, s in signatures.items() if s.role == "hidden"}
        return signatures, {p: conda_basis.rotated_side(s, side) for p, s in hidden.items()}

    def init(params: optax.Params) -> ScaleByCondaState:
        mu = jax.tree.map(adam_branch.accumulator_like, params)
        nu = jax.tree.map(lambda x: adam_branch.accumulator_like(x, real=True), params)
        if has_no_leaves(params):
            return placeholder_state(ScaleByCondaState, mu=mu, nu=nu)
        (signatures, sides), leaves = described(params), by_path(mu)
        bases = {
            path: conda_basis.identity(leaves[path], signatures[path], chosen)
            for path, chosen in sides.items()
        }
        return ScaleByCondaState(jnp.zeros([], jnp.int32), mu, nu, bases)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        refresh: jax.Array | bool | None = None,
        **extra: Any,
    ) -> Any:
        del params, extra
        count = increment(state.count)
        treedef = jax.tree.structure(state.mu)
        mu, nu = by_path(state.mu), by_path(state.nu)
        if not mu:
            return updates, state._replace(count=count)
        grads = dict(zip(mu, treedef.flatten_up_to(updates)))
        present = {p: g.astype(mu[p].dtype) for p, g in grads.items() if g is not None}
        signatures, sides = described(state.mu)
        sides = {path: chosen for path, chosen in sides.items() if path in present}
        correction = adam_branch.bias_correction(b1, b2, count)
        new, bases = dict(grads), state.basis
        for path in present.keys() - sides.keys():
            u, mu[path], nu[path] = adam_branch.step(
                present[path], mu[path], nu[path], b1, b2, eps, correction
            )
            new[path] = u.astype(grads[path].dtype)
        if sides:
            dtypes = {path: grads[path].dtype for path in sides}
            rule = conda_basis.Bases(sides, b1, basis, stack_axes, dtypes)
            rotated = _Rotated(b1, b2, eps, refresh_every, staggered, rule)
            leaves = tuple({p: x[p] for p in sides} for x in (present, mu, nu, state.basis))
            out = rotated.step_of_leaves(leaves, signatures, state.count, refresh)
            for path, u in out[0].items():
                u = u * jnp.asarray(scale * correction, nu[path].dtype)
                new[path] = u.astype(grads[path].dtype)
            mu.update(out[1])
            nu.update(out[2])
            bases = {**state.basis, **out[3]}
        return treedef.unflatten(new.values()), ScaleByCondaState(
            count, treedef.unflatten(mu.values()), treedef.unflatten(nu.values()), bases
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _decay_stepped_weights(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: masks.Mask,
    axes: axes_lib.Axes,
) -> optax.GradientTransformationExtraArgs:
    """``u ← u - η_t λ_t (w + u)``: decay of the weights after the step; stands last in the chain."""
    check("weight_decay", weight_decay, 0.0)
    masks.check_mask(mask)
    product = Product(l2(), (), mask, axes, False)

    def step(u: jax.Array, w: jax.Array, tau: Any, delta: Any) -> tuple[jax.Array, jax.Array]:
        del delta
        term = tau * (w + u)
        return u - term, term

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> Any:
        rate = now(weight_decay, state.count) * now(learning_rate, state.count)
        return product.update(updates, state, params, extra, rate, step)

    return optax.GradientTransformationExtraArgs(product.init, update)


@passes_options_to(scale_by_conda)
def conda(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation = 0.0,
    mask: masks.Mask = masks.MATRICES,
    axes: axes_lib.Axes = None,
    **options: Unpack[CondaOptions],
) -> optax.GradientTransformationExtraArgs:
    """Conda with decoupled weight decay.

    Two groups of parameters share one learning rate: hidden matrices move by about ``scale · η`` per entry and step,
    all others (Adam) by η. The released recipes use η = 0.01, ``b2=0.99``, ``refresh_every=2000`` and ``scale=0.25``;
    the first step of their warm-up has η = 0. Hidden matrices and the output head decay; embeddings, norms and biases
    do not. The released code decays everything (``mask=None``). Without `axes`, names of parameters decide
    (`axes.signatures`).

    Args:
        learning_rate: η, a number or schedule.
        weight_decay: λ, a number or schedule, of a decay after the step as in the released code,
            ``w ← (1 - ηλ)(w - ηu)``; or a transformation that belongs before ``scale_by_learning_rate``, such as
            ``huber_decay(0.1)``. ``decay(0.1)`` gives AdamW's order, ``w ← w - ηu - ηλw``, which differs from the
            released one by η²λu.
        mask: which leaves decay if `weight_decay` is a number or schedule (`masks.strengths`).
        axes: what the parameters' axes mean, for the rotation and for the decay (`axes.signatures`).
        options: b1, b2, eps, refresh_every, scale, side, basis, staggered, stack_axes, as in `scale_by_conda`.

    Raises:
        ValueError: as in `scale_by_conda`; a mask beside a transformation, which has its own.

    >>> import optax_decay
    >>> tx = optax_decay.conda(0.01, weight_decay=0.1)
    """
    direction = scale_by_conda(axes=axes, **options)
    rate = scale_by_learning_rate(learning_rate)
    if isinstance(weight_decay, optax.GradientTransformation):
        return optax.chain(direction, as_decay(weight_decay, mask, axes), rate)
    after = _decay_stepped_weights(learning_rate, weight_decay, mask, axes)
    return optax.chain(direction, rate, after)
