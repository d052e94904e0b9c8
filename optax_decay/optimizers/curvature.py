"""Unbiased estimates of the diagonal of the Hessian (or Gauss-Newton matrix) of a mean loss.

Both factories return a function ``(params, key) -> tree like params``, float32 or better, which is the ``hessian_fn``
of `scale_by_sophia`. Nothing is computed before it is called. With L the mean loss over B positions (tokens)::

    Gauss-Newton-Bartlett   ŷ ~ softmax(logits) per position,  ĝ = ∇ mean cross-entropy(logits, ŷ),   ĥ = B ĝ²
    Hutchinson              u ~ N(0, I) or ±1,                                                        ĥ = u ⊙ (∇²L u)

ĝ has the units of a gradient and ĥ those of ∇²L. The first estimate is never negative and costs one forward and one
backward pass; its expectation is the diagonal of the Gauss-Newton matrix, which for softmax regression is the Hessian.
The second may be negative and costs a Hessian-vector product, about two gradients.

References: Liu et al., "Sophia", arXiv 2305.14342; Hutchinson, "A stochastic estimator of the trace of the influence
matrix", 1990; Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix", 2007.

**Differs from released code.**

* B is part of ĥ. The authors' code leaves it out of the running mean and multiplies by it in the step
  (``rho * bs * h``); a port without it needs a γ of several hundred. If positions are masked, B counts the others.
* ĝ is summed over micro-batches and devices *before* it is squared; squares of local gradients would need the local B.
* The authors clip ĝ to norm 1 before squaring, which biases ĥ. This is off by default; ``max_norm=1.0`` turns it on.
* Each device draws the labels of its own positions from a key of its own; one forward pass gives both labels and ĝ.
* Rademacher signs are +1 and -1 with equal probability. (A widely used package draws only -1, which gives row sums.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_decay.parameters.arguments import check, one_of
from optax_decay.parameters.meshes import mark_varying, varying_axes
from optax_decay.product.per_matrix import accumulator_dtype

HessianFn = Callable[[Any, jax.Array], Any]
AxisName = str | Sequence[str] | None
DISTRIBUTIONS = ("normal", "rademacher")


def refresh_is_due(
    state: Any, refresh_every: int | jax.Array = 10, refresh_after_update: bool = False
) -> Any:
    """Whether the next update of Sophia refreshes its curvature.

    Args:
        state: number of completed updates, an int or integer array; or an optimizer state that contains Sophia's.
        refresh_every, refresh_after_update: as given to the optimizer.

    Returns:
        A bool for an int, else a boolean scalar.

    Raises:
        ValueError: a number of steps out of its range, or not whole.

    >>> [step for step in range(8) if refresh_is_due(step, 3)]
    [3, 6]
    >>> [step for step in range(8) if refresh_is_due(step, 3, refresh_after_update=True)]
    [0, 3, 6]
    """
    check_refresh_every(refresh_every)
    if not isinstance(state, int | np.integer | jax.Array):
        state = optax.tree.get(state, "ScaleBySophiaState").count
    due = state % refresh_every == 0
    return due if refresh_after_update else due & (state > 0)


def check_refresh_every(refresh_every: int | jax.Array) -> None:
    """Raises ValueError unless `refresh_every` is a whole number of steps, or traced."""
    check("refresh_every", refresh_every, 1)
    if isinstance(refresh_every, jax.core.Tracer):
        return
    steps = float(refresh_every)
    if int(steps) != steps:
        raise ValueError(
            f"refresh_every={refresh_every!r} is not a whole number of steps; "
            f"the nearest is {max(1, round(steps))}."
        )


def _names(axis_name: AxisName) -> tuple[str, ...]:
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def _local(params: optax.Params, names: tuple[str, ...]) -> Any:
    """Replicated params as copies of each device; the gradients of replicated ones would be sums over devices."""

    def local(p: jax.Array) -> jax.Array:
        return mark_varying(p, names)

    return jax.tree.map(local, params)


def _device_key(key: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return jax.random.fold_in(key, jax.lax.axis_index(names)) if names else key


def _accumulate(
    term: Callable[[Any, jax.Array], Any], batch: Any, key: jax.Array, micro: bool
) -> Any:
    """Sum of ``term(micro_batch, key)``, whose leaves are accumulators, over the leading axis of `batch`."""
    if not micro:
        return term(batch, key)
    sizes = {x.shape[0] for x in jax.tree.leaves(batch)}
    if len(sizes) != 1:
        raise ValueError(
            f"micro_batches=True needs one leading axis of micro-batches in batch and mask, got sizes {sorted(sizes)}."
        )
    keys = jax.random.split(key, sizes.pop())
    zeros = jax.tree.map(
        jnp.zeros_like, jax.eval_shape(term, jax.tree.map(lambda x: x[0], batch), keys[0])
    )

    def body(total: Any, item: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, term(*item)), None

    return jax.lax.scan(body, zeros, (batch, keys))[0]


def gnb_from_gradients(
    gradients: Any, num_labels: float | jax.Array, *, max_norm: float | None = None
) -> Any:
    """ĥ = B ĝ², for training steps that compute ĝ themselves.

    Args:
        gradients: ĝ, the gradient of the *mean* loss with sampled labels, averaged over all devices and micro-batches.
        num_labels: B, the number of unmasked positions in that mean, over all devices and micro-batches.
        max_norm: scale ĝ down to this global norm first, as the authors do with 1.0. None: no scaling (unbiased).

    Returns:
        Tree like `gradients`, at least float32.
    """
    if max_norm is not None:
        check("max_norm", max_norm, 0.0, open_low=True)

    def wide(g: jax.Array) -> jax.Array:
        return g.astype(jnp.promote_types(g.dtype, jnp.float32))

    wide_gradients = jax.tree.map(wide, gradients)
    factor: Any = 1.0
    if max_norm is not None:
        squares = [jnp.sum(jnp.square(jnp.abs(g))) for g in jax.tree.leaves(wide_gradients)]
        # 1e-6 as in torch.nn.utils.clip_grad_norm_, which the authors call.
        factor = jnp.minimum(1.0, max_norm / (jnp.sqrt(sum(squares)) + 1e-6))

    def diagonal(g: jax.Array) -> jax.Array:
        squared = jnp.square(jnp.abs(g) * jnp.asarray(factor, accumulator_dtype(g.dtype)))
        return jnp.asarray(num_labels, squared.dtype) * squared

    return jax.tree.map(diagonal, wide_gradients)


def gnb_hessian(
    logits_fn: Callable[[Any, Any], jax.Array],
    batch: Any,
    mask: jax.Array | None = None,
    *,
    micro_batches: bool = False,
    axis_name: AxisName = None,
    max_norm: float | None = None,
) -> HessianFn:
    """The Gauss-Newton-Bartlett estimate for a classifier or language model.

    Args:
        logits_fn: ``(params, batch) -> logits`` of shape ``[..., classes]``; no labels are needed.
        batch: what `logits_fn` takes; this device's part inside ``shard_map``.
        mask: True (or nonzero) where a position counts in the loss, of the shape of logits without classes.
        micro_batches: leaves of `batch` and `mask` have a leading axis of micro-batches, which are processed one after
            the other, in the memory of one.
        axis_name: inside ``shard_map``, the mesh axes over which the batch is split.
        max_norm: as in `gnb_from_gradients`.

    Returns:
        ``(params, key) -> ĥ``.

    Raises:
        ValueError: when called, a mask of another shape than the positions, or unequal micro-batch axes.
    """
    names = _names(axis_name)
    if max_norm is not None:
        check("max_norm", max_norm, 0.0, open_low=True)

    def hessian(params: optax.Params, key: jax.Array) -> Any:
        local = _local(params, names)

        def term(item: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            inputs, kept = item
            logits, pull_back = jax.vjp(lambda p: logits_fn(p, inputs), local)
            z = logits.astype(accumulator_dtype(logits.dtype))
            labels = jax.random.categorical(key, z)
            kept = jnp.ones_like(labels, bool) if kept is None else kept != 0
            if kept.shape != labels.shape:
                raise ValueError(
                    f"mask of shape {kept.shape} does not fit logits of shape {logits.shape}: "
                    f"expected {labels.shape}."
                )
            classes = jax.lax.broadcasted_iota(labels.dtype, z.shape, z.ndim - 1)
            # The gradient of cross-entropy in the logits; no gather, so that the classes may be sharded.
            residual = jax.nn.softmax(z) - (labels[..., None] == classes)
            (total,) = pull_back(jnp.where(kept[..., None], residual, 0).astype(logits.dtype))
            total = jax.tree.map(lambda t: t.astype(jnp.promote_types(t.dtype, jnp.float32)), total)
            return total, jnp.sum(kept, dtype=jnp.int32)

        total, count = _accumulate(term, (batch, mask), _device_key(key, names), micro_batches)
        if names:
            total = jax.lax.psum(total, names)
            count = jax.lax.psum(_local(count, names), names)
        # For a batch that is masked entirely, 0/1 instead of 0/0.
        labels = jnp.maximum(count, 1)
        mean = jax.tree.map(lambda t: t / labels.astype(accumulator_dtype(t.dtype)), total)
        return gnb_from_gradients(mean, labels, max_norm=max_norm)

    return hessian


def hutchinson(
    loss_fn: Callable[[Any, Any], jax.Array],
    batch: Any = None,
    *,
    distribution: str = "normal",
    num_samples: int = 1,
    micro_batches: bool = False,
    axis_name: AxisName = None,
) -> HessianFn:
    """Hutchinson's estimate for any twice differentiable loss.

    Args:
        loss_fn: ``(params, batch) -> mean loss``, a real scalar.
        batch: what `loss_fn` takes; a part of the training batch is enough. This device's part inside ``shard_map``.
        distribution: of u: ``"normal"`` as in the paper and levanter, or ``"rademacher"`` as in optax, which is exact
            for diagonal Hessians and whose variance is never larger.
        num_samples: number of vectors u to average over, >= 1.
        micro_batches: leaves of `batch` have a leading axis of micro-batches of equal weight.
        axis_name: inside ``shard_map``, the mesh axes over which the batch is split; estimates are averaged
            over them, each device with its own u. Parameters must be whole on every device.

    Returns:
        ``(params, key) -> ĥ``.

    Raises:
        ValueError: an unknown distribution, fewer than one sample; when called, parameters split by ``shard_map``.
    """
    names = _names(axis_name)
    check("num_samples", num_samples, 1)
    one_of("distribution", distribution, DISTRIBUTIONS)
    draw = jax.random.normal if distribution == "normal" else jax.random.rademacher

    def hessian(params: optax.Params, key: jax.Array) -> Any:
        split = sorted({n for p in jax.tree.leaves(params) for n in varying_axes(p)} - set(names))
        if split:
            raise ValueError(
                f"hutchinson inside shard_map needs whole parameters; these vary over {split}. "
                "Call it under jit, where parameters may be sharded in any way."
            )
        local = _local(params, names)
        leaves, treedef = jax.tree.flatten(local)

        def probe(inputs: Any, key: jax.Array) -> Any:
            keys = jax.random.split(key, max(1, len(leaves)))
            # Adding to zeros gives u the sharding of its parameter.
            u = [jnp.zeros_like(p) + draw(k, p.shape, p.dtype) for k, p in zip(keys, leaves)]
            u = jax.tree.unflatten(treedef, u)
            hvp = jax.jvp(jax.grad(lambda p: loss_fn(p, inputs)), (local,), (u,))[1]

            def product(a: jax.Array, b: jax.Array) -> jax.Array:
                dtype = jnp.promote_types(a.dtype, jnp.float32)
                return a.astype(dtype) * b.astype(dtype)

            return jax.tree.map(product, u, hvp)

        def samples(inputs: Any, key: jax.Array) -> Any:
            return _accumulate(
                lambda k, _: probe(inputs, k), jax.random.split(key, num_samples), key, True
            )

        total = _accumulate(samples, batch, _device_key(key, names), micro_batches)
        parts = jax.tree.leaves(batch)[0].shape[0] if micro_batches else 1
        mean = jax.tree.map(lambda t: t / (parts * num_samples), total)
        return jax.lax.pmean(mean, names) if names else mean

    return hessian
