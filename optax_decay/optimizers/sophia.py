r"""Sophia: momentum divided by a diagonal Hessian that is estimated every k steps, and clipped per coordinate.

With g the gradient, ĥ an estimate of the Hessian's diagonal (`curvature`), η the learning rate, λ the decay, and every
operation elementwise::

    m ← β₁ m + (1-β₁) g
    every k steps:  h ← β₂ h + (1-β₂) ĥ
    u = clip(m/(max(γ h, 0) + ε), -c, c)          w ← w - η (u + λ w)

m has the units of g, h of g² per unit of loss; γ has the units that make u a step in units of η: where the clip acts,
a coordinate moves by η c in the direction of m. The *win rate*, the fraction of coordinates with ``|m| < c γ h`` that
the clip leaves alone, is in the state; the authors tune γ until it stays between 0.1 and 0.5.

Reference: Liu, Li, Hall, Liang and Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
Pre-training", arXiv 2305.14342; the authors' code (Liuhong99/Sophia).

**When h is refreshed.** ``refresh="official"``: before steps k, 2k, …, at the weights of that step, and used by it.
That is what the authors' loop does after steps k-1, 2k-1, … on the next batch; the first k steps have h = 0 and move
every coordinate by η c. ``refresh="optax"``: after the updates of steps 0, k, 2k, …, like ``optax.contrib.sophia``.

**How a training step provides ĥ.** Either give a function, which runs inside ``lax.cond`` only when a refresh is due::

    tx = optax_decay.sophia_g(learning_rate=3e-4, weight_decay=0.2, axes=AXES)

    @jax.jit
    def train_step(params, opt_state, batch):
        def logits_fn(params, batch):
            return model(params, batch["inputs"])                     # [..., classes]
        def loss_fn(params):
            return masked_mean_cross_entropy(logits_fn(params, batch), batch["labels"], batch["mask"])
        loss, grads = jax.value_and_grad(loss_fn)(params)
        hessian_fn = optax_decay.gnb_hessian(logits_fn, batch, batch["mask"])
        updates, opt_state = tx.update(grads, opt_state, params, hessian_fn=hessian_fn)
        return optax.apply_updates(params, updates), opt_state, loss

In ``shard_map`` give `gnb_hessian` the ``axis_name`` of the batch. Or compile two steps, with and without a refresh,
and let the loop choose; then nothing of the estimate stands in the ordinary step's program::

    for step, batch in enumerate(batches):
        refresh = optax_decay.sophia_refresh_is_due(step, update_interval=10)
        params, opt_state = (refresh_step if refresh else plain_step)(params, opt_state, batch)

    # in refresh_step:  tx.update(grads, opt_state, params, hessian=hessian_fn(params, key))
    # in plain_step:    tx.update(grads, opt_state, params, hessian=None)

**Differs from the paper.**

* The paper divides by max(γh, ε) with ε = 1e-12, the authors' code by ρ·B·h + 1e-15. This is the code's form, and with
  negative h (Hutchinson) both are the same: ε. B is part of ĥ here, so γ = ρ; see `curvature`. The example in the
  authors' README gives B as a number of batches; their training script means tokens.
* The authors clip the sampled-label gradient to norm 1 before squaring; here ``gnb_hessian(max_norm=1.0)`` does.
* ``optax.contrib.sophia`` corrects the bias of m, uses ε = 1e-8, γ = 0.01 and λ = 1e-4, always draws ±1, and leaves
  averaging over devices to the user; the authors do not correct (`bias_correction`). Its default key is made at import.
* Decay is added to the update; the authors shrink weights by 1-ηλ first, which gives the same weights.

**Does it help?** The authors report half of AdamW's steps. Issues on their repository report 2.876 against 2.869 for
AdamW after tuning both in one script, and 2.897 at 100k steps against 2.863 for AdamW at 200k. Independent benchmarks
(arXiv 2509.01440) find it at or behind AdamW. Treat the claim as not resolved. A refresh costs about one gradient,
so k = 10 adds about 10 % to a training step; the state is as large as Adam's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check
from optax_decay.parameters.meshes import varying_axes
from optax_decay.product import masks
from optax_decay.product.decay import as_decay
from optax_decay.product.per_matrix import accumulator_dtype
from optax_decay.product.product import increment

REFRESHES = ("official", "optax")


class ScaleBySophiaState(NamedTuple):
    """State of `scale_by_sophia`.

    Attributes:
        count: int32 scalar, completed updates.
        hessian_count: int32 scalar, completed refreshes of h.
        key: PRNG key the optimizer was created with; refresh i uses ``fold_in(key, i)``.
        win_rate: float32 scalar, fraction of coordinates with ``|m| < c γ h``; measured in steps k, 2k, … (and 0),
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


def _check_schedule(update_interval: Any, refresh: str) -> None:
    check("update_interval", update_interval, 1)
    if not isinstance(update_interval, jax.core.Tracer) and int(update_interval) != update_interval:
        raise ValueError(
            f"update_interval={update_interval!r} is not a whole number of steps; "
            f"the nearest is {max(1, round(float(update_interval)))}."
        )
    if refresh not in REFRESHES:
        near = "optax" if str(refresh).startswith("opt") else "official"
        raise ValueError(
            f"refresh={refresh!r} is not known; allowed: 'official', 'optax' (did you mean {near!r}?)."
        )


def sophia_refresh_is_due(state: Any, update_interval: Any = 10, refresh: str = "official") -> Any:
    """Whether the next update refreshes h.

    Args:
        state: number of completed updates, an int or integer array; or an optimizer state that holds Sophia's.
        update_interval, refresh: as given to the optimizer.

    Returns:
        A bool for an int, else a boolean scalar.

    >>> [step for step in range(8) if sophia_refresh_is_due(step, 3)]
    [3, 6]
    >>> [step for step in range(8) if sophia_refresh_is_due(step, 3, "optax")]
    [0, 3, 6]
    """
    _check_schedule(update_interval, refresh)
    if not isinstance(state, int | np.integer | jax.Array):
        state = optax.tree.get(state, "ScaleBySophiaState").count
    return _due(state, update_interval, refresh)


def _due(count: Any, update_interval: Any, refresh: str) -> Any:
    due = count % update_interval == 0
    return due & (count > 0) if refresh == "official" else due


def _as_key(key: Any) -> jax.Array:
    if isinstance(key, int):
        return jax.random.PRNGKey(key)
    key = jnp.asarray(key)
    is_seed = key.ndim == 0 and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return jax.random.PRNGKey(key.astype(jnp.int32)) if is_seed else jnp.copy(key)


def _with_estimate(nu: Any, estimate: Any, b2: Any) -> Any:
    def hole(x: Any) -> bool:
        return x is None or isinstance(x, optax.MaskedNode)

    def average(h: Any, new: Any) -> Any:
        if hole(h) or hole(new):
            return h
        return (b2 * h + (1 - b2) * jnp.real(new)).astype(h.dtype)

    return jax.tree.map(average, nu, estimate, is_leaf=hole)


def _win_rate(wins: list[jax.Array]) -> jax.Array:
    """Fraction of True over all arrays, and over all devices on which they are different parts."""
    count, size = jnp.zeros([], jnp.float32), jnp.zeros([], jnp.float32)
    for won in wins:
        # Rows first and in integers: a float32 sum of ones stops at 2**24.
        rows = jnp.sum(won, axis=-1, dtype=jnp.int32) if won.ndim else won
        part, names = jnp.sum(rows.astype(jnp.float32)), tuple(varying_axes(won))
        count += jax.lax.psum(part, names) if names else part
        size += float(won.size) * (jax.lax.axis_size(names) if names else 1)
    return count / jnp.maximum(size, 1)


def scale_by_sophia(
    b1: jax.typing.ArrayLike = 0.965,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-15,
    gamma: jax.typing.ArrayLike = 0.05,
    clip_threshold: Any = 1.0,
    update_interval: Any = 10,
    mu_dtype: Any = None,
    *,
    bias_correction: bool = False,
    refresh: str = "official",
    key: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by Sophia's rule.

    ``update`` takes one of two extra arguments, and raises if it gets neither:

    * ``hessian_fn``: ``(params, key) -> ĥ`` such as `gnb_hessian` or `hutchinson` return, run inside ``lax.cond`` when
      a refresh is due. Inside ``optax.masked`` or ``optax.partition`` params has holes; close over the whole tree.
    * ``hessian``: ĥ, a tree like params, with which h is refreshed in this update whatever the counter says; or None
      for an update without refresh. `sophia_refresh_is_due` tells a loop when.

    Args:
        b1: β₁ in [0, 1), decay of the momentum.
        b2: β₂ in [0, 1), decay of h per refresh.
        eps: ε > 0, added to γh.
        gamma: γ > 0, the authors' ρ. 0.05 (0.08 at 355M) for Gauss-Newton-Bartlett, 0.01 for Hutchinson.
        clip_threshold: c > 0.
        update_interval: k >= 1, in steps.
        mu_dtype: dtype of m. None: the parameters', but at least float32.
        bias_correction: divide m by 1-β₁ᵗ, as optax does.
        refresh: ``"official"`` or ``"optax"``; see the top of this file.
        key: seed or PRNG key from which ``hessian_fn`` gets its keys.

    Returns:
        A transformation with a `ScaleBySophiaState`. All numbers may be traced.

    Raises:
        ValueError: a number out of its range, an unknown `refresh`.
    """
    check("b1", b1, 0.0, 1.0, open_high=True)
    check("b2", b2, 0.0, 1.0, open_high=True)
    for name, value in (("eps", eps), ("gamma", gamma), ("clip_threshold", clip_threshold)):
        check(name, value, 0.0, open_low=True)
    _check_schedule(update_interval, refresh)

    def init(params: Any) -> ScaleBySophiaState:
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
        """h and the number of refreshes after this update's refresh, if there is one."""
        now = (state.nu, state.hessian_count)

        def take(estimate: Any) -> Any:
            return _with_estimate(state.nu, estimate, b2), increment(state.hessian_count)

        if (hessian_fn := extra.get("hessian_fn")) is not None:
            key_now = jax.random.fold_in(state.key, state.hessian_count)
            due = _due(state.count, jnp.asarray(update_interval, jnp.int32), refresh)
            return jax.lax.cond(due, lambda: take(hessian_fn(params, key_now)), lambda: now)
        return now if extra["hessian"] is None else take(extra["hessian"])

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if extra.get("hessian_fn") is None and "hessian" not in extra:
            raise ValueError(
                "sophia needs curvature: call tx.update(grads, state, params, hessian_fn=gnb_hessian(...)), "
                "or give an estimate as hessian=..., and hessian=None in steps without refresh."
            )
        if extra.get("hessian_fn") is not None and extra.get("hessian") is not None:
            raise ValueError("hessian_fn and hessian are two sources of one estimate; give one.")
        if params is None and extra.get("hessian_fn") is not None:
            raise ValueError(
                "hessian_fn needs the weights: call tx.update(updates, state, params)."
            )
        count = increment(state.count)
        nu, hessian_count = refreshed(state, params, extra)
        used = nu if refresh == "official" else state.nu
        # 1 - b1**t without cancellation.
        exponent = count.astype(float) * jnp.log1p(-jnp.asarray(1 - b1, float))
        debias = -jnp.expm1(exponent) if bias_correction else None

        def momentum(g: Any, m: Any, h: Any) -> Any:
            if g is None:
                return m
            dtype = jnp.promote_types(g.dtype, h.dtype)
            return b1 * m.astype(dtype) + (1 - b1) * g.astype(dtype)

        def direction(g: Any, m: Any, h: Any) -> Any:
            if g is None:
                return None
            u = corrected(m) / (jnp.maximum(gamma * h, 0) + eps)
            return jnp.clip(u, -clip_threshold, clip_threshold).astype(g.dtype)

        def corrected(m: jax.Array) -> jax.Array:
            return m if debias is None else m / debias.astype(m.dtype)

        def won(g: Any, m: Any, h: Any) -> Any:
            return None if g is None else jnp.abs(corrected(m)) < clip_threshold * gamma * h

        def hole(x: Any) -> bool:
            return x is None

        mu = jax.tree.map(momentum, updates, state.mu, state.nu, is_leaf=hole)
        new_updates = jax.tree.map(direction, updates, mu, used, is_leaf=hole)
        win_rate = jax.lax.cond(
            _due(state.count, jnp.asarray(update_interval, jnp.int32), "optax"),
            lambda: _win_rate(jax.tree.leaves(jax.tree.map(won, updates, mu, used, is_leaf=hole))),
            lambda: state.win_rate,
        )
        mu = jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu)
        new_state = ScaleBySophiaState(count, hessian_count, state.key, win_rate, mu, nu)
        return new_updates, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def sophia_g(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.965,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-15,
    weight_decay: Any = 0.1,
    mask: masks.Mask = masks.MATRICES,
    gamma: jax.typing.ArrayLike = 0.05,
    clip_threshold: Any = 1.0,
    update_interval: Any = 10,
    mu_dtype: Any = None,
    *,
    axes: axes_lib.Axes = None,
    bias_correction: bool = False,
    refresh: str = "official",
    key: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """Sophia-G with decoupled weight decay: pass ``hessian_fn=gnb_hessian(logits_fn, batch, mask)`` to ``update``.

    Decays hidden matrices and the output head, not embeddings, norms and biases. That needs `axes`: without a
    description, every leaf of exactly two dimensions counts as a hidden matrix, embeddings included.

    The authors' settings: learning rate 6e-4 (125M), 7e-4 (355M), 3e-4 (770M), γ 0.05, 0.08, 0.05, λ 0.2, k 10,
    gradients clipped to norm 1, 2000 steps of warm-up, cosine.

    Args:
        learning_rate: η, a number or schedule; also the largest step of a coordinate (times c).
        weight_decay: λ with AdamW's coupling, or any decay of this library as a transformation.
        mask: as in `decay`; `weight_decay_mask` is another name for it.
        axes: what the parameters' axes mean (`axes.signatures`).
        b1, b2, eps, gamma, clip_threshold, update_interval, mu_dtype, bias_correction, refresh, key: as in
            `scale_by_sophia`.

    >>> import optax_decay
    >>> tx = optax_decay.sophia_g(6e-4, weight_decay=0.2)
    """
    link = as_decay(weight_decay, mask, axes)
    sophia = scale_by_sophia(
        b1,
        b2,
        eps,
        gamma,
        clip_threshold,
        update_interval,
        mu_dtype,
        bias_correction=bias_correction,
        refresh=refresh,
        key=key,
    )
    return optax.chain(sophia, link, optax.scale_by_learning_rate(learning_rate))


def sophia_h(
    learning_rate: optax.ScalarOrSchedule, *, gamma: jax.typing.ArrayLike = 0.01, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Sophia-H: `sophia_g` with γ = 0.01; pass ``hessian_fn=hutchinson(loss_fn, batch)`` to ``update``.

    >>> import optax_decay
    >>> tx = optax_decay.sophia_h(6e-4, weight_decay=0.2, refresh="optax", bias_correction=True)
    """
    return sophia_g(learning_rate, gamma=gamma, **options)
