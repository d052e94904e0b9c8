"""1-bit Adam: workers exchange the signs of their momenta instead of gradients.

Warm-up, steps 1 … T, with ḡ_t the mean over all workers of their gradients g_{n,t} (a plain all-reduce)::

    m_t = β₁ m_{t−1} + (1−β₁) ḡ_t        v_t = β₂ v_{t−1} + (1−β₂) ḡ_t²

After the warm-up v = v_T is frozen, and only signs are exchanged::

    m_t = C_n(β₁ m_{t−1} + (1−β₁) g_{n,t})        m_t ← 0 where v ≤ variance_floor

with C the sign-compressed mean of `compression`, which adds what one step could not send to the next step. In both
phases::

    u_t = m_t / (√v + ε)

m is in units of the gradient and v in those of its square, both float32 (float64 for float64). They and u are the same
on every worker to the last bit. β₁ and β₂ are dimensionless, and ε has the units of the gradient. T is `warmup_steps`;
the authors advise 15–25 % of a run. Each of N workers sends about P/4 bytes per step for P compressed parameters, where
a plain all-reduce sends 8P (float32).

Reference: Tang et al., 1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed,
arXiv 2102.02888; released code: DeepSpeed, ``OnebitAdam``.

**Differs from the paper** and from the released code:

* T counts real steps. The code spends its first step on set-up, so its ``freeze_step`` is T + 1.
* By default the momentum is 0 where the frozen variance is 0. Without that, such a coordinate receives the noise of its
  neighbours divided by ε and exceeds 1e4 within ten steps. The code leaves this to the user (``exp_avg_mask``), as
  does ``variance_floor=None``.
* A coordinate whose first gradient comes after T never moves. Rare rows of embeddings are of this kind, so embeddings
  should not be compressed: `one_bit_adam` compresses hidden matrices and the head. Leaves that are not compressed
  continue as in the warm-up, with a variance that is not frozen (the code's ``non_freeze`` group).
* As in the code, and unlike Adam, no bias is corrected. A variance frozen at T is too small by the factor 1 − β₂^T,
  which enlarges all later steps (3.2 times for T = 100, 1.26 times for T = 1000 at β₂ = 0.999).
  ``bias_correction="frozen_variance"`` divides by that factor from T on. ``bias_correction=True`` corrects m and v in
  both phases, so that the warm-up equals ``optax.adam`` up to rounding.
* The paper's automatic criterion, ‖v_t‖₁ / ‖v_{t−Δ}‖₁ ≥ 0.96, also holds while v still grows from 0.
  `VarianceCriterion` bounds the ratio from both sides (``max_ratio=math.inf`` gives the paper's rule).
* The state is complete, compression errors included. The code drops the errors when it loads a checkpoint.
* Not in the paper, and off by default: `largest_direction` ρ bounds ``|u|`` by ρ after the warm-up. Then all ``|m|`` of
  a matrix are one number s, and u is ±s/√v. Where v was frozen below s², the noise of the signs moves a weight further
  than Adam ever would. The bound has the same effect as raising such v to (s/ρ)². Weights with rare gradients, such as
  the columns of a head that belong to rare tokens, are affected most, and the more the smaller β₂ is. With β₂ = 0.95
  and unclipped gradients the loss of a small LLaMA rose from 1.9 to 178 within 50 steps after the warm-up; ρ = 1
  prevents that, and makes no difference where gradients are clipped (``RESULTS.md``).

**How to use it.** Run the step in `jax.shard_map` over the axis of the workers, and differentiate with respect to
`local_params`, so that each worker has its own gradients. A link before this one, such as clipping, sees the local
gradient in both phases. Parameters must not be sharded over the compressed axis, but may be over other axes: shard the
model inside a slice, pass `param_specs`, and compress over the slow outer axis only. The `shard_map` is then over that
axis alone (``axis_names={"slice"}``; the compiler does the rest as before) or over all axes. Momenta are compressed
shard by shard, so scales are per shard and the trajectory depends on the number of shards. Make the axes inside the
slice Auto: with Explicit ones jax 0.10 gathers the shards around the exchange (inside the slice; jax 0.12 does not).
"""

from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_decay.one_bit import buffers, checks, compression
from optax_decay.one_bit.warmup import VarianceCheck, VarianceCriterion, warmup_ends
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, one_of, passes_options_to
from optax_decay.parameters.placeholders import has_no_leaves, placeholder_state
from optax_decay.parameters.structures import once_per_structure
from optax_decay.product import masks
from optax_decay.product.decay import as_decay
from optax_decay.product.links import scale_by_learning_rate
from optax_decay.product.per_matrix import accumulator_dtype
from optax_decay.product.product import increment
from optax_decay.product.running_means import share_seen

PHASES = ("warmup", "compressed")

BiasCorrection = bool | Literal["frozen_variance"]


class OneBitAdamState(NamedTuple):
    """State of `scale_by_one_bit_adam`. All of it but the errors is the same on every worker.

    Attributes:
        count: int32 scalar, completed updates.
        warmup_end: int32 scalar, completed updates when the warm-up ended and the variance froze; 0 before that.
        mu: like params, float32: m.
        nu: like params, float32: v, without any bias correction.
        worker_error: {buffer: float32 [devices, matrices, padded elements]}, what each worker has yet to send.
        server_error: {buffer: float32 [devices, matrices, padded elements / N]}, the same for the chunk it serves.
        last_check: what a `VarianceCriterion` measured last; zeros without one.
    """

    count: jax.Array
    warmup_end: jax.Array
    mu: Any
    nu: Any
    worker_error: Any
    server_error: Any
    last_check: VarianceCheck


class OneBitAdamOptions(TypedDict, total=False):
    """Keyword arguments that `one_bit_adam` passes on to `scale_by_one_bit_adam`, which describes them."""

    b1: float | jax.Array
    b2: float | jax.Array
    eps: float | jax.Array
    layout: buffers.Layout
    param_specs: Any
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None
    variance_floor: float | jax.Array | None
    bias_correction: BiasCorrection
    largest_direction: float | jax.Array | None


class _Adam(NamedTuple):
    """The equations of one leaf."""

    b1: float | jax.Array
    b2: float | jax.Array
    eps: float | jax.Array
    bias_correction: BiasCorrection

    def momentum(self, g: jax.Array, m: jax.Array) -> jax.Array:
        return self.b1 * m + (1 - self.b1) * g

    def variance(self, g: jax.Array, v: jax.Array) -> jax.Array:
        return self.b2 * v + (1 - self.b2) * (g * g)

    def direction(
        self, m: jax.Array, v: jax.Array, count: jax.Array, v_count: jax.Array, frozen: jax.Array
    ) -> jax.Array:
        """u, where m is a running mean of `count` steps and v of `v_count`."""
        if self.bias_correction == "frozen_variance":
            v = v / jnp.where(frozen, share_seen(self.b2, v_count, v.dtype), 1)
        elif self.bias_correction:
            m = m / share_seen(self.b1, count, m.dtype)
            v = v / share_seen(self.b2, v_count, v.dtype)
        return m / (jnp.sqrt(v) + self.eps)


class _Phases(NamedTuple):
    """The two ways to update the moments of compressed leaves, each given as a list."""

    adam: _Adam
    axis_name: compression.AxisName
    variance_floor: float | jax.Array | None
    specs: list[jax.sharding.PartitionSpec]
    groups: list[list[buffers.Buffer]]

    def warmup(
        self, g: Any, m: Any, v: Any, worker: Any, server: Any, frozen: jax.Array | None = None
    ) -> Any:
        """An exact mean of the gradients; keeps the variance where it is `frozen`, if that is given."""
        g = jax.lax.pmean(g, self.axis_name)
        new_v = [self.adam.variance(*x) for x in zip(g, v)]
        if frozen is not None:
            new_v = [jnp.where(frozen, *x) for x in zip(v, new_v)]
        return [self.adam.momentum(*x) for x in zip(g, m)], new_v, worker, server

    def compressed(self, g: Any, m: Any, v: Any, worker: Any, server: Any) -> Any:
        """The sign-compressed mean of the workers' momenta, and the variance as it is."""
        m = [self.adam.momentum(*x) for x in zip(g, m)]
        m, worker, server = buffers.compressed_means(
            m, self.specs, worker, server, self.groups, self.axis_name
        )
        if self.variance_floor is not None:
            m = [jnp.where(x > self.variance_floor, y, 0) for x, y in zip(v, m)]
        return m, v, worker, server

    def run(self, phase: str | None, frozen: jax.Array, operands: tuple[Any, ...]) -> Any:
        """The phase of this name, or the one that the state is in."""
        if phase == "compressed":
            return self.compressed(*operands)
        if phase == "warmup":  # called by name, it may meet a frozen variance
            return self.warmup(*operands, frozen=frozen)
        return jax.lax.cond(frozen, self.compressed, self.warmup, *operands)


def _check_numbers(
    warmup_steps: Any,
    b1: Any,
    b2: Any,
    eps: Any,
    variance_floor: Any,
    bias_correction: Any,
    largest_direction: Any,
) -> None:
    for name, value in (("b1", b1), ("b2", b2)):
        check(name, value, 0.0, 1.0, open_high=True)
    check("eps", eps, 0.0)
    if not isinstance(warmup_steps, VarianceCriterion):
        check("warmup_steps", warmup_steps, 1)
    if variance_floor is not None:
        check("variance_floor", variance_floor, 0.0)
    if largest_direction is not None:
        check("largest_direction", largest_direction, 0.0, open_low=True)
    if not isinstance(bias_correction, bool) and bias_correction != "frozen_variance":
        raise ValueError(
            f"bias_correction={bias_correction!r} is not known; allowed: True, False, 'frozen_variance' "
            "(did you mean 'frozen_variance'?)."
        )


def scale_by_one_bit_adam(
    axis_name: compression.AxisName,
    warmup_steps: int | jax.Array | VarianceCriterion,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    *,
    layout: buffers.Layout = "joined",
    compress: masks.Mask = None,
    axes: axes_lib.Axes = None,
    param_specs: Any = None,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    variance_floor: float | jax.Array | None = 0.0,
    bias_correction: BiasCorrection = False,
    largest_direction: float | jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam that, after a warm-up, exchanges one bit per element of its momenta; for use inside `jax.shard_map`.

    Args:
        axis_name: mesh axis of the workers, or a tuple of axes. If there are several axes, the slow one.
        warmup_steps: T >= 1, the number of steps with a plain mean; or a `VarianceCriterion` that ends the warm-up.
        b1: β₁ in [0, 1), decay of the momentum.
        b2: β₂ in [0, 1), decay of the variance.
        eps: ε >= 0, added to √v, in units of the gradient.
        layout: what shares an exchange and a scale: ``"joined"``, all leaves share one exchange and each matrix has its
            own scale, as in the released code; ``"per_leaf"``, the same numbers with one exchange per leaf; ``"flat"``,
            one exchange and one scale for all (`buffers`).
        compress: which leaves are compressed, in any form of `masks.strengths`. None: every leaf this link is given.
        axes: what the parameters' axes mean (`axes.signatures`). Roles in `compress` come from it, and each matrix of
            a leaf that stacks several has its own scale.
        param_specs: tree (or prefix) of PartitionSpec, if the parameters are sharded over other mesh axes.
        mesh: the mesh from which ``init`` learns the number of workers where neither `shard_map` nor ``jax.set_mesh``
            gives it. (A mesh is callable: ``optax.inject_hyperparams`` needs it in ``static_args``.)
        variance_floor: momenta are 0 where the frozen v is at most this, in units of the squared gradient. None: no
            momentum is set to 0.
        bias_correction: True divides m by 1 − β₁^t and v by 1 − β₂^t, in both phases. ``"frozen_variance"`` divides the
            frozen v by 1 − β₂^T, and nothing before.
        largest_direction: ρ > 0, bound of ``|u|`` of compressed leaves after the warm-up, dimensionless. None: no
            bound.

    Returns:
        A transformation with a `OneBitAdamState`. Its ``update`` takes the extra argument ``phase``. None compiles both
        phases and runs the one that the state is in. ``"warmup"`` or ``"compressed"`` compiles only that phase, and the
        caller switches when `one_bit_phase` does. ``"compressed"`` before the end of the warm-up ends it; ``"warmup"``
        after the end averages exactly and keeps the frozen variance.

    Raises:
        ValueError: a number out of its range or an unknown name; at ``init``, a mask that compresses nothing, or
            parameters sharded over `axis_name`; when updated, gradients that are averaged already, or errors in the
            state that were made for another number of workers.

    >>> import jax, jax.numpy as jnp, optax_decay
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> tx = optax_decay.scale_by_one_bit_adam("data", warmup_steps=100, mesh=mesh)
    >>> state = tx.init({"w": jnp.ones((3, 4))})
    >>> specs = optax_decay.one_bit.state_partition_specs(state, "data")
    >>> tuple(specs.worker_error["w"]), tuple(specs.mu["w"])
    (('data',), ())
    """
    _check_numbers(warmup_steps, b1, b2, eps, variance_floor, bias_correction, largest_direction)
    one_of("layout", layout, buffers.LAYOUTS)
    masks.check_mask(compress)
    adam = _Adam(b1, b2, eps, bias_correction)

    @once_per_structure
    def described(shapes: optax.Params) -> list[checks.Parameter]:
        return checks.describe(shapes, compress, axes, param_specs, axis_name)

    def describe(tree: Any) -> tuple[list[checks.Parameter], tuple[buffers.Buffer, ...]]:
        found = described(tree)
        pieces = [
            buffers.Piece(p.path, tuple(x.shape), accumulator_dtype(x.dtype), p.spec, p.batch)
            for p, x in zip(found, jax.tree.leaves(tree))
            if p.compressed
        ]
        return found, buffers.plan(pieces, layout, axis_name, mesh)

    def init(params: optax.Params) -> OneBitAdamState:
        def zeros() -> Any:
            return jax.tree.map(lambda x: jnp.zeros_like(x, accumulator_dtype(x.dtype)), params)

        if has_no_leaves(params):
            return placeholder_state(OneBitAdamState, mu=zeros(), nu=zeros())
        found, planned = describe(params)
        checks.check_compressed(found, compress)
        checks.check_placement(found, jax.tree.leaves(params), axis_name)
        worker, server = buffers.zero_errors(planned)
        last_check = VarianceCheck(jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32))
        count, warmup_end = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return OneBitAdamState(count, warmup_end, zeros(), zeros(), worker, server, last_check)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        phase: str | None = None,
        **extra: Any,
    ) -> tuple[Any, OneBitAdamState]:
        del params, extra
        if phase is not None:
            one_of("phase", phase, PHASES)
        incoming, treedef = jax.tree.flatten(updates)
        if not incoming:
            return updates, state._replace(count=increment(state.count))
        found, planned = describe(updates)
        mu, nu = treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu)
        checks.check_update(found, incoming, mu, axis_name)
        buffers.check_errors(planned, state.worker_error, state.server_error)
        grads = [g.astype(m.dtype) for g, m in zip(incoming, mu)]
        packed = [i for i, p in enumerate(found) if p.compressed]
        plain = [i for i, p in enumerate(found) if not p.compressed]
        specs = [found[i].spec for i in packed]
        frozen = state.warmup_end > 0

        groups = buffers.exchange_groups(planned, layout)
        phases = _Phases(adam, axis_name, variance_floor, specs, groups)
        operands = ([x[i] for i in packed] for x in (grads, mu, nu))
        results = phases.run(phase, frozen, (*operands, state.worker_error, state.server_error))
        packed_mu, packed_nu, worker, server = results

        count = increment(state.count)
        if phase == "compressed":
            last_check, ended_at = state.last_check, jnp.maximum(state.count, 1)
        else:
            ended, last_check = warmup_ends(
                warmup_steps, b2, frozen, count, state.last_check, packed_nu, specs
            )
            ended_at = jnp.where(ended, count, 0)
        warmup_end = jnp.where(frozen, state.warmup_end, ended_at)
        frozen = frozen | (phase == "compressed")

        for i, *moments in zip(packed, packed_mu, packed_nu):
            mu[i], nu[i] = moments
        for i, g in zip(plain, jax.lax.pmean([grads[i] for i in plain], axis_name)):
            mu[i], nu[i] = adam.momentum(g, mu[i]), adam.variance(g, nu[i])
        counts = {True: jnp.where(frozen, warmup_end, count), False: count}
        directions = [
            adam.direction(m, v, count, counts[p.compressed], frozen)
            for m, v, p in zip(mu, nu, found)
        ]
        if largest_direction is not None:
            for i in packed:
                bounded = jnp.clip(directions[i], -largest_direction, largest_direction)
                directions[i] = jnp.where(frozen, bounded, directions[i])
        directions = [u.astype(g.dtype) for u, g in zip(directions, incoming)]
        moments = treedef.unflatten(mu), treedef.unflatten(nu)
        return treedef.unflatten(directions), OneBitAdamState(
            count, warmup_end, *moments, worker, server, last_check
        )

    return optax.GradientTransformationExtraArgs(init, update)


@passes_options_to(scale_by_one_bit_adam)
def one_bit_adam(
    learning_rate: optax.ScalarOrSchedule,
    axis_name: compression.AxisName,
    warmup_steps: int | jax.Array | VarianceCriterion,
    *,
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation = 0.0,
    compress: masks.Mask = masks.MATRICES,
    mask: masks.Mask = masks.MATRICES,
    axes: axes_lib.Axes = None,
    **options: Unpack[OneBitAdamOptions],
) -> optax.GradientTransformationExtraArgs:
    """1-bit Adam with decoupled weight decay; for use inside `jax.shard_map`.

    Compresses and decays hidden matrices and the output head, not embeddings, norms and biases. Without `axes`, names
    of parameters decide (`axes.signatures`).

    Args:
        learning_rate: η, a number or schedule.
        axis_name, warmup_steps, compress, axes: as in `scale_by_one_bit_adam`.
        weight_decay: λ with AdamW's coupling, a number or schedule; or another decay as a transformation, such as
            ``optax_decay.huber_decay(0.1)``.
        mask: which leaves decay if `weight_decay` is a number or schedule (`masks.strengths`).
        options: b1, b2, eps, layout, param_specs, mesh, variance_floor, bias_correction, largest_direction, as in
            `scale_by_one_bit_adam`.

    Raises:
        ValueError: as in `scale_by_one_bit_adam`; a mask beside a transformation, which has its own.

    >>> import optax_decay
    >>> tx = optax_decay.one_bit_adam(3e-4, "data", warmup_steps=2000, b2=0.95, weight_decay=0.1)
    """
    return optax.chain(
        scale_by_one_bit_adam(axis_name, warmup_steps, compress=compress, axes=axes, **options),
        as_decay(weight_decay, mask, axes),
        scale_by_learning_rate(learning_rate),
    )
