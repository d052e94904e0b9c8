"""ROOT: momentum, clipped at a quantile of each matrix, then orthogonalised.

Per hidden matrix, with g the gradient, M the momentum, μ and q dimensionless, rows and columns those of the matrix::

    M ← μ M + g
    d = g + μ M                                  (Nesterov; otherwise d = M)
    θ = Q_q(|d|) + 1e-9                          the q-quantile of all entries, in units of the gradient
    X = clip(d, -θ, θ),  X ← X / (‖X‖_F + 1e-7)
    X ← a X + (b A + c A²) X,  A = X Xᵀ          K steps
    u = 0.2 sqrt(max(rows, columns)) · X

The last factor gives u the RMS 0.2 that Adam's updates typically have, so that matrices and the rest share one
learning rate and one weight decay. All other parameters: Adam (`adam_branch`). The clipping is the soft threshold of
the paper: ``d - sign(d) max(|d| - θ, 0)`` is ``clip(d, -θ, θ)``. It acts at every step, on the 1-q largest entries,
whether or not they are outliers; the momentum keeps the unclipped values. Coefficients: `newton_coefficients`.

Reference: "ROOT: Robust Orthogonalized Optimizer for Neural Network Training", arXiv 2511.20626, and the released
code (huawei-noah/noah-research).

**Differs from the paper and the released code.**

* The paper's algorithm box has a fixed threshold, no Nesterov term, no factor 0.2 sqrt(max) and no decay; the code has
  all of the above, and so has the default here. ``threshold=…``, ``nesterov=False`` and ``update_rms=None`` give the
  box.
* Where the released table has no entry the code uses Muon's triple; here the shape gets its own
  (``coefficients="released"`` for the code's rule).
* The quantile is placed exactly. The code places it in float32, which is off by up to 0.9 of a rank in matrices above
  4 million entries.
* The code treats 2-D parameters whose name lacks embed_tokens and lm_head as matrices, a fused projection as one;
  here the role ``"hidden"`` of the axes decides, stacked layers are separate matrices and heads are merged.
* Moments are float32 even for 16-bit parameters. The iteration runs in that precision as in the code;
  ``iteration_dtype=jnp.bfloat16`` moves its result by 3 to 4 % in the Frobenius norm.
* The code parses ``--wd`` but never passes it on, so its runs decay everything by 0.1, norms and embeddings included;
  `root` decays hidden matrices and the head by default.

**Cost.** State: 4 bytes per matrix entry, 8 per other entry. Same-shape matrices of all parameters go through one
compiled iteration, `matrix_stack`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_decay.matrices.orthogonal import adjoint, quintic_steps
from optax_decay.matrices.quantile import quantile as exact_quantile
from optax_decay.matrices.stacks import map_matrices, on_auto_axes
from optax_decay.optimizers import moments as adam_branch
from optax_decay.optimizers.newton_coefficients import check_coefficients, resolve
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check
from optax_decay.product import masks
from optax_decay.product.decay import as_decay
from optax_decay.product.product import by_path, increment

THRESHOLD_FLOOR = 1e-9
NORM_FLOOR = 1e-7


class ScaleByRootState(NamedTuple):
    """State of `scale_by_root`.

    Attributes:
        count: int32 scalar, completed updates.
        mu: float32 tree like the parameters: M of hidden matrices, Adam's first moment elsewhere, in units of the
            gradient.
        nu: Adam's second moment by path, float32 in the parameter's shape, of all parameters but hidden matrices.
    """

    count: jax.Array
    mu: Any
    nu: dict[str, jax.Array]


def scale_by_root(
    momentum: Any = 0.95,
    quantile: Any = 0.9,
    ns_steps: int = 5,
    coefficients: Any = "published",
    *,
    nesterov: bool = True,
    threshold: Any = None,
    update_rms: float | None = 0.2,
    b1: Any = 0.9,
    b2: Any = 0.95,
    eps: Any = 1e-8,
    iteration_dtype: Any = None,
    axes: axes_lib.Axes = None,
    stack_axes: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients of hidden matrices by ROOT's direction and all others by Adam's.

    Args:
        momentum: μ, dimensionless, in [0, 1).
        quantile: q, dimensionless, in [0, 1]; 1 clips nothing.
        ns_steps: K, a Python int.
        coefficients: (a, b, c), see `newton_coefficients.resolve`: a name, a triple, one triple per step, or a
            mapping from shapes.
        nesterov: orthogonalise ``g + μ M`` instead of M.
        threshold: θ as a positive number in units of the gradient, instead of the quantile.
        update_rms: RMS of a matrix's update if all its singular values end at 1; None leaves X as it is.
        b1, b2, eps: of Adam on everything else, eps in units of the gradient.
        iteration_dtype: of the products of the iteration; by default that of the moments.
        axes: what the parameters' axes mean (`axes.signatures`); leaves with the role ``"hidden"`` are matrices.
        stack_axes: mesh axes over which the stacks of same-shape matrices are spread; None for all Auto axes of the
            mesh in context, () for none.

    Returns:
        A transformation with a `ScaleByRootState`; params are not needed.

    Raises:
        ValueError: a number out of its range or an unknown name; at ``init``, axes that do not fit the parameters.

    >>> import jax.numpy as jnp, optax_decay
    >>> g = {"w": jnp.array([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])}
    >>> tx = optax_decay.scale_by_root(quantile=1.0, coefficients="polar_express", ns_steps=8)
    >>> (tx.update(g, tx.init(g))[0]["w"] / (0.2 * 3**0.5)).round(2)
    Array([[1., 0., 0.],
           [0., 1., 0.]], dtype=float32)
    """
    for name, value in (("momentum", momentum), ("b1", b1), ("b2", b2)):
        check(name, value, 0.0, 1.0, open_high=True)
    check("quantile", quantile, 0.0, 1.0)
    check("eps", eps, 0.0)
    if threshold is not None:
        check("threshold", threshold, 0.0, open_low=True)
    if update_rms is not None:
        check("update_rms", update_rms, 0.0, open_low=True)
    check_coefficients(coefficients, ns_steps)

    def init(params: Any) -> ScaleByRootState:
        mu = jax.tree.map(adam_branch.accumulator_like, params)
        count = jnp.zeros([], jnp.int32)
        if not jax.tree.leaves(params):
            # optax.tree.map_params calls init with a leafless placeholder and needs a prefix of the real state.
            return ScaleByRootState(count, mu, jnp.zeros([], jnp.int32))  # type: ignore[arg-type]
        signatures = axes_lib.signatures(axes, params)
        for shape in {_oriented(s) for s in signatures.values() if s.role == "hidden"}:
            resolve(coefficients, shape, ns_steps)  # fits now what has to be fitted
        leaves = by_path(params).items()
        vectors = {path: x for path, x in leaves if signatures[path].role != "hidden"}
        nu = {path: adam_branch.accumulator_like(x, real=True) for path, x in vectors.items()}
        return ScaleByRootState(count, mu, nu)

    def direction(x: jax.Array) -> jax.Array:
        """``[k, m, n]`` clipped and orthogonalised."""
        limit = threshold
        if threshold is None and not (isinstance(quantile, int | float) and quantile >= 1):
            limit = exact_quantile(jnp.abs(x), quantile, axis=(1, 2), keepdims=True)
            limit = limit + THRESHOLD_FLOOR
        if limit is not None:
            x = _clip(x, jnp.asarray(limit, jnp.finfo(x.dtype).dtype))
        norm = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(x)), axis=(1, 2), keepdims=True))
        y = (x / (norm + NORM_FLOOR)).astype(iteration_dtype or x.dtype)
        table = resolve(coefficients, (x.shape[1], x.shape[2]), ns_steps)
        y = quintic_steps(y, table, precision=jax.lax.Precision.HIGHEST)
        return y.astype(x.dtype)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del params, extra
        count = increment(state.count)
        treedef = jax.tree.structure(state.mu)
        mu = by_path(state.mu)
        grads = dict(zip(mu, treedef.flatten_up_to(updates)))
        signatures = axes_lib.signatures(axes, state.mu)
        correction = bias = None
        new, nu, directions = dict(grads), state.nu, {}
        if mu:
            nu, bias = dict(state.nu), adam_branch.bias_correction(b1, b2, count)
        for path, g in grads.items():
            if g is None:
                continue
            if signatures[path].role == "hidden":
                wide = g.astype(mu[path].dtype)
                mu[path] = (momentum * mu[path] + wide).astype(mu[path].dtype)
                d = wide + momentum * mu[path] if nesterov else mu[path]
                directions[path] = d.astype(mu[path].dtype)
                continue
            mu[path], nu[path] = adam_branch.moments(
                g.astype(mu[path].dtype), mu[path], nu[path], b1, b2
            )
            correction = jnp.asarray(bias, nu[path].dtype)
            new[path] = (correction * mu[path] / (jnp.sqrt(nu[path]) + eps)).astype(g.dtype)
        if directions:
            turned = on_auto_axes(
                lambda ds: _by_shape(direction, ds, signatures, stack_axes), directions, directions
            )
            for path, u in turned.items():
                if update_rms is not None:
                    u = u * (update_rms * math.sqrt(max(_oriented(signatures[path]))))
                new[path] = u.astype(grads[path].dtype)
        return treedef.unflatten(new.values()), ScaleByRootState(
            count, treedef.unflatten(mu.values()), nu
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _oriented(signature: axes_lib.Signature) -> tuple[int, int]:
    smaller, larger = sorted((signature.fan_in, signature.fan_out))
    return smaller, larger


def _clip(x: jax.Array, limit: jax.Array) -> jax.Array:
    """Entries with magnitude at most `limit`; complex ones keep their phase."""
    if not jnp.iscomplexobj(x):
        return jnp.clip(x, -limit, limit)
    size = jnp.abs(x)
    return jnp.where(size > limit, x * (limit / jnp.where(size > limit, size, 1)), x)


def _by_shape(
    function: Any,
    leaves: dict[str, jax.Array],
    signatures: dict[str, axes_lib.Signature],
    stack_axes: Any,
) -> dict[str, jax.Array]:
    """`function` of every matrix of every leaf, compiled once per distinct shape."""
    groups: dict[tuple[int, int], list[str]] = {}
    for path in leaves:
        groups.setdefault(_oriented(signatures[path]), []).append(path)
    results = {}
    for paths in groups.values():
        stacks = []
        for path in paths:
            x = axes_lib.as_matrix(leaves[path], signatures[path])
            stacks.append(x if x.shape[1] <= x.shape[2] else adjoint(x))
        for path, y in zip(paths, map_matrices(function, stacks, stack_axes=stack_axes)):
            wide = signatures[path].fan_in <= signatures[path].fan_out
            results[path] = axes_lib.from_matrix(y if wide else adjoint(y), signatures[path])
    return {path: results[path] for path in leaves}


def momentum_spectra(
    state: Any, axes: axes_lib.Axes = None, quantile: float = 0.9
) -> dict[tuple[int, int], list[np.ndarray]]:
    """Singular values of the clipped momenta in an optimizer's state, for fitting coefficients to them.

    Args:
        state: a `ScaleByRootState`, or any optimizer state that holds one.
        axes: as given to `scale_by_root`.
        quantile: as given to `scale_by_root`.

    Returns:
        (smaller side, larger side) to a list of arrays, one per matrix, in units of the gradient.

    Raises:
        ValueError: no `ScaleByRootState` in the state.

    >>> import jax.numpy as jnp, optax_decay
    >>> from optax_decay.newton_fit import fit_coefficients
    >>> tx = optax_decay.root(1e-3)
    >>> spectra = momentum_spectra(tx.init({"w": jnp.ones((3, 2))}))
    >>> sorted(spectra)
    [(2, 3)]

    After some steps, ``{shape: fit_coefficients(shape, spectra=s) for shape, s in spectra.items()}`` is a value for
    the argument `coefficients`.
    """

    def is_ours(x: Any) -> bool:
        return isinstance(x, ScaleByRootState)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    if not found:
        raise ValueError(f"no ScaleByRootState in a state of type {type(state).__name__}.")
    spectra: dict[tuple[int, int], list[np.ndarray]] = {}
    signatures = axes_lib.signatures(axes, found[0].mu)
    for path, m in by_path(found[0].mu).items():
        if signatures[path].role != "hidden":
            continue
        for matrix in np.asarray(axes_lib.as_matrix(m, signatures[path])):
            limit = np.quantile(np.abs(matrix), quantile) + THRESHOLD_FLOOR
            clipped = np.asarray(_clip(jnp.asarray(matrix), jnp.asarray(limit, matrix.real.dtype)))
            values = np.linalg.svd(clipped, compute_uv=False)
            spectra.setdefault(_oriented(signatures[path]), []).append(values)
    return spectra


def root(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Any = 0.95,
    quantile: Any = 0.9,
    ns_steps: int = 5,
    coefficients: Any = "published",
    weight_decay: Any = 0.1,
    *,
    nesterov: bool = True,
    threshold: Any = None,
    update_rms: float | None = 0.2,
    b1: Any = 0.9,
    b2: Any = 0.95,
    eps: Any = 1e-8,
    iteration_dtype: Any = None,
    mask: masks.Mask = masks.MATRICES,
    axes: axes_lib.Axes = None,
    stack_axes: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """ROOT with decoupled weight decay: ``w ← w - η u - η λ w``.

    One learning rate and one decay for two groups of parameters, whose updates have comparable size: hidden matrices
    (ROOT) and the rest (Adam). Decay acts on hidden matrices and the output head, not on embeddings, norms and
    biases; the released code decays everything (``mask=None``). Without `axes`, every leaf of exactly two dimensions
    counts as a hidden matrix, embeddings included: describe the axes of a language model.

    Args:
        learning_rate: η, a number or schedule.
        weight_decay: λ with AdamW's coupling, a number or schedule; or any transformation that belongs before
            ``scale_by_learning_rate``, such as ``huber_decay(0.1)``.
        mask: what decays (`masks.strengths`), two names for one argument.
        momentum, quantile, ns_steps, coefficients, nesterov, threshold, update_rms: as in `scale_by_root`.
        b1, b2, eps, iteration_dtype, axes, stack_axes: as there.

    >>> import optax_decay
    >>> tx = optax_decay.root(1e-3, weight_decay=0.1)
    """
    return optax.chain(
        scale_by_root(
            momentum,
            quantile,
            ns_steps,
            coefficients,
            nesterov=nesterov,
            threshold=threshold,
            update_rms=update_rms,
            b1=b1,
            b2=b2,
            eps=eps,
            iteration_dtype=iteration_dtype,
            axes=axes,
            stack_axes=stack_axes,
        ),
        as_decay(weight_decay, mask, axes),
        optax.scale_by_learning_rate(learning_rate),
    )
