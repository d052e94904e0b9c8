"""Muon and NorMuon: momentum that is orthogonalised matrix by matrix, with any decay and on any mesh.

For each hidden matrix of n inputs and m outputs, with g the gradient, M the momentum and μ dimensionless::

    M ← μ M + (1-μ) g
    d = μ M + (1-μ) g                            "nesterov"; "plain": d = M
    X = d / (‖d‖_F + ε)                          ε in units of the gradient
    X ← a X + (b A + c A²) X,  A = X Xᵀ          K steps, coefficients of `newton_coefficients`
    u = shape_scale(n, m) · X                    `shape_scales`

NorMuon evens out what the outputs get before the last line, with v one number per output, v_0 = 0::

    v ← β₂ v + (1-β₂) mean over inputs of X²
    Y = X / (sqrt(v) + 1e-8),  X ← Y ‖X‖_F/‖Y‖_F

All other parameters: Adam, ``u = m̂/(sqrt(v̂) + eps)`` as in ``optax.adam``.

References: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024) and their code
(KellerJordan/Muon); Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982, for the default shape scale; Li
et al., "NorMuon", arXiv 2510.05491, of which only the abstract could be read, and its code in microsoft/dion.

**Differs from the papers and the released programs.**

* A matrix is what the axes say: role ``"hidden"``, each layer and each expert by itself. Jordan's code flattens an
  expert stack ``[L, E, m, n]`` to one matrix ``[L, E m n]``. ``"L | D -> H E"`` orthogonalises all heads together, and
  ``"L D H E : L H | D -> E"`` each head by itself.
* optax's Nesterov term divides M and g by different bias corrections, which turns the direction by 4° at the second
  step and by 0.2° at the 30th: ``momentum_form="bias_corrected_nesterov"``. Its other parameters then get NAdam.
  Heavy-ball momentum, ``M ← μ M + g``, gives the direction of the form used here.
* The iteration runs in float32; most programs use bfloat16 (``iteration_dtype=jnp.bfloat16``), which changes a
  trajectory of 12 steps by 1.5 %. Momentum is float32 even for 16-bit parameters.
* NorMuon's v belongs to outputs, as in Dion's code. nanochat and the speed runs take the longer side, rollfast the
  inputs. Dion rescales each shard by itself where matrices are sharded; here the result does not depend on the mesh.
* Decay is AdamW's, without the shape scale; nanochat multiplies its decay by it.

**Cost.** State: 4 bytes per entry of a hidden matrix (NorMuon: and per output), 8 per other entry. Matrices of one
shape, from all parameters, share one compiled iteration (`matrices.stacks`); sharded stacks are exchanged, and not
gathered.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_decay.matrices.orthogonal import quintic_steps
from optax_decay.matrices.stacks import map_by_shape, on_auto_axes, sides
from optax_decay.matrices.whole import each_matrix, inside_shard_map, split_axes
from optax_decay.norms.slices import Slices, slices, specs_by_path
from optax_decay.optimizers import adam_branch, newton_coefficients, shape_scales
from optax_decay.optimizers.newton_coefficients import Coefficients, check_coefficients
from optax_decay.optimizers.shape_scales import ShapeScale, check_shape_scale
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, one_of, passes_options_to
from optax_decay.parameters.placeholders import has_no_leaves, placeholder_state
from optax_decay.product import masks
from optax_decay.product.decay import as_decay
from optax_decay.product.links import scale_by_learning_rate
from optax_decay.product.product import by_path, increment
from optax_decay.product.running_means import share_seen

MOMENTUM_FORMS = ("nesterov", "plain", "bias_corrected_nesterov")
OUTPUT_FLOOR = 1e-8  # of NorMuon, dimensionless


class ScaleByMuonState(NamedTuple):
    """State of `scale_by_muon` and `scale_by_normuon`.

    Attributes:
        count: int32 scalar, completed updates.
        mu: float32 tree like the parameters: M of hidden matrices, Adam's first moment of all others, in units of the
            gradient.
        nu: Adam's second moment by path, float32 in the parameter's shape, of all parameters but hidden matrices.
        outputs: NorMuon's v by path, float32, in the shape of the parameter with its inputs as 1; empty for Muon.
    """

    count: jax.Array
    mu: Any
    nu: dict[str, jax.Array]
    outputs: dict[str, jax.Array]


class MuonDirectionOptions(TypedDict, total=False):
    """Keyword arguments of `scale_by_muon` that say in which direction it goes."""

    momentum: float | jax.Array
    coefficients: Coefficients
    momentum_form: str
    eps: float | jax.Array
    b1: float | jax.Array
    b2: float | jax.Array
    adam_eps: float | jax.Array
    iteration_dtype: jax.typing.DTypeLike | None
    stack_axes: str | Sequence[str] | None
    param_specs: Any


class MuonOptions(MuonDirectionOptions, total=False):
    """Keyword arguments that `muon` passes on to `scale_by_muon`, which describes them."""

    shape_scale: ShapeScale


class NormuonOptions(MuonOptions, total=False):
    """Keyword arguments that `normuon` passes on to `scale_by_normuon`, which describes them."""

    output_memory: float | jax.Array


class _Iteration(NamedTuple):
    """How hidden matrices are orthogonalised, wherever they are."""

    coefficients: Coefficients
    eps: Any
    dtype: Any
    stack_axes: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[k, m, n] -> [k, m, n]``."""
        norm = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(x)), axis=(1, 2), keepdims=True))
        y = (x / (norm + self.eps)).astype(self.dtype or x.dtype)
        table = self.coefficients.for_shape((x.shape[1], x.shape[2]))
        return quintic_steps(y, table).astype(x.dtype)

    def every(
        self,
        leaves: dict[str, jax.Array],
        signatures: dict[str, axes_lib.Signature],
        specs: dict[str, Any],
    ) -> dict[str, jax.Array]:
        """Of all matrices of all leaves, by path; `specs` are needed inside ``shard_map``."""
        if not inside_shard_map():
            return on_auto_axes(
                lambda xs: map_by_shape(self, xs, signatures, self.stack_axes), leaves, leaves
            )
        return {
            path: self._shard(x, signatures[path], specs.get(path)) for path, x in leaves.items()
        }

    def _shard(self, x: jax.Array, signature: axes_lib.Signature, spec: Any) -> jax.Array:
        """Of a leaf inside ``shard_map``: matrices are exchanged over the axes that split them, and stay split."""
        matrices = axes_lib.as_matrix(x, signature)
        if spec is not None:
            names = split_axes(tuple(spec))[::-1]
            sides = (
                tuple(name for i in side for name, dimension in names if dimension == i)
                for side in (signature.inputs, signature.outputs)
            )
            spec = jax.P(None, *(side or None for side in sides))
        return axes_lib.from_matrix(each_matrix(self, matrices, spec=spec), signature)


def _evened(
    x: jax.Array, v: jax.Array, memory: Any, output: Slices, matrix: Slices
) -> tuple[jax.Array, jax.Array]:
    """NorMuon's rescaling of one leaf, and the new v."""
    inputs = output.size
    square = jnp.square(jnp.abs(x))
    v = memory * v + (1 - memory) * output.spread(output.sum(square) / inputs)
    y = x / (jnp.sqrt(v) + OUTPUT_FLOOR)
    before, after = jnp.sqrt(matrix.sum(square)), matrix.norm(y)
    return y * matrix.spread(before / jnp.where(after > 0, after, 1)), v


def _check(numbers: dict[str, Any], eps: Any, adam_eps: Any, form: str) -> None:
    for name, value in numbers.items():
        check(name, value, 0.0, 1.0, open_high=True)
    check("eps", eps, 0.0)
    check("adam_eps", adam_eps, 0.0)
    one_of("momentum_form", form, MOMENTUM_FORMS)


def scale_by_muon(
    momentum: float | jax.Array = 0.95,
    coefficients: Coefficients = newton_coefficients.muon(),
    shape_scale: ShapeScale = shape_scales.sqrt_larger_side(0.2),
    *,
    momentum_form: str = "nesterov",
    eps: float | jax.Array = 1e-8,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.95,
    adam_eps: float | jax.Array = 1e-8,
    iteration_dtype: jax.typing.DTypeLike | None = None,
    axes: axes_lib.Axes = None,
    stack_axes: str | Sequence[str] | None = None,
    param_specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients of hidden matrices by Muon's direction and all others by Adam's.

    Args:
        momentum: μ, dimensionless, in [0, 1).
        coefficients: (a, b, c) of every step, one of `newton_coefficients` (``optax_decay.newton``).
        shape_scale: the factor of each shape, one of `shape_scales`.
        momentum_form: ``"nesterov"``, ``"plain"`` or ``"bias_corrected_nesterov"``, which is that of optax.
        eps: ε >= 0, added to the norm before the iteration, in units of the gradient.
        b1, b2, adam_eps: of Adam, for all other parameters, as in ``optax.adam``.
        iteration_dtype: dtype of the products of the iteration. None: that of the momentum. Their precision is JAX's
            default for that dtype.
        axes: what the parameters' axes mean (`axes.signatures`). Leaves with the role ``"hidden"`` are matrices.
        stack_axes: mesh axes over which the stacks of same-shape matrices are distributed. None: all Auto axes of the
            mesh in context; (): none.
        param_specs: inside ``shard_map``, the PartitionSpecs of the parameters (or a prefix of the tree).

    Returns:
        A transformation with a `ScaleByMuonState`. Its ``update`` does not need params.

    Raises:
        ValueError: a number out of its range, an unknown name, or something that is not a value of ``newton`` or
            ``shape_scales``; at ``init``, axes that do not fit the parameters.

    >>> import jax.numpy as jnp, optax_decay
    >>> g = {"w": jnp.array([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])}
    >>> polar = optax_decay.newton.polar_express(steps=8)
    >>> tx = optax_decay.scale_by_muon(coefficients=polar)
    >>> (tx.update(g, tx.init(g))[0]["w"] / (0.2 * 3**0.5)).round(2)
    Array([[1., 0., 0.],
           [0., 1., 0.]], dtype=float32)
    """
    _check({"momentum": momentum, "b1": b1, "b2": b2}, eps, adam_eps, momentum_form)
    check_coefficients(coefficients)
    check_shape_scale(shape_scale)
    iteration = _Iteration(coefficients, eps, iteration_dtype, stack_axes)
    adam = (b1, b2, adam_eps)
    return _scale(iteration, momentum, momentum_form, shape_scale, adam, None, axes, param_specs)


def scale_by_normuon(
    momentum: float | jax.Array = 0.95,
    coefficients: Coefficients = newton_coefficients.muon(),
    shape_scale: ShapeScale = shape_scales.sqrt_larger_side(0.2),
    *,
    output_memory: float | jax.Array = 0.95,
    momentum_form: str = "nesterov",
    eps: float | jax.Array = 1e-8,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.95,
    adam_eps: float | jax.Array = 1e-8,
    iteration_dtype: jax.typing.DTypeLike | None = None,
    axes: axes_lib.Axes = None,
    stack_axes: str | Sequence[str] | None = None,
    param_specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients of hidden matrices by NorMuon's direction and all others by Adam's.

    Args:
        output_memory: β₂ of v, dimensionless, in [0, 1).
        momentum, coefficients, shape_scale, momentum_form, eps, b1, b2, adam_eps: as in `scale_by_muon`.
        iteration_dtype, axes, stack_axes, param_specs: as there.

    Returns:
        A transformation with a `ScaleByMuonState`. Its ``update`` does not need params.

    Raises:
        ValueError: as `scale_by_muon`.

    >>> import optax, optax_decay
    >>> tx = optax.chain(optax_decay.scale_by_normuon(), optax.scale_by_learning_rate(1e-3))
    """
    numbers = {"momentum": momentum, "output_memory": output_memory, "b1": b1, "b2": b2}
    _check(numbers, eps, adam_eps, momentum_form)
    check_coefficients(coefficients)
    check_shape_scale(shape_scale)
    iteration = _Iteration(coefficients, eps, iteration_dtype, stack_axes)
    adam = (b1, b2, adam_eps)
    return _scale(
        iteration, momentum, momentum_form, shape_scale, adam, output_memory, axes, param_specs
    )


def _scale(
    iteration: _Iteration,
    momentum: Any,
    form: str,
    shape_scale: ShapeScale,
    adam: tuple[Any, Any, Any],
    output_memory: Any,
    axes: axes_lib.Axes,
    param_specs: Any,
) -> optax.GradientTransformationExtraArgs:
    """Muon, or NorMuon if `output_memory` is not None; the arguments are checked."""
    b1, b2, adam_eps = adam

    def init(params: Any) -> ScaleByMuonState:
        mu = jax.tree.map(adam_branch.accumulator_like, params)
        if has_no_leaves(params):
            return placeholder_state(ScaleByMuonState, mu=mu)
        signatures, leaves = axes_lib.signatures(axes, params), by_path(params)
        masks.warn_of_guesses("Muon", signatures)
        hidden = [path for path, s in signatures.items() if s.role == "hidden"]
        for shape in {sides(signatures[path]) for path in hidden}:
            iteration.coefficients.for_shape(shape)  # fitted now, not in the first step
        others = {path: x for path, x in leaves.items() if signatures[path].role != "hidden"}
        nu = {path: adam_branch.accumulator_like(x, real=True) for path, x in others.items()}
        outputs = {}
        for path in hidden if output_memory is not None else ():
            # A sum of zeros rather than zeros: on Explicit mesh axes it is sharded as the outputs are.
            zeros = adam_branch.accumulator_like(leaves[path], real=True)
            outputs[path] = jnp.sum(zeros, axis=signatures[path].inputs, keepdims=True)
        return ScaleByMuonState(jnp.zeros([], jnp.int32), mu, nu, outputs)

    def direction(g: jax.Array, m: jax.Array, count: jax.Array) -> jax.Array:
        """d of one leaf, for the new momentum m after `count` updates."""
        if form == "plain":
            return m
        if form == "nesterov":
            return momentum * m + (1 - momentum) * g
        dtype = jnp.finfo(m.dtype).dtype
        ahead, here = (share_seen(momentum, c, dtype) for c in (increment(count), count))
        return momentum * m / ahead + (1 - momentum) * g / here

    def adam_step(g: jax.Array, m: jax.Array, v: jax.Array, count: jax.Array) -> Any:
        m, v = adam_branch.new_moments(g, m, v, b1, b2)
        mean, square = (share_seen(b, count, v.dtype) for b in (b1, b2))
        return (m / mean) / (jnp.sqrt(v / square) + adam_eps), m, v

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del params, extra
        count = increment(state.count)
        treedef, mu = jax.tree.structure(state.mu), by_path(state.mu)
        if not mu:
            return updates, state._replace(count=count)
        grads = dict(zip(mu, treedef.flatten_up_to(updates)))
        signatures = axes_lib.signatures(axes, state.mu)
        new, nu, outputs, matrices = dict(grads), dict(state.nu), dict(state.outputs), {}
        for path, g in grads.items():
            if g is None:
                continue
            wide = g.astype(mu[path].dtype)
            if signatures[path].role == "hidden":
                mu[path] = (momentum * mu[path] + (1 - momentum) * wide).astype(mu[path].dtype)
                matrices[path] = direction(wide, mu[path], count).astype(mu[path].dtype)
                continue
            u, mu[path], nu[path] = adam_step(wide, mu[path], nu[path], count)
            new[path] = u.astype(g.dtype)
        if matrices:
            specs = specs_by_path(param_specs, state.mu, signatures)
            turned = iteration.every(matrices, signatures, specs)
            if output_memory is not None:
                cut = {
                    per: slices(state.mu, per, "hidden", axes, param_specs)
                    for per in ("output", "matrix")
                }
                for path, x in turned.items():
                    turned[path], v = _evened(
                        x, outputs[path], output_memory, cut["output"][path], cut["matrix"][path]
                    )
                    outputs[path] = v.astype(outputs[path].dtype)
            for path, x in turned.items():
                factor = shape_scale.factor(*_whole(signatures[path], specs.get(path)))
                new[path] = (factor * x).astype(grads[path].dtype)
        return treedef.unflatten(new.values()), ScaleByMuonState(
            count, treedef.unflatten(mu.values()), nu, outputs
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _whole(signature: axes_lib.Signature, spec: Any) -> tuple[int, int]:
    """Inputs and outputs of the whole matrix, of which a signature inside ``shard_map`` describes a shard."""
    whole = [signature.fan_in, signature.fan_out]
    for name, dimension in split_axes(tuple(spec or ())):
        for i, side in enumerate((signature.inputs, signature.outputs)):
            if dimension in side:
                whole[i] *= jax.lax.axis_size(name)
    return whole[0], whole[1]


@passes_options_to(scale_by_muon)
def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation = 0.1,
    mask: masks.Mask = masks.MATRICES,
    axes: axes_lib.Axes = None,
    **options: Unpack[MuonOptions],
) -> optax.GradientTransformationExtraArgs:
    """Muon with decoupled weight decay: ``w ← w - η u - η λ w``.

    Hidden matrices (Muon) and all other parameters (Adam) have updates of comparable size, and share one learning
    rate and one decay. Hidden matrices and the output head decay; embeddings, norms and biases do not. Without
    `axes`, names of parameters decide (`axes.signatures`). For other rates per group, see `by_role`.

    The matrices of ``optax.contrib.muon(r, weight_decay=d, consistent_rms=0.2)`` are those of ``muon(r, weight_decay=d,
    mask="hidden", momentum_form="bias_corrected_nesterov")``; with ``nesterov=False`` and ``momentum_form="plain"``,
    and one b2, all parameters agree.

    Args:
        learning_rate: η, a number or schedule.
        weight_decay: λ with AdamW's coupling, a number or schedule; or any transformation that belongs before
            ``scale_by_learning_rate``, such as ``huber_decay(0.1)``.
        mask: which leaves decay (`masks.strengths`).
        axes: what the parameters' axes mean (`axes.signatures`).
        options: momentum, coefficients, shape_scale, momentum_form, eps, b1, b2, adam_eps, iteration_dtype, stack_axes
            and param_specs, as in `scale_by_muon`.

    >>> import optax_decay
    >>> tx = optax_decay.muon(1e-3, weight_decay=0.1)
    """
    return optax.chain(
        scale_by_muon(axes=axes, **options),
        as_decay(weight_decay, mask, axes),
        scale_by_learning_rate(learning_rate),
    )


@passes_options_to(scale_by_normuon)
def normuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation = 0.1,
    mask: masks.Mask = masks.MATRICES,
    axes: axes_lib.Axes = None,
    **options: Unpack[NormuonOptions],
) -> optax.GradientTransformationExtraArgs:
    """NorMuon with decoupled weight decay: ``w ← w - η u - η λ w``.

    Args:
        learning_rate, weight_decay, mask, axes: as in `muon`.
        options: momentum, coefficients, shape_scale, output_memory, momentum_form, eps, b1, b2, adam_eps,
            iteration_dtype, stack_axes and param_specs, as in `scale_by_normuon`.

    >>> import optax_decay
    >>> tx = optax_decay.normuon(1e-3, weight_decay=optax_decay.cautious_decay(0.1, mask="hidden"))
    """
    return optax.chain(
        scale_by_normuon(axes=axes, **options),
        as_decay(weight_decay, mask, axes),
        scale_by_learning_rate(learning_rate),
    )
