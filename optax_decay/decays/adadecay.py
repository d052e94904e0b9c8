"""AdaDecay: decay in proportion to how large a gradient is among its peers.

With σ(z) = 2/(1 + exp(-αz)) in (0, 2), α = 4, g the gradient, w the weight before the step::

    per weight   z = (|g| - mean|g|)/std|g|, over one matrix, every step;         u ← u + λ σ(z) w     `adadecay`
    per matrix   z = (‖G‖ - mean)/(std + 1e-8), over the matrices of one block,
                 every k steps;                                                   u ← u + λ σ(z) W     `block_adadecay`

Both keep the mean strength near λ. Standard deviations are those of the population.

References: Nakamura and Hong, "Adaptive Weight Decay for Deep Neural Networks", arXiv 1907.08931 (per weight); the
AlphaDecay program's baseline of the same name, metric ``gradnorm`` with ``layerwise_sigmoid`` (per matrix).

Both want raw gradients: put the link before ``scale_by_adam`` (coupled, as in the paper's SGD and the program's
Adam), or after it and call ``tx.update(grads, state, params, gradients=grads)``.

**Differs from the paper and the program.**

* Only the paper's abstract could be read: that gradient magnitudes are normalised within each layer and go through a
  sigmoid is from there, the standardisation and α = 4 are the program's. A matrix with equal gradients has z = 0.
* The program's scores are of integer type before the first refresh, so that its matrices do not decay at all for the
  first k-1 steps. Here they decay at λ until the refresh.
* The program leaves out the first layer of the first block; here every hidden matrix takes part (role ``"hidden"``,
  which needs `axes`), everything else decays at λ.
* A matrix whose σ is not finite decays at λ.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, passes_options_to
from optax_decay.parameters.meshes import varying_axes
from optax_decay.parameters.paths import path_string
from optax_decay.product import links
from optax_decay.product.decay import DecayOptions, decay, times
from optax_decay.product.per_matrix import (
    AxisName,
    Context,
    PerMatrix,
    Value,
    accumulator_dtype,
    slice_mean,
)
from optax_decay.product.product import by_path, is_array, resolver
from optax_decay.spectral.assignment import sigmoid, sigmoid_factor


@passes_options_to(decay)
def adadecay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    sharpness: float = 4.0,
    *,
    axis_name: AxisName = None,
    **options: Unpack[DecayOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ σ(z) w`` to the update, with one z per weight.

    Args:
        weight_decay: λ, dimensionless, >= 0; a number or schedule.
        sharpness: α > 0.
        axis_name: inside ``shard_map``, the mesh axes over which one matrix is split.
        options: pull, multiplier, cautious, mask, axes, coupling, metrics, as in `decay`; they see σ(z) w in place of
            w. Each slice of a stacked leaf is standardised by itself.

    Raises:
        ValueError: as in `decay`; α out of range.

    >>> import optax, optax_decay
    >>> tx = optax.chain(optax_decay.adadecay(5e-4), optax.sgd(0.1, momentum=0.9))
    """
    check("sharpness", sharpness, 0.0, open_low=True)
    inner = decay(weight_decay, **options)
    signatures_of = resolver(options.get("mask"), options.get("axes"))

    def scaled(w: jax.Array, g: jax.Array, signature: axes_lib.Signature) -> jax.Array:
        size = jnp.abs(g).astype(accumulator_dtype(g.dtype))
        mean = slice_mean(size, signature, axis_name, "the mean gradient")
        from_mean = size - (signature.spread(mean) if mean.ndim else mean)
        variance = slice_mean(jnp.square(from_mean), signature, axis_name, "the mean gradient")
        std = jnp.sqrt(signature.spread(variance) if variance.ndim else variance)
        # Equal gradients have a standard deviation of their mean's rounding; it must not be divided by.
        spread_out = std > 1e-5 * (size - from_mean)
        z = jnp.where(spread_out, from_mean / jnp.where(spread_out, std, 1), 0)
        return sigmoid_factor(z, sharpness) * w

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra: Any
    ) -> Any:
        if params is None:
            return inner.update(updates, state, params, **extra)
        signatures = signatures_of(params).signatures
        given = extra.get("gradients")
        gradients = by_path(updates if given is None else given)

        def scale(key: jax.tree_util.KeyPath, w: jax.Array) -> jax.Array:
            path = path_string(key)
            takes_part = path in signatures and is_array(gradients.get(path))
            return scaled(w, gradients[path], signatures[path]) if takes_part else w

        stretched = jax.tree_util.tree_map_with_path(scale, params)
        return inner.update(updates, state, stretched, **extra)

    def init(params: optax.Params) -> Any:
        with links.directed():  # one σ(z) per weight
            return inner.init(params)

    return optax.GradientTransformationExtraArgs(init, update)


def _block(path: str) -> str:
    """The part of a path that names its block: up to the last whole number in it, else its first component."""
    numbered = re.match(r"(?:.*/)?\d+(?=/|$)", path)
    return numbered.group() if numbered else path.split("/")[0]


def block_gradient_sigmoid(refresh_every: int = 500, sharpness: float = 4.0) -> PerMatrix:
    """σ(z) of each hidden matrix's gradient norm among those of its block; 1 for everything else.

    The assignment is AlphaDecay's, `spectra.sigmoid`; only the score differs.

    Matrices belong to one block when their leaves do (``layers/3/…``, or ``blocks/…`` for stacked leaves) and, for
    stacked leaves, when they have the same index on the first batch axis.

    Args:
        refresh_every: k >= 1; σ is renewed in updates k, 2k, … (counted from 1) with the gradients of that update.
        sharpness: α > 0.

    Returns:
        PerMatrix. State: one float32 per matrix.

    Raises:
        ValueError: k or α out of range; when updated, gradients split by ``shard_map`` (jit may shard them in any way).
    """
    check("refresh_every", refresh_every, 1)
    assignment = sigmoid(sharpness)

    def init(params: Mapping[str, Any], signatures: Mapping[str, axes_lib.Signature]) -> Any:
        return {
            path: jnp.ones(signatures[path].batch_shape, accumulator_dtype(w.dtype))
            for path, w in params.items()
        }

    def refreshed(gradients: Mapping[str, jax.Array], context: Context, state: Any) -> Any:
        blocks: dict[tuple[str, int, int], int] = {}
        norms: dict[str, jax.Array] = {}
        members: dict[str, np.ndarray] = {}
        for path, g in gradients.items():
            signature = context.signatures[path]
            if signature.role == "hidden":
                if split := sorted(varying_axes(g)):
                    raise ValueError(
                        f"block_adadecay needs whole gradients inside shard_map; that of {path!r} varies over {split}."
                    )
                square = jnp.square(jnp.abs(g).astype(accumulator_dtype(g.dtype)))
                norms[path] = jnp.sqrt(jnp.sum(square, axis=signature.reduced))
                batch = signature.batch_shape
                layers = batch[0] if batch else 1
                keys = [(_block(path), layers, layer) for layer in range(layers)]
                numbers = [blocks.setdefault(key, len(blocks)) for key in keys]
                members[path] = np.repeat(numbers, math.prod(batch[1:]))
        new = dict(state)
        if not norms:
            return new
        scores = jnp.concatenate([norm.reshape(-1) for norm in norms.values()])
        every = jnp.ones(scores.shape, bool)
        factors = assignment.factors(scores, every, np.concatenate(list(members.values())))
        ends = np.cumsum([norm.size for norm in norms.values()])[:-1]
        for path, factor in zip(norms, jnp.split(factors, ends), strict=True):
            new[path] = factor.reshape(state[path].shape).astype(state[path].dtype)
        return new

    def update(context: Context, state: Any) -> tuple[dict[str, Value], Any]:
        gradients = context.gradients()
        due = (context.count + 1) % jnp.asarray(refresh_every, jnp.int32) == 0
        state = jax.lax.cond(due, lambda: refreshed(gradients, context, state), lambda: dict(state))
        return state, state

    return PerMatrix(init, update)


@passes_options_to(decay)
def block_adadecay(
    weight_decay: optax.ScalarOrSchedule = 0.1,
    refresh_every: int = 500,
    sharpness: float = 4.0,
    **options: Unpack[DecayOptions],
) -> optax.GradientTransformationExtraArgs:
    """Adds ``λ σ(z) W`` to the update, with one z per matrix: the baseline of the AlphaDecay program.

    Args:
        weight_decay: λ, dimensionless, >= 0; a number or schedule.
        refresh_every, sharpness: as in `block_gradient_sigmoid`.
        options: pull, multiplier, cautious, mask, axes, coupling, metrics, as in `decay`.

    Raises:
        ValueError: as in `decay`; k or α out of range.

    >>> import optax, optax_decay
    >>> link = optax_decay.block_adadecay(1e-5, mask=None)
    >>> tx = optax.chain(link, optax.scale_by_adam(), optax.scale_by_learning_rate(1e-3))
    """
    sigmoid = block_gradient_sigmoid(refresh_every, sharpness)
    return decay(weight_decay, **times(sigmoid, options))
