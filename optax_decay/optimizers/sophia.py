r"""Sophia: momentum divided by a diagonal Hessian that is estimated every k steps, and clipped per coordinate.

With g the gradient, ĥ an estimate of the Hessian's diagonal (`curvature`), η the learning rate, λ the decay, and every
operation elementwise::

    m ← β₁ m + (1-β₁) g
    every k steps:  h ← β₂ h + (1-β₂) ĥ
    u = clip(m/(max(γ h, 0) + ε), -c, c)          w ← w - η (u + λ w)

m has the units of g, and h those of g² per unit of loss. γ has the units that make u dimensionless: where the clip
acts, a coordinate moves by η c in the direction of m. The *win rate* is the fraction of coordinates that the clip
leaves alone, ``|m| < c γ h``. It is in the state; the authors tune γ until it stays between 0.1 and 0.5.

Reference: Liu, Li, Hall, Liang and Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
Pre-training", arXiv 2305.14342; the authors' code (Liuhong99/Sophia).

**When h is refreshed.** By default h is refreshed before steps k, 2k, …, at the weights of that step, which then uses
it. This is what the authors' loop does after steps k-1, 2k-1, … on the next batch. In the first k steps h = 0, and
every coordinate moves by η c. ``refresh_after_update=True`` refreshes after the updates of steps 0, k, 2k, …, as
``optax.contrib.sophia`` does.

**How a training step provides ĥ.** Either pass a function, which runs inside ``lax.cond`` when a refresh is due::

    tx = optax_decay.sophia_g(learning_rate=3e-4, weight_decay=0.2, axes=AXES)

    @jax.jit
    def train_step(params, opt_state, batch):
        def logits_fn(params, batch):
            return model(params, batch["inputs"])                     # [..., classes]
        def loss_fn(params):
            return masked_mean_cross_entropy(logits_fn(params, batch), batch["labels"], batch["mask"])
        loss, grads = jax.value_and_grad(loss_fn)(params)
        hessian_fn = optax_decay.curvature.gnb_hessian(logits_fn, batch, batch["mask"])
        updates, opt_state = tx.update(grads, opt_state, params, hessian_fn=hessian_fn)
        return optax.apply_updates(params, updates), opt_state, loss

In ``shard_map`` give `gnb_hessian` the ``axis_name`` of the batch. Or compile two steps, with and without a refresh,
and let the loop choose, so that the program of the ordinary step contains no estimate::

    for step, batch in enumerate(batches):
        due = optax_decay.curvature.refresh_is_due(step, refresh_every=10)
        params, opt_state = (refresh_step if due else plain_step)(params, opt_state, batch)

    # in refresh_step:  tx.update(grads, opt_state, params, hessian=hessian_fn(params, key))
    # in plain_step:    tx.update(grads, opt_state, params, hessian=None)

**Differs from the paper.**

* The paper divides by max(γh, ε) with ε = 1e-12, the authors' code by ρ·B·h + 1e-15. This is the code's form. For
  negative h (Hutchinson) both divide by ε. B is part of ĥ here, so γ = ρ; see `curvature`. The example in the authors'
  README gives B as a number of batches, but their training script uses a number of tokens.
* The authors clip the sampled-label gradient to norm 1 before squaring; ``gnb_hessian(max_norm=1.0)`` does the same.
* ``optax.contrib.sophia`` corrects the bias of m, uses ε = 1e-8, γ = 0.01 and λ = 1e-4, always draws ±1, and leaves
  averaging over devices to the user; the authors do not correct (`bias_correction`). Its default key is made at import.
* Decay is added to the update; the authors shrink weights by 1-ηλ first, which gives the same weights.

**Does it help?** The authors report half of AdamW's steps. Issues on their repository report 2.876 against 2.869 for
AdamW after tuning both in one script, and 2.897 at 100k steps against 2.863 for AdamW at 200k. Independent benchmarks
(arXiv 2509.01440) find it at or behind AdamW. Treat the claim as not resolved. A refresh costs about one gradient,
so k = 10 adds about 10 % to a training step; the state is as large as Adam's.
"""

from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_decay.optimizers.curvature import check_refresh_every, refresh_is_due
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, passes_options_to
from optax_decay.parameters.meshes import varying_axes
from optax_decay.product import masks
from optax_decay.product.decay import as_decay
from optax_decay.product.links import scale_by_learning_rate
from optax_decay.product.per_matrix import accumulator_dtype
from optax_decay.product.product import increment
from optax_decay.product.running_means import share_seen


class ScaleBySophiaState(NamedTuple):
    """State of `scale_by_sophia`.

    Attributes:
        count: int32 scalar, completed updates.
        hessian_count: int32 scalar, completed refreshes of h.
        key: the PRNG key given to the optimizer; refresh i uses ``fold_in(key, i)``.
        win_rate: float32 scalar, fraction of coordinates with ``|m| < c γ h``; measured in steps 0, k, 2k, … only,
            because it costs as much as the rest of a step.
        mu: m, like params, in `mu_dtype` or at least float32.
        nu: h, like params, real, at least float32.
    """

    count: jax.Array
    hessian_count: jax.Array
    key: jax.Array
    win_rate: jax.Array
    mu: Any
    nu: Any


class SophiaOptions(TypedDict, total=False):
    """Keyword arguments that `sophia_g` and `sophia_h` pass on to `scale_by_sophia`, which describes them."""

    b1: float | jax.Array
    b2: float | jax.Array
    eps: float | jax.Array
    clip_threshold: float | jax.Array
    refresh_every: int | jax.Array
    refresh_after_update: bool
    mu_dtype: jax.typing.DTypeLike | None
    bias_correction: bool
    key: int | jax.Array


class DecayedSophiaOptions(SophiaOptions, total=False):
    """Keyword arguments that `sophia_h` passes on to `sophia_g`, which describes them."""

    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation
    mask: masks.Mask
    axes: axes_lib.Axes


def _as_key(key: int | jax.Array) -> jax.Array:
    if isinstance(key, int):
        return jax.random.PRNGKey(key)
    key = jnp.asarray(key)
    is_seed = key.ndim == 0 and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return jax.random.PRNGKey(key.astype(jnp.int32)) if is_seed else jnp.copy(key)


def _with_estimate(nu: Any, estimate: Any, b2: float | jax.Array) -> Any:
    """h after a refresh with this estimate; leaves that either side leaves out stay as they are."""

    def left_out(x: Any) -> bool:
        return x is None or isinstance(x, optax.MaskedNode)

    def mean(h: Any, new: Any) -> Any:
        if left_out(h) or left_out(new):
            return h
        return (b2 * h + (1 - b2) * jnp.real(new)).astype(h.dtype)

    return jax.tree.map(mean, nu, estimate, is_leaf=left_out)


def _win_rate(wins: list[jax.Array]) -> jax.Array:
    """The fraction of True in all arrays, over all devices that hold different parts of them."""
    count, size = jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32)
    for won in wins:
        # Rows first, and in integers: a float32 sum of ones does not grow beyond 2**24.
        rows = jnp.sum(won, axis=-1, dtype=jnp.int32) if won.ndim else won
        part, names = jnp.sum(rows.astype(jnp.float32)), tuple(varying_axes(won))
        count += jax.lax.psum(part, names) if names else part
        size += float(won.size) * (jax.lax.axis_size(names) if names else 1)
    return count / jnp.maximum(size, 1)


def _is_none(x: Any) -> bool:
    return x is None


class _Sophia(NamedTuple):
    """The equations of one leaf; a gradient of None leaves its momentum as it is."""

    b1: float | jax.Array
    eps: float | jax.Array
    gamma: float | jax.Array
    clip_threshold: float | jax.Array
    seen: jax.Array | None  # 1-β₁ᵗ if the bias of m is corrected

    def momentum(self, g: Any, m: Any, h: Any) -> Any:
        if g is None:
            return m
        dtype = jnp.promote_types(g.dtype, h.dtype)
        return self.b1 * m.astype(dtype) + (1 - self.b1) * g.astype(dtype)

    def corrected(self, m: jax.Array) -> jax.Array:
        return m if self.seen is None else m / self.seen.astype(m.dtype)

    def direction(self, g: Any, m: Any, h: Any) -> Any:
        if g is None:
            return None
        u = self.corrected(m) / (jnp.maximum(self.gamma * h, 0) + self.eps)
        return jnp.clip(u, -self.clip_threshold, self.clip_threshold).astype(g.dtype)

    def won(self, g: Any, m: Any, h: Any) -> Any:
        """Where the clip does not act."""
        if g is None:
            return None
        return jnp.abs(self.corrected(m)) < self.clip_threshold * self.gamma * h


def _check_curvature(extra: dict[str, Any], params: Any) -> None:
    if extra.get("hessian_fn") is None and "hessian" not in extra:
        raise ValueError(
            "sophia needs curvature: call tx.update(grads, state, params, hessian_fn=gnb_hessian(...)), "
            "or give an estimate as hessian=..., and hessian=None in steps without refresh."
        )
    if extra.get("hessian_fn") is not None and extra.get("hessian") is not None:
        raise ValueError("hessian_fn and hessian are two sources of one estimate; give one.")
    if params is None and extra.get("hessian_fn") is not None:
        raise ValueError("hessian_fn needs the weights: call tx.update(updates, state, params).")


def scale_by_sophia(
    b1: float | jax.Array = 0.965,
    b2: float | jax.Array = 0.99,
    eps: float | jax.Array = 1e-15,
    gamma: float | jax.Array = 0.05,
    clip_threshold: float | jax.Array = 1.0,
    refresh_every: int | jax.Array = 10,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    bias_correction: bool = False,
    refresh_after_update: bool = False,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by Sophia's rule.

    ``update`` takes one of two extra arguments, and raises if it gets neither:

    * ``hessian_fn``: ``(params, key) -> ĥ``, such as the results of `gnb_hessian` and `hutchinson`. It runs inside
      ``lax.cond`` when a refresh is due. Inside ``optax.masked`` or ``optax.partition`` params has holes, so let the
      function close over the whole tree.
    * ``hessian``: ĥ, a tree like params, with which this update refreshes h whatever the counter says; or None for an
      update without refresh. `curvature.refresh_is_due` tells a loop when a refresh is due.

    Args:
        b1: β₁ in [0, 1), decay of the momentum.
        b2: β₂ in [0, 1), decay of h per refresh.
        eps: ε > 0, added to γh.
        gamma: γ > 0, the authors' ρ. 0.05 (0.08 at 355M) for Gauss-Newton-Bartlett, 0.01 for Hutchinson.
        clip_threshold: c > 0, the largest magnitude of u, dimensionless.
        refresh_every: k >= 1, steps between two refreshes of h.
        mu_dtype: dtype of m. None: the parameters' dtype, but at least float32.
        bias_correction: divide m by 1-β₁ᵗ, as optax does.
        refresh_after_update: refresh h after the updates of steps 0, k, 2k, … instead of before steps k, 2k, ….
        key: seed or PRNG key from which ``hessian_fn`` gets its keys.

    Returns:
        A transformation with a `ScaleBySophiaState`. All numbers may be traced.

    Raises:
        ValueError: a number out of its range; when updated, no curvature or two sources of it.
    """
    check("b1", b1, 0.0, 1.0, open_high=True)
    check("b2", b2, 0.0, 1.0, open_high=True)
    for name, value in (("eps", eps), ("gamma", gamma), ("clip_threshold", clip_threshold)):
        check(name, value, 0.0, open_low=True)
    check_refresh_every(refresh_every)
    every = jnp.asarray(refresh_every, jnp.int32)

    def init(params: optax.Params) -> ScaleBySophiaState:
        def first(p: Any) -> jax.Array:
            return jnp.zeros_like(p, mu_dtype or jnp.promote_types(p.dtype, jnp.float32))

        def second(p: Any) -> jax.Array:
            return jnp.zeros_like(p, accumulator_dtype(p.dtype))

        return ScaleBySophiaState(
            count=jnp.zeros([], jnp.int32),
            hessian_count=jnp.zeros([], jnp.int32),
            key=_as_key(key),
            win_rate=jnp.zeros([], jnp.float32),
            mu=jax.tree.map(first, params),
            nu=jax.tree.map(second, params),
        )

    def refreshed(state: ScaleBySophiaState, params: Any, extra: dict[str, Any]) -> Any:
        """h and the number of refreshes after the refresh of this update, if there is one."""
        old = (state.nu, state.hessian_count)

        def take(estimate: Any) -> Any:
            return _with_estimate(state.nu, estimate, b2), increment(state.hessian_count)

        if (hessian_fn := extra.get("hessian_fn")) is not None:
            key_now = jax.random.fold_in(state.key, state.hessian_count)
            due = refresh_is_due(state.count, every, refresh_after_update)
            return jax.lax.cond(due, lambda: take(hessian_fn(params, key_now)), lambda: old)
        return old if extra["hessian"] is None else take(extra["hessian"])

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> Any:
        _check_curvature(extra, params)
        count = increment(state.count)
        nu, hessian_count = refreshed(state, params, extra)
        used = state.nu if refresh_after_update else nu
        seen = share_seen(b1, count, jnp.result_type(float)) if bias_correction else None
        leaf = _Sophia(b1, eps, gamma, clip_threshold, seen)
        mu = jax.tree.map(leaf.momentum, updates, state.mu, state.nu, is_leaf=_is_none)
        new_updates = jax.tree.map(leaf.direction, updates, mu, used, is_leaf=_is_none)

        def measured() -> jax.Array:
            won = jax.tree.map(leaf.won, updates, mu, used, is_leaf=_is_none)
            return _win_rate(jax.tree.leaves(won))

        win_rate = jax.lax.cond(state.count % every == 0, measured, lambda: state.win_rate)
        mu = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
        new_state = ScaleBySophiaState(count, hessian_count, state.key, win_rate, mu, nu)
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(init, update)


@passes_options_to(scale_by_sophia)
def sophia_g(
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: float | jax.Array = 0.05,
    weight_decay: optax.ScalarOrSchedule | optax.GradientTransformation = 0.1,
    mask: masks.Mask = masks.MATRICES,
    axes: axes_lib.Axes = None,
    **options: Unpack[SophiaOptions],
) -> optax.GradientTransformationExtraArgs:
    """Sophia-G with decoupled weight decay: pass ``hessian_fn=gnb_hessian(logits_fn, batch, mask)`` to ``update``.

    Decays hidden matrices and the output head, not embeddings, norms and biases. Without `axes`, names of parameters
    decide (`axes.signatures`).

    The authors' settings: learning rate 6e-4 (125M), 7e-4 (355M), 3e-4 (770M), γ 0.05, 0.08, 0.05, λ 0.2, k 10,
    gradients clipped to norm 1, 2000 steps of warm-up, cosine.

    Args:
        learning_rate: η, a number or schedule; also the largest step of a coordinate (times c).
        gamma: γ > 0, as in `scale_by_sophia`.
        weight_decay: λ with AdamW's coupling, a number or schedule; or any decay of this library as a transformation.
        mask: which leaves decay if `weight_decay` is a number or schedule (`masks.strengths`).
        axes: what the parameters' axes mean (`axes.signatures`); roles in `mask` come from it.
        options: b1, b2, eps, clip_threshold, refresh_every, mu_dtype, bias_correction, refresh_after_update, key, as in
            `scale_by_sophia`.

    Raises:
        ValueError: as in `scale_by_sophia`; a mask or axes beside a transformation, which has its own.

    >>> import optax_decay
    >>> tx = optax_decay.sophia_g(6e-4, weight_decay=0.2)
    """
    return optax.chain(
        scale_by_sophia(gamma=gamma, **options),
        as_decay(weight_decay, mask, axes, only_use_of_axes=True),
        scale_by_learning_rate(learning_rate),
    )


@passes_options_to(sophia_g)
def sophia_h(
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: float | jax.Array = 0.01,
    **options: Unpack[DecayedSophiaOptions],
) -> optax.GradientTransformationExtraArgs:
    """Sophia-H: `sophia_g` with γ = 0.01; pass ``hessian_fn=hutchinson(loss_fn, batch)`` to ``update``.

    Args:
        learning_rate, gamma: as in `sophia_g`.
        options: weight_decay, mask, axes, b1, b2, eps, clip_threshold, refresh_every, mu_dtype, bias_correction,
            refresh_after_update, key, as in `sophia_g`.

    >>> import optax_decay
    >>> tx = optax_decay.sophia_h(6e-4, weight_decay=0.2, bias_correction=True)
    """
    return sophia_g(learning_rate, gamma=gamma, **options)
