"""AdamH and MuonH: Adam and Muon whose hidden matrices keep their norms, and what may decay beside them.

::

    Δ = -η_t u,   u of Adam or Muon                     then `norms.hyperball` on the sphere, Δ itself elsewhere

A decay proportional to w has no effect on a matrix that is brought back to its sphere: it only shortens the direction,
which is normalised. So these optimizers raise on it. A decay that is not proportional to w turns the direction, by an
amount relative to the size of u, and is allowed:

============================================ ==========================================================
decay of a matrix on the sphere              verdict
============================================ ==========================================================
pull l2, any multiplier, any rate            error: the sphere undoes it
other pulls, or cautious                     allowed: changes the direction, by λ‖ψ‖/‖u‖
decay, proximal step or norm rule after it   leaves the sphere: not offered here; an error of the chain's author
============================================ ==========================================================

References and differences: `norms.hyperball`. Which leaves are on the sphere is disputed: Levanter adds the head
(``sphere=("hidden", "head")``), others found AdamW with decay better there.
"""

from typing import Any, Unpack

import jax
import optax

from optax_decay.norms.hyperball import hyperball
from optax_decay.optimizers import shape_scales
from optax_decay.optimizers.muon import MuonDirectionOptions, scale_by_muon
from optax_decay.parameters import axes as axes_lib
from optax_decay.parameters.arguments import check, passes_options_to
from optax_decay.product import masks
from optax_decay.product.decay import DecayOptions, ProductOptions, decay, in_order
from optax_decay.product.gates import Gate
from optax_decay.product.links import (
    listening,
    refuse_contradictions,
    scale_by_learning_rate,
)
from optax_decay.product.pulls import Pull


class DecayBesideOptions(ProductOptions, total=False):
    """Keyword arguments that `adam_hyperball` passes on to `decay`, which describes them."""

    pull: Pull
    cautious: bool | Gate


class MuonHyperballOptions(DecayBesideOptions, MuonDirectionOptions, total=False):
    """Keyword arguments that `muon_hyperball` passes on to `decay` and `scale_by_muon`, which describe them."""


@passes_options_to(decay)
def adam_hyperball(
    learning_rate: optax.ScalarOrSchedule,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.95,
    eps: float | jax.Array = 1e-8,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: masks.Mask = "head",
    sphere: masks.Mask = "hidden",
    radius: float | jax.Array | None = None,
    per: str = "matrix",
    min_direction: float | jax.Array = 0.0,
    axes: axes_lib.Axes = None,
    **options: Unpack[DecayBesideOptions],
) -> optax.GradientTransformationExtraArgs:
    """AdamH: Adam on the sphere of every hidden matrix, and Adam elsewhere, with a decay of the head if asked for.

    Published rates of AdamH and MuonH are 0.0025 to 0.02, falling to zero over the whole run: nothing else makes the
    steps smaller. For other rates on and off the sphere, see `by_role`.

    Args:
        learning_rate: η, a number or schedule.
        b1, b2, eps: as in ``optax.adam``.
        weight_decay: λ, a number or schedule.
        mask: which leaves decay, as in `decay`.
        sphere: which leaves keep their norm, as `mask` of `hyperball`; they must be matrices.
        radius, per, min_direction: as in `hyperball`.
        axes: what the parameters' axes mean (`axes.signatures`).
        options: pull, multiplier, cautious, coupling and metrics of the decay, as in `decay`.

    Returns:
        A transformation whose ``update`` needs params.

    Raises:
        ValueError: a number out of its range or an unknown name; at ``init``, a decay that the sphere undoes, a slice
            of zeros without `radius`, a leaf on the sphere that is not a matrix.

    >>> import optax, optax_decay
    >>> tx = optax_decay.adam_hyperball(optax.linear_schedule(0.01, 0.0, 1000), weight_decay=0.1)
    """
    on_sphere = hyperball(
        learning_rate=learning_rate,
        radius=radius,
        per=per,
        min_direction=min_direction,
        mask=sphere,
        axes=axes,
    )
    adam = optax.scale_by_adam(b1, b2, eps)
    chosen: DecayOptions = {"mask": mask, "axes": axes, **options}
    return _assemble(adam, on_sphere, learning_rate, weight_decay, chosen)


@passes_options_to(scale_by_muon, "shape_scale")
@passes_options_to(decay)
def muon_hyperball(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: masks.Mask = "head",
    sphere: masks.Mask = "hidden",
    radius: float | jax.Array | None = None,
    per: str = "matrix",
    min_direction: float | jax.Array = 0.0,
    axes: axes_lib.Axes = None,
    **options: Unpack[MuonHyperballOptions],
) -> optax.GradientTransformationExtraArgs:
    """MuonH: Muon on the sphere of every hidden matrix, and Adam elsewhere, with a decay of the head if asked for.

    There is no shape scale, because the sphere reads the direction only.

    Args:
        learning_rate, weight_decay, mask, sphere, radius, per, axes: as in `adam_hyperball`.
        min_direction: as in `hyperball`. It compares with the RMS of an orthogonal factor, ``1/sqrt(max(in, out))``.
        options: momentum, coefficients, momentum_form, eps, b1, b2, adam_eps, iteration_dtype, stack_axes and
            param_specs as in `scale_by_muon`; pull, multiplier, cautious, coupling and metrics as in `decay`.

    Returns:
        A transformation whose ``update`` needs params.

    Raises:
        ValueError: as `adam_hyperball` and `scale_by_muon`.

    >>> import optax, optax_decay
    >>> tx = optax_decay.muon_hyperball(optax.linear_schedule(0.02, 0.0, 1000))
    """
    names = set(DecayBesideOptions.__annotations__)
    of_decay: Any = {name: value for name, value in options.items() if name in names}
    of_muon: Any = {name: value for name, value in options.items() if name not in names}
    on_sphere = hyperball(
        learning_rate=learning_rate,
        radius=radius,
        per=per,
        min_direction=min_direction,
        mask=sphere,
        axes=axes,
        param_specs=of_muon.get("param_specs"),
    )
    direction = scale_by_muon(shape_scale=shape_scales.one(), axes=axes, **of_muon)
    chosen: DecayOptions = {"mask": mask, "axes": axes, **of_decay}
    return _assemble(direction, on_sphere, learning_rate, weight_decay, chosen)


def _assemble(
    direction: optax.GradientTransformation,
    on_sphere: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any,
    options: DecayOptions,
) -> optax.GradientTransformationExtraArgs:
    """Direction, decay, learning rate and sphere, with a check at ``init`` that they do not contradict each other."""
    if isinstance(weight_decay, optax.GradientTransformation):
        raise ValueError(
            "weight_decay is a transformation, of which nobody can tell whether the sphere undoes it: pass λ as a "
            "number or schedule with pull=..., mask=... and the other options of optax_decay.decay."
        )
    check("weight_decay", weight_decay, 0.0)

    rates = scale_by_learning_rate(learning_rate)
    chain = in_order(options, direction, decay(weight_decay, **options), rates)
    chain = optax.chain(chain, on_sphere)

    def init(params: optax.Params) -> Any:
        with listening() as told:
            state = chain.init(params)
        refuse_contradictions(told)
        return state

    return optax.GradientTransformationExtraArgs(init, chain.update)
