"""1-bit Adam: momenta that cross the network as signs.

Warm-up, steps 1 … T, with ḡ_t the mean of the workers' gradients g_{n,t} (a plain all-reduce)::

    m_t = β₁ m_{t−1} + (1−β₁) ḡ_t        v_t = β₂ v_{t−1} + (1−β₂) ḡ_t²

Afterwards v = v_T stays, and only signs are exchanged::

    m_t = C_n(β₁ m_{t−1} + (1−β₁) g_{n,t})        m_t ← 0 where v ≤ variance_floor

with C the sign-compressed mean of `sign_compression`, which carries what it could not send to the next step. Both
phases::

    u_t = m_t / (√v + ε)

m, v: gradient and squared gradient, float32 (float64 for float64); the same on every worker to the last bit, as is u.
β₁, β₂, ε: dimensionless, ε in gradients. T: `warmup_steps`, 15–25 % of a run by its authors' advice. Of N workers each
sends about P/4 bytes per step for P compressed parameters, a plain all-reduce 8P (float32).

Reference: Tang et al., 1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed,
arXiv 2102.02888; released code: DeepSpeed, ``OnebitAdam``.

**Differs from the paper** and from the released code:

* T counts real steps. The code spends its first step on set-up: its ``freeze_step`` is T + 1.
* Where the frozen variance is 0 the momentum is 0, by default: such a coordinate receives the noise of its
  neighbours divided by ε and reaches 1e4 and more in ten steps. The code leaves that to the user
  (``exp_avg_mask``); `variance_floor=None` does too.
* A coordinate that gets its first gradient after T never moves, so embeddings, whose rare rows are of this kind,
  should not be compressed: `one_bit_adam` compresses hidden matrices and the head. Leaves that are not compressed
  continue as in the warm-up, with a variance that is not frozen (the code's ``non_freeze`` group).
* No bias correction, as in the code, and unlike Adam. A variance frozen at T is short by 1 − β₂^T, which inflates all
  later steps (by 3.2 for T = 100, 1.26 for T = 1000 at β₂ = 0.999): `bias_correct_frozen_variance` divides by it
  from T on. `bias_correction` corrects m and v in both phases: the warm-up is ``optax.adam`` to rounding.
* The automatic criterion of the paper, ‖v_t‖₁ / ‖v_{t−Δ}‖₁ ≥ 0.96, also holds while v still grows from 0;
  `VarianceCriterion` bounds the ratio from both sides (``growth=math.inf`` is the paper's).
* Everything is in the state, errors too; the code drops errors whenever it loads a checkpoint.
* Beyond the paper, off by default: `largest_direction` ρ bounds ``|u|`` by ρ once signs are sent. All ``|m|`` of a
  matrix are then one number s and u is ±s/√v: where v froze at less than s², the noise of signs moves a weight by more
  than Adam ever would. The bound is the same as raising such v to (s/ρ)². Weights that seldom have a gradient, such as
  a head's columns of rare tokens, are of this kind the more the shorter v remembers. With β₂ = 0.95 and unclipped
  gradients a small LLaMA's loss rose from 1.9 to 178 within 50 steps of the warm-up's end; ρ = 1 prevents that, and
  makes no difference where gradients are clipped (``RESULTS.md``).

**Using it.** Run the step in `jax.shard_map` over the axis and differentiate with respect to `local_params`, so that
gradients are each worker's own. A link in front of this one (clipping) sees the local gradient, in both phases.
Parameters must not be sharded over the compressed axis. Over other axes they may: shard the model inside a slice, pass
`param_specs`, and compress over the slow outer axis only. The `shard_map` then needs to be over that axis alone
(``axis_names={"slice"}``; the compiler does the rest as before), or over all. Momenta are compressed shard by shard, so
scales are per shard and the trajectory depends on the number of shards. Make the axes inside the slice Auto: with
Explicit ones jax 0.10 gathers shards around the exchange (inside the slice; 0.12 does not).
"""

import difflib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_decay.one_bit import buffers as sign_buffers
from optax_decay.one_bit import checks as worker_checks
from optax_decay.one_bit import compression as sc
from optax_decay.one_bit.freeze import Look, VarianceCriterion, warmup_ends
from optax_decay.parameters import axes as axes_lib
from optax_decay.product import masks
from optax_decay.product.decay import as_decay
from optax_decay.product.per_matrix import accumulator_dtype
from optax_decay.product.pulls import check

PHASES = ("warmup", "compressed")


class OneBitAdamState(NamedTuple):
    """State of `scale_by_one_bit_adam`. All but the errors is the same on every worker.

    Attributes:
        count: int32 scalar, completed steps.
        freeze_count: int32 scalar, completed steps when the variance froze; 0 during the warm-up.
        mu: like params, float32: m.
        nu: like params, float32: v, without any bias correction.
        worker_error: {buffer: float32 [devices, matrices, padded elements]}, what each worker has yet to send.
        server_error: {buffer: float32 [devices, matrices, padded elements / N]}, the same for the chunk it serves.
        look: what the automatic criterion saw last.
    """

    count: jax.Array
    freeze_count: jax.Array
    mu: Any
    nu: Any
    worker_error: Any
    server_error: Any
    look: Look


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{name}={value!r} is not known; allowed: {', '.join(allowed)} (nearest: {near!r})."
        )


def _share_seen(decay_rate: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """``1 − β^count``, what an average of `count` steps from 0 has seen of a constant."""
    if isinstance(decay_rate, float) and 0 < decay_rate < 1:
        # 1 - 0.999**100 in float32 is off by 1e-5, because 0.999 is.
        return -jnp.expm1(count.astype(dtype) * math.log(decay_rate))
    return 1 - decay_rate ** count.astype(dtype)


class _Adam(NamedTuple):
    """The equations of one leaf."""

    b1: Any
    b2: Any
    eps: Any
    correct_frozen: bool
    correct: bool

    def momentum(self, g: jax.Array, m: jax.Array) -> jax.Array:
        return self.b1 * m + (1 - self.b1) * g

    def variance(self, g: jax.Array, v: jax.Array) -> jax.Array:
        return self.b2 * v + (1 - self.b2) * (g * g)

    def direction(
        self, m: jax.Array, v: jax.Array, count: jax.Array, v_count: jax.Array, frozen: jax.Array
    ) -> jax.Array:
        """u; m averages `count` steps and v `v_count`."""
        if self.correct:
            m = m / _share_seen(self.b1, count, m.dtype)
            v = v / _share_seen(self.b2, v_count, v.dtype)
        elif self.correct_frozen:
            v = v / jnp.where(frozen, _share_seen(self.b2, v_count, v.dtype), 1)
        return m / (jnp.sqrt(v) + self.eps)


def scale_by_one_bit_adam(
    axis_name: sc.AxisName,
    warmup_steps: int | VarianceCriterion,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    layout: str = "joined",
    compress: masks.Mask = None,
    axes: axes_lib.Axes = None,
    param_specs: Any = None,
    mesh: Any = None,
    variance_floor: float | None = 0.0,
    bias_correct_frozen_variance: bool = False,
    bias_correction: bool = False,
    largest_direction: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam whose momenta, after a warm-up, cross the mesh as one bit per element; for use inside `jax.shard_map`.

    Args:
        axis_name: mesh axis of the workers (or a tuple of axes); the slow one, if there are several.
        warmup_steps: T, steps with a plain mean, at least 1; or a `VarianceCriterion` that decides.
        b1, b2: β₁, β₂, in [0, 1).
        eps: ε, in gradients, >= 0.
        layout: ``"joined"``, one scale per matrix as in the released code and all in one exchange; ``"per_leaf"``,
            the same numbers and one exchange per parameter; ``"flat"``, one scale for all (`sign_buffers`).
        compress: which leaves are compressed, in any form of `masks.strengths`. None: every leaf this link is given.
        axes: what the parameters' axes mean (`axes.signatures`); for roles in `compress`, and for parameters that
            stack several matrices, each of which gets its own scale.
        param_specs: tree (or prefix) of PartitionSpec if the parameters are sharded over other mesh axes.
        mesh: tells ``init`` the number of workers where neither `shard_map` nor ``jax.set_mesh`` does. (It is callable:
            ``optax.inject_hyperparams`` needs it in ``static_args``.)
        variance_floor: momenta are 0 where the frozen v is at most this, in squared gradients; None: nowhere.
        bias_correct_frozen_variance: divide the frozen v by 1 − β₂^T, once it is frozen.
        bias_correction: divide m by 1 − β₁^t and v by 1 − β₂^t, in both phases.
        largest_direction: ρ, bound of ``|u|`` of compressed leaves after the warm-up, dimensionless; None: none.

    Returns:
        A transformation with a `OneBitAdamState`. Its ``update`` takes the extra argument ``phase``: None compiles both
        phases and takes the one that the state asks for; ``"warmup"`` or ``"compressed"`` compiles only one, and
        the caller switches when `one_bit_phase` does. ``"compressed"`` before the end of the warm-up ends it;
        ``"warmup"`` after it averages exactly and keeps the frozen variance.

    Raises:
        ValueError: a number out of its range or an unknown name; parameters sharded over `axis_name`; gradients that
            have been averaged already; errors in the state that belong to another number of workers.

    >>> import jax, jax.numpy as jnp, optax_decay
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> tx = optax_decay.scale_by_one_bit_adam("data", warmup_steps=100, mesh=mesh)
    >>> state = tx.init({"w": jnp.ones((3, 4))})
    >>> specs = optax_decay.state_partition_specs(state, "data")
    >>> tuple(specs.worker_error["w"]), tuple(specs.mu["w"])
    (('data',), ())
    """
    for name, value in (("b1", b1), ("b2", b2)):
        check(name, value, 0.0, 1.0, open_high=True)
    check("eps", eps, 0.0)
    if not isinstance(warmup_steps, VarianceCriterion):
        check("warmup_steps", warmup_steps, 1)
    if variance_floor is not None:
        check("variance_floor", variance_floor, 0.0)
    if largest_direction is not None:
        check("largest_direction", largest_direction, 0.0, open_low=True)
    _check_choice("layout", layout, sign_buffers.LAYOUTS)
    masks.check_mask(compress)
    adam = _Adam(b1, b2, eps, bias_correct_frozen_variance, bias_correction)

    def describe(tree: Any) -> tuple[list[worker_checks.Leaf], tuple[sign_buffers.Buffer, ...]]:
        leaves = worker_checks.resolve(tree, compress, axes, param_specs, axis_name)
        pieces = [
            sign_buffers.Piece(
                leaf.path, tuple(x.shape), accumulator_dtype(x.dtype), leaf.spec, leaf.batch
            )
            for leaf, x in zip(leaves, jax.tree.leaves(tree))
            if leaf.compressed
        ]
        return leaves, sign_buffers.plan(pieces, layout, axis_name, mesh)

    def init(params: Any) -> OneBitAdamState:
        def zeros() -> Any:
            return jax.tree.map(lambda x: jnp.zeros_like(x, accumulator_dtype(x.dtype)), params)

        # optax.tree.map_params calls init with a leafless placeholder and needs a prefix of the real state.
        worker: Any = jnp.zeros([])
        server: Any = jnp.zeros([])
        if jax.tree.leaves(params):
            leaves, buffers = describe(params)
            worker_checks.check_placement(leaves, jax.tree.leaves(params), axis_name)
            worker, server = sign_buffers.zero_errors(buffers)
        look = Look(jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32))
        count, freeze_count = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        return OneBitAdamState(count, freeze_count, zeros(), zeros(), worker, server, look)

    def update(
        updates: Any, state: Any, params: Any = None, *, phase: Any = None, **extra: Any
    ) -> tuple[Any, OneBitAdamState]:
        del params, extra
        if phase is not None:
            _check_choice("phase", phase, PHASES)
        incoming, treedef = jax.tree.flatten(updates)
        if not incoming:
            return updates, state._replace(count=optax.safe_increment(state.count))
        leaves, buffers = describe(updates)
        mu, nu = treedef.flatten_up_to(state.mu), treedef.flatten_up_to(state.nu)
        worker_checks.check_update(leaves, incoming, mu, axis_name)
        sign_buffers.check_errors(buffers, state.worker_error, state.server_error)
        grads = [g.astype(m.dtype) for g, m in zip(incoming, mu)]
        packed = [i for i, leaf in enumerate(leaves) if leaf.compressed]
        plain = [i for i, leaf in enumerate(leaves) if not leaf.compressed]
        specs = [leaves[i].spec for i in packed]
        groups = sign_buffers.exchanges(buffers, layout)

        frozen = state.freeze_count > 0

        def exact(g: Any, m: Any, v: Any, worker: Any, server: Any) -> Any:
            g = jax.lax.pmean(g, axis_name)
            new_v = [adam.variance(*x) for x in zip(g, v)]
            if phase == "warmup":  # called by name, it may meet a frozen variance
                new_v = [jnp.where(frozen, *x) for x in zip(v, new_v)]
            return [adam.momentum(*x) for x in zip(g, m)], new_v, worker, server

        def signs(g: Any, m: Any, v: Any, worker: Any, server: Any) -> Any:
            m = [adam.momentum(*x) for x in zip(g, m)]
            m, worker, server = sign_buffers.compress(m, specs, worker, server, groups, axis_name)
            if variance_floor is not None:
                m = [jnp.where(x > variance_floor, y, 0) for x, y in zip(v, m)]
            return m, v, worker, server

        operands = ([x[i] for i in packed] for x in (grads, mu, nu))
        operands = (*operands, state.worker_error, state.server_error)
        if phase is None:
            results = jax.lax.cond(frozen, signs, exact, *operands)
        else:
            results = (signs if phase == "compressed" else exact)(*operands)
        packed_mu, packed_nu, worker, server = results

        count = jnp.asarray(optax.safe_increment(state.count))
        if phase == "compressed":
            look, ended_at = state.look, jnp.maximum(state.count, 1)
        else:
            ended, look = warmup_ends(warmup_steps, b2, frozen, count, state.look, packed_nu, specs)
            ended_at = jnp.where(ended, count, 0)
        freeze_count = jnp.where(frozen, state.freeze_count, ended_at)
        frozen = frozen | (phase == "compressed")

        for i, *moments in zip(packed, packed_mu, packed_nu):
            mu[i], nu[i] = moments
        for i, g in zip(plain, jax.lax.pmean([grads[i] for i in plain], axis_name)):
            mu[i], nu[i] = adam.momentum(g, mu[i]), adam.variance(g, nu[i])
        counts = {True: jnp.where(frozen, freeze_count, count), False: count}
        directions = [
            adam.direction(m, v, count, counts[leaf.compressed], frozen)
            for m, v, leaf in zip(mu, nu, leaves)
        ]
        if largest_direction is not None:
            for i in packed:
                bounded = jnp.clip(directions[i], -largest_direction, largest_direction)
                directions[i] = jnp.where(frozen, bounded, directions[i])
        directions = [u.astype(g.dtype) for u, g in zip(directions, incoming)]
        new_state = OneBitAdamState(
            count,
            freeze_count,
            treedef.unflatten(mu),
            treedef.unflatten(nu),
            worker,
            server,
            look,
        )
        return treedef.unflatten(directions), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def one_bit_adam(
    learning_rate: optax.ScalarOrSchedule,
    axis_name: sc.AxisName,
    warmup_steps: int | VarianceCriterion,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Any = 0.0,
    *,
    layout: str = "joined",
    compress: masks.Mask = masks.MATRICES,
    mask: masks.Mask = masks.MATRICES,
    axes: axes_lib.Axes = None,
    param_specs: Any = None,
    mesh: Any = None,
    variance_floor: float | None = 0.0,
    bias_correct_frozen_variance: bool = False,
    bias_correction: bool = False,
    largest_direction: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """1-bit Adam with decoupled weight decay; for use inside `jax.shard_map`.

    Compresses and decays hidden matrices and the output head, not embeddings, norms and biases. That needs `axes`:
    without a description, every leaf of exactly two dimensions counts as a hidden matrix, embeddings included.

    Args:
        learning_rate: η, a number or schedule.
        axis_name, warmup_steps, b1, b2, eps, layout, compress, axes, param_specs, mesh: as in `scale_by_one_bit_adam`.
        variance_floor, bias_correct_frozen_variance, bias_correction, largest_direction: as there.
        weight_decay: λ with AdamW's coupling, or another decay, such as ``optax_decay.decay(0.1, pull="huber")``.
        mask: which leaves decay if `weight_decay` is a number; `weight_decay_mask` is another name for it.

    >>> import optax_decay
    >>> tx = optax_decay.one_bit_adam(3e-4, "data", warmup_steps=2000, b2=0.95, weight_decay=0.1)
    """
    return optax.chain(
        scale_by_one_bit_adam(
            axis_name,
            warmup_steps,
            b1,
            b2,
            eps,
            layout=layout,
            compress=compress,
            axes=axes,
            param_specs=param_specs,
            mesh=mesh,
            variance_floor=variance_floor,
            bias_correct_frozen_variance=bias_correct_frozen_variance,
            bias_correction=bias_correction,
            largest_direction=largest_direction,
        ),
        as_decay(weight_decay, mask, axes),
        optax.scale_by_learning_rate(learning_rate),
    )
