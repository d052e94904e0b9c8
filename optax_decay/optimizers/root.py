"""ROOT: momentum that is clipped at a quantile of each matrix and then orthogonalised.

For each hidden matrix, with g the gradient, M the momentum, μ and q dimensionless, and rows and columns those of the
matrix::

    M ← μ M + g
    d = g + μ M                                  (Nesterov; otherwise d = M)
    θ = Q_q(|d|) + 1e-9                          the q-quantile of all entries, in units of the gradient
    X = clip(d, -θ, θ),  X ← X / (‖X‖_F + 1e-7)
    X ← a X + (b A + c A²) X,  A = X Xᵀ          K steps
    u = 0.2 sqrt(max(rows, columns)) · X

The last factor gives u the RMS of 0.2 that Adam's updates typically have, so that matrices and all other parameters can
share one learning rate and one weight decay. The others are updated by Adam (`adam_branch`). The clipping is the soft
threshold of the paper, since ``d - sign(d) max(|d| - θ, 0)`` is ``clip(d, -θ, θ)``. Every step clips the 1-q largest
entries, whether or not they are outliers; the momentum keeps the unclipped values. The coefficients (a, b, c) are
described in `newton_coefficients`.

Reference: "ROOT: Robust Orthogonalized Optimizer for Neural Network Training", arXiv 2511.20626, and the released
code (huawei-noah/noah-research).

**Differs from the paper and the released code.**

* The paper's algorithm box has a fixed threshold, no Nesterov term, no factor 0.2 sqrt(max) and no decay. The code has
  a quantile, the Nesterov term, the factor and the decay, and so does the default here. A number as `threshold`,
  ``nesterov=False`` and ``update_rms=None`` give the box.
* Where the released table has no entry the code uses Muon's triple; here the shape gets a triple of its own
  (``coefficients=released()`` follows the code).
* The quantile is computed exactly. The code computes its rank in float32, which is wrong by up to 0.9 of a rank in
  matrices with more than 4 million entries.
* The code treats 2-D parameters whose name contains neither embed_tokens nor lm_head as matrices, a fused projection as
  one matrix. Here the role ``"hidden"`` of the axes decides, each layer of a stacked leaf is a separate matrix, and
  heads are merged.
* Moments are float32 even for 16-bit parameters. The iteration runs in that precision as in the code;
  ``iteration_dtype=jnp.bfloat16`` changes its result by 3 to 4 % in the Frobenius norm.
* The code parses ``--wd`` but never uses it, so its runs decay everything by 0.1, norms and embeddings included. `root`
  decays hidden matrices and the head by default.

**Cost.** State: 4 bytes per matrix entry and 8 per other entry. Matrices of one shape, from all parameters, share one
compiled iteration (`matrices.stacks`).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_decay.matrices.orthogonal import quintic_steps
from optax_decay.matrices.quantile import exact_quantile
from optax_decay.matrices.stacks import map_by_shape, on_auto_axes, sides
from optax_decay.optimizers import adam_branch, newton_coefficients
from optax_decay.optimizers.newton_coefficients import Coefficients, check_coefficients
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, passes_options_to
from optax_decay.parameters.placeholders import has_no_leaves, placeholder_state
from optax_decay.parameters.structures import once_per_structure
from optax_decay.product import masks
from optax_decay.product.decay import as_decay
from optax_decay.product.links import scale_by_learning_rate
from optax_decay.product.product import by_path, increment

THRESHOLD_FLOOR = 1e-9
NORM_FLOOR = 1e-7


class Quantile(NamedTuple):
    """A threshold θ that is the q-quantile of the entries' magnitudes, computed for each matrix. See `quantile`.

    Attributes:
        q: dimensionless, in [0, 1].
    """

    q: float | jax.Array


def quantile(q: float | jax.Array = 0.9) -> Quantile:
    """Clips the entries of each matrix whose magnitude is above its q-quantile; 1 clips nothing.

    Args:
        q: dimensionless, in [0, 1].

    Raises:
        ValueError: q out of its range.
    """
    check("q", q, 0.0, 1.0)
    return Quantile(q)


Threshold = float | jax.Array | Quantile | None


class ScaleByRootState(NamedTuple):
    """State of `scale_by_root`.

    Attributes:
        count: int32 scalar, completed updates.
        mu: float32 tree like the parameters: M of hidden matrices, Adam's first moment of all others, in units of the
            gradient.
        nu: Adam's second moment by path, float32 in the parameter's shape, of all parameters but hidden matrices.
    """

    count: jax.Array
    mu: Any
    nu: dict[str, jax.Array]


class RootOptions(TypedDict, total=False):
    """Keyword arguments that `root` passes on to `scale_by_root`, which describes them."""

    momentum: float | jax.Array
    threshold: Threshold
    coefficients: Coefficients
    nesterov: bool
    update_rms: float | jax.Array | None
    b1: float | jax.Array
    b2: float | jax.Array
    eps: float | jax.Array
    iteration_dtype: jax.typing.DTypeLike | None
    stack_axes: str | Sequence[str] | None


class _Direction(NamedTuple):
    """How one matrix is clipped and orthogonalised."""

    threshold: Threshold
    coefficients: Coefficients
    iteration_dtype: Any

    def clipped(self, x: jax.Array) -> jax.Array:
        limit = self.threshold
        if isinstance(limit, Quantile):
            if isinstance(limit.q, int | float) and limit.q >= 1:
                return x
            limit = exact_quantile(jnp.abs(x), limit.q, axis=(1, 2), keepdims=True)
            limit = limit + THRESHOLD_FLOOR
        return x if limit is None else _clip(x, jnp.asarray(limit, jnp.finfo(x.dtype).dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[k, m, n]``, clipped and orthogonalised."""
        x = self.clipped(x)
        norm = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(x)), axis=(1, 2), keepdims=True))
        y = (x / (norm + NORM_FLOOR)).astype(self.iteration_dtype or x.dtype)
        table = self.coefficients.for_shape((x.shape[1], x.shape[2]))
        y = quintic_steps(y, table, precision=jax.lax.Precision.HIGHEST)
        return y.astype(x.dtype)


def scale_by_root(
    momentum: float | jax.Array = 0.95,
    threshold: Threshold = quantile(0.9),
    coefficients: Coefficients = newton_coefficients.published(),
    *,
    nesterov: bool = True,
    update_rms: float | jax.Array | None = 0.2,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-8,
    iteration_dtype: jax.typing.DTypeLike | None = None,
    axes: axes_lib.Axes = None,
    stack_axes: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients of hidden matrices by ROOT's direction and all others by Adam's.

    Args:
        momentum: μ, dimensionless, in [0, 1).
        threshold: θ, where the entries of a matrix are clipped: ``newton.quantile(q)``, a positive number in units of
            the gradient, or None for no clipping.
        coefficients: (a, b, c) of every step, one of `newton_coefficients` (``optax_decay.newton``).
        nesterov: orthogonalise ``g + μ M`` instead of M.
        update_rms: the RMS of a matrix's update if all its singular values end at 1, dimensionless, > 0. None: X is
            returned as it is.
        b1: decay of Adam's first moment, for all other parameters; dimensionless, in [0, 1).
        b2: decay of Adam's second moment; dimensionless, in [0, 1).
        eps: added to the root of Adam's second moment, in units of the gradient, >= 0.
        iteration_dtype: dtype of the products of the iteration. None: that of the moments.
        axes: what the parameters' axes mean (`axes.signatures`). Leaves with the role ``"hidden"`` are matrices.
        stack_axes: mesh axes over which the stacks of same-shape matrices are distributed. None: all Auto axes of the
            mesh in context; (): none.

    Returns:
        A transformation with a `ScaleByRootState`. Its ``update`` does not need params.

    Raises:
        ValueError: a number out of its range, or coefficients that are not one of `newton_coefficients`; at ``init``,
            axes that do not fit the parameters.

    >>> import jax.numpy as jnp, optax_decay
    >>> g = {"w": jnp.array([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])}
    >>> polar = optax_decay.newton.polar_express(steps=8)
    >>> tx = optax_decay.scale_by_root(threshold=None, coefficients=polar)
    >>> (tx.update(g, tx.init(g))[0]["w"] / (0.2 * 3**0.5)).round(2)
    Array([[1., 0., 0.],
           [0., 1., 0.]], dtype=float32)
    """
    for name, value in (("momentum", momentum), ("b1", b1), ("b2", b2)):
        check(name, value, 0.0, 1.0, open_high=True)
    check("eps", eps, 0.0)
    if isinstance(threshold, Quantile):
        quantile(threshold.q)
    elif threshold is not None:
        check("threshold", threshold, 0.0, open_low=True)
    if update_rms is not None:
        check("update_rms", update_rms, 0.0, open_low=True)
    check_coefficients(coefficients)
    direction = _Direction(threshold, coefficients, iteration_dtype)
    signatures_of = once_per_structure(lambda shapes: axes_lib.signatures(axes, shapes))

    def init(params: optax.Params) -> ScaleByRootState:
        mu = jax.tree.map(adam_branch.accumulator_like, params)
        if has_no_leaves(params):
            return placeholder_state(ScaleByRootState, mu=mu)
        signatures = signatures_of(params)
        masks.warn_of_guesses("ROOT", signatures)
        for shape in {sides(s) for s in signatures.values() if s.role == "hidden"}:
            coefficients.for_shape(shape)  # missing ones are fitted now, not in the first step
        others = {p: x for p, x in by_path(params).items() if signatures[p].role != "hidden"}
        nu = {path: adam_branch.accumulator_like(x, real=True) for path, x in others.items()}
        return ScaleByRootState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> Any:
        del params, extra
        count = increment(state.count)
        treedef = jax.tree.structure(state.mu)
        mu = by_path(state.mu)
        if not mu:
            return updates, state._replace(count=count)
        grads = dict(zip(mu, treedef.flatten_up_to(updates)))
        signatures = signatures_of(state.mu)
        new, nu, matrices = dict(grads), dict(state.nu), {}
        correction = adam_branch.bias_correction(b1, b2, count)
        for path, g in grads.items():
            if g is None:
                continue
            wide = g.astype(mu[path].dtype)
            if signatures[path].role == "hidden":
                mu[path] = (momentum * mu[path] + wide).astype(mu[path].dtype)
                d = wide + momentum * mu[path] if nesterov else mu[path]
                matrices[path] = d.astype(mu[path].dtype)
                continue
            u, mu[path], nu[path] = adam_branch.step(
                wide, mu[path], nu[path], b1, b2, eps, correction
            )
            new[path] = u.astype(g.dtype)
        if matrices:
            directions = on_auto_axes(
                lambda ds: map_by_shape(direction, ds, signatures, stack_axes), matrices, matrices
            )
            for path, u in directions.items():
                if update_rms is not None:
                    u = u * (update_rms * math.sqrt(max(sides(signatures[path]))))
                new[path] = u.astype(grads[path].dtype)
        return treedef.unflatten(new.values()), ScaleByRootState(
            count, treedef.unflatten(mu.values()), nu
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _clip(x: jax.Array, limit: jax.Array) -> jax.Array:
    """Entries with magnitude at most `limit`; complex ones keep their phase."""
    if not jnp.iscomplexobj(x):
        return jnp.clip(x, -limit, limit)
    size = jnp.abs(x)
    return jnp.where(size > limit, x * (limit / jnp.where(size > limit, size, 1)), x)


def momentum_spectra(
    state: Any, axes: axes_lib.Axes = None, q: float = 0.9
) -> dict[tuple[int, int], list[np.ndarray]]:
    """Singular values of the clipped momenta in an optimizer's state, to which coefficients can be fitted.

    Args:
        state: a `ScaleByRootState`, or any optimizer state that contains one.
        axes: as given to `scale_by_root`.
        q: the quantile at which momenta are clipped, in [0, 1].

    Returns:
        (smaller side, larger side) to a list of arrays, one per matrix, in units of the gradient.

    Raises:
        ValueError: a state without a `ScaleByRootState`, q out of its range.

    >>> import jax.numpy as jnp, optax_decay
    >>> tx = optax_decay.root(1e-3)
    >>> spectra = momentum_spectra(tx.init({"w": jnp.ones((3, 2))}))
    >>> sorted(spectra)
    [(2, 3)]

    After some steps, ``{shape: fit_coefficients(shape, spectra=s) for shape, s in spectra.items()}`` is a table for
    `newton_coefficients.by_shape`.
    """
    check("q", q, 0.0, 1.0)

    def is_root(x: Any) -> bool:
        return isinstance(x, ScaleByRootState)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_root) if is_root(x)]
    if not found:
        raise ValueError(f"no ScaleByRootState in a state of type {type(state).__name__}.")
    spectra: dict[tuple[int, int], list[np.ndarray]] = {}
    signatures = axes_lib.signatures(axes, found[0].mu)
    for path, m in by_path(found[0].mu).items():
        if signatures[path].role != "hidden":
            continue
        for matrix in np.asarray(axes_lib.as_matrix(m, signatures[path])):
            limit = np.quantile(np.abs(matrix), q) + THRESHOLD_FLOOR
            clipped = np.asarray(_clip(jnp.asarray(matrix), jnp.asarray(limit, matrix.real.dtype)))
            values = np.linalg.svd(clipped, compute_uv=False)
            spectra.setdefault(sides(signatures[path]), []).append(values)
    return spectra


@passes_options_to(scale_by_root)
def root(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation = 0.1,
    mask: masks.Mask = masks.MATRICES,
    axes: axes_lib.Axes = None,
    **options: Unpack[RootOptions],
) -> optax.GradientTransformationExtraArgs:
    """ROOT with decoupled weight decay: ``w ← w - η u - η λ w``.

    Hidden matrices (ROOT) and all other parameters (Adam) have updates of comparable size, and share one learning rate
    and one decay. Hidden matrices and the output head decay; embeddings, norms and biases do not. The released code
    decays everything (``mask=None``). Without `axes`, names of parameters decide (`axes.signatures`).

    Args:
        learning_rate: η, a number or schedule.
        weight_decay: λ with AdamW's coupling, a number or schedule; or any transformation that belongs before
            ``scale_by_learning_rate``, such as ``huber_decay(0.1)``.
        mask: which leaves decay if `weight_decay` is a number or schedule (`masks.strengths`).
        axes: what the parameters' axes mean, for the directions and for the decay (`axes.signatures`).
        options: momentum, threshold, coefficients, nesterov, update_rms, b1, b2, eps, iteration_dtype, stack_axes, as
            in `scale_by_root`.

    Raises:
        ValueError: as in `scale_by_root`; a mask beside a transformation, which has its own.

    >>> import optax_decay
    >>> tx = optax_decay.root(1e-3, weight_decay=0.1)
    """
    return optax.chain(
        scale_by_root(axes=axes, **options),
        as_decay(weight_decay, mask, axes),
        scale_by_learning_rate(learning_rate),
    )
