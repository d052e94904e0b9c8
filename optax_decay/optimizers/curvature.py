"""Unbiased estimates of the diagonal of the Hessian (or Gauss-Newton matrix) of a mean loss.

Both factories return a function ``(params, key) -> tree like params``, float32 or better: what `scale_by_sophia` takes
as ``hessian_fn``. Nothing runs until it is called. With L the mean loss over B positions (tokens)::

    Gauss-Newton-Bartlett   ŷ ~ softmax(logits) per position,  ĝ = ∇ mean cross-entropy(logits, ŷ),   ĥ = B ĝ²
    Hutchinson              u ~ N(0, I) or ±1,                                                        ĥ = u ⊙ (∇²L u)

ĝ has the units of a gradient, ĥ those of ∇²L. The first is never negative and costs one forward and one backward pass;
its expectation is the diagonal of the Gauss-Newton matrix, which for softmax regression is the Hessian. The second may
be negative and costs a Hessian-vector product, about two gradients.

References: Liu et al., "Sophia", arXiv 2305.14342; Hutchinson, "A stochastic estimator of the trace of the influence
matrix", 1990; Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix", 2007.

**Differs from released code.**

* B is part of ĥ. The authors' code leaves it out of the average and multiplies in the step (``rho * bs * h``); a port
  that forgets it needs a γ of several hundred. With masked positions B counts those that are left.
* ĝ is summed over micro-batches and devices *before* it is squared; squares of local gradients would need the local B.
* The authors clip ĝ to norm 1 before squaring, which biases ĥ: off by default, ``max_norm=1.0`` reproduces it.
* Labels are drawn by each device for its own positions from its own key; one forward pass gives both labels and ĝ.
* Rademacher signs are really ±1 with equal chance. (A widely used package draws only -1 and so returns row sums.)
"""

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from optax_decay.parameters.arguments import check
from optax_decay.parameters.meshes import varying_axes
from optax_decay.product.per_matrix import accumulator_dtype

HessianFn = Callable[[Any, jax.Array], Any]
AxisName = str | Sequence[str] | None
DISTRIBUTIONS = ("normal", "rademacher")


def _names(axis_name: AxisName) -> tuple[str, ...]:
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def _local(params: Any, names: tuple[str, ...]) -> Any:
    """Copies of replicated params per device: their gradients would otherwise arrive already summed."""

    def local(p: jax.Array) -> jax.Array:
        missing = tuple(n for n in names if n not in varying_axes(p))
        return jax.lax.pcast(p, missing, to="varying") if missing else p

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


def gnb_from_gradients(gradients: Any, num_labels: Any, *, max_norm: float | None = None) -> Any:
    """ĥ = B ĝ², for training steps that compute ĝ by their own machinery.

    Args:
        gradients: ĝ, the gradient of the *mean* loss with sampled labels, averaged over all devices and micro-batches.
        num_labels: B, the number of unmasked positions in that mean, over all devices and micro-batches.
        max_norm: scale ĝ down to this global norm first, as the authors do with 1.0. None: not (unbiased).

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
        micro_batches: leaves of `batch` and `mask` have a leading axis of micro-batches, which are gone through one
            after the other, in the memory of one.
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

    def hessian(params: Any, key: jax.Array) -> Any:
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
        # An entirely masked batch says nothing: 0/1 rather than 0/0.
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
            for diagonal Hessians and never has the larger variance.
        num_samples: vectors to average over.
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
    if distribution not in DISTRIBUTIONS:
        near = difflib.get_close_matches(str(distribution), DISTRIBUTIONS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"distribution={distribution!r} is not known; allowed: {', '.join(DISTRIBUTIONS)} (did you mean {near!r}?)."
        )
    draw = jax.random.normal if distribution == "normal" else jax.random.rademacher

    def hessian(params: Any, key: jax.Array) -> Any:
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
