"""The contract table: one row per public factory, holding everything that differs between them.

`test_contract.py` runs every check on every row and has no exceptions by name. A new factory is not public before it
has a row here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

import optax_decay
from tests.support import toy

RATE = 0.03


def before_rate(link: Callable) -> Callable:
    """A decay that stands between Adam and the learning rate."""

    def make(learning_rate: Any = RATE, **options: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(), link(**options), optax.scale_by_learning_rate(learning_rate)
        )

    return make


def adamc(learning_rate: Any = RATE, **options: Any) -> optax.GradientTransformation:
    """Corrected decay is told the learning rate of its chain."""
    return optax.chain(
        optax.scale_by_adam(),
        optax_decay.corrected_decay(learning_rate, **options),
        optax.scale_by_learning_rate(learning_rate),
    )


def corrected(learning_rate: Any = RATE, **options: Any) -> optax.GradientTransformation:
    """The corrected coupling is told the learning rate of its chain."""
    return optax.chain(
        optax.scale_by_adam(),
        optax_decay.decay(coupling="corrected", learning_rate=learning_rate, **options),
        optax.scale_by_learning_rate(learning_rate),
    )


def after_decay(link: Callable) -> Callable:
    """A multiplier of the learning rate, which also multiplies the decay before it."""

    def make(learning_rate: Any = RATE, **options: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(),
            optax_decay.decay(0.2),
            link(**options),
            optax.scale_by_learning_rate(learning_rate),
        )

    return make


def last(link: Callable) -> Callable:
    """A proximal decay: last in the chain, and given the learning rate."""

    def make(learning_rate: Any = RATE, **options: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(),
            optax.scale_by_learning_rate(learning_rate),
            link(learning_rate, **options),
        )

    return make


def decayed(scale: Callable, takes_axes: bool = True) -> Callable:
    """A rule for the direction, followed by AdamW's decay and the learning rate."""

    def make(
        axes: Any,
        learning_rate: Any = RATE,
        weight_decay: Any = 0.1,
        mask: Any = None,
        **options: Any,
    ) -> optax.GradientTransformation:
        return optax.chain(
            scale(**options, **({"axes": axes} if takes_axes else {})),
            optax_decay.decay(weight_decay, mask=mask, axes=axes),
            optax.scale_by_learning_rate(learning_rate),
        )

    return make


def constrained(learning_rate: Any = RATE, **options: Any) -> optax.GradientTransformation:
    """CPR stands last in the chain and is told its learning rate."""
    return optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_learning_rate(learning_rate),
        optax_decay.cpr_decay(learning_rate=learning_rate, **options),
    )


def rotated(learning_rate: Any = RATE, **options: Any) -> optax.GradientTransformation:
    """Rotation takes the place of the learning rate."""
    return optax.chain(
        optax.scale_by_adam(), optax_decay.rotational_update(learning_rate, **options)
    )


def before_adam(link: Callable) -> Callable:
    """A decay that looks at gradients and is added to them."""

    def make(learning_rate: Any = RATE, **options: Any) -> optax.GradientTransformation:
        return optax.chain(
            link(**options), optax.scale_by_adam(), optax.scale_by_learning_rate(learning_rate)
        )

    return make


def one_worker(make: Callable) -> Callable:
    """An optimizer for use inside `shard_map`, on an axis of one worker, which every program has."""

    def alone(**options: Any) -> optax.GradientTransformation:
        tx = optax.with_extra_args_support(make(axis_name="worker", **options))

        def on_axis(function: Callable) -> Callable:
            run = jax.vmap(
                lambda _, args, extra: function(*args, **extra),
                in_axes=None,
                out_axes=None,
                axis_size=1,
                axis_name="worker",
            )
            return lambda *args, **extra: run(None, args, extra)

        return optax.GradientTransformationExtraArgs(on_axis(tx.init), on_axis(tx.update))

    return alone


def guarded(axes: Any, learning_rate: Any = RATE, **options: Any) -> optax.GradientTransformation:
    """A whole optimizer, steps of which are left out."""
    adam = optax_decay.adam_huber_decay(learning_rate, axes=axes)
    return optax_decay.skip_on_spike(adam, **options)


def with_loss(params: Any, gradients: Any) -> dict[str, Any]:
    """A loss that differs from step to step."""
    return {"value": optax.tree.sum(gradients).astype("float32")}


def with_gradients(params: Any, gradients: Any) -> dict[str, Any]:
    """What a decay that looks at gradients needs after Adam."""
    return {"gradients": gradients}


def curvature(params: Any, gradients: Any) -> dict[str, Any]:
    """A Hessian estimate for Sophia that depends on weights, batch and key."""

    def hessian_fn(_: Any, key: jax.Array) -> Any:
        u = jax.random.uniform(key)
        return jax.tree.map(lambda w, g: w * w + g + u, params, gradients)

    return {"hessian_fn": hessian_fn}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One row.

    Attributes:
        name: the public factory, as ``optax_decay.<name>``, with a suffix after a space for variants.
        make: builds a whole optimizer; accepts ``learning_rate`` and the keywords in `options` and `numbers`.
        options: keywords that every check uses.
        numbers: hyperparameters and another value for each, which must change the weights.
        schedules: those of them that also take a schedule of the step.
        extra: extra arguments of ``update`` from (params, gradients), if the factory needs any.
        mask: takes ``mask=``.
        reduction: sums over a matrix are part of the step, so that sharding may change the last bits.
        steps: updates per check; enough to pass every refresh and phase.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    schedules: tuple[str, ...] = ()
    extra: Callable[[Any, Any], dict[str, Any]] | None = None
    mask: bool = True
    reduction: bool = False
    steps: int = 6

    def build(self, axes: Any = toy.AXES, **changes: Any) -> optax.GradientTransformationExtraArgs:
        """The optimizer for parameters with these axes."""
        return optax.with_extra_args_support(self.make(**{**self.options, "axes": axes, **changes}))


CASES = (
    Case(
        "decay",
        before_rate(optax_decay.decay),
        {"axes": toy.AXES},
        {"learning_rate": 0.05, "weight_decay": 0.3},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "decay cautious metrics",
        before_rate(optax_decay.decay),
        {"axes": toy.AXES, "cautious": True, "metrics": True, "weight_decay": 0.4},
        {"weight_decay": 0.3},
        ("weight_decay",),
    ),
    Case(
        "decay corrected",
        corrected,
        {"peak_learning_rate": 2 * RATE, "axes": toy.AXES},
        {"learning_rate": 0.05, "weight_decay": 0.3, "peak_learning_rate": 0.05},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "proximal_decay",
        last(optax_decay.proximal_decay),
        {"axes": toy.AXES, "pull": optax_decay.l1()},
        {"learning_rate": 0.05, "weight_decay": 0.3},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "huber_decay",
        before_rate(optax_decay.huber_decay),
        {"axes": toy.AXES, "threshold": 0.3},
        {"learning_rate": 0.05, "weight_decay": 0.3, "threshold": 0.1},
        ("learning_rate", "weight_decay", "threshold"),
    ),
    Case(
        "huber_decay mean",
        before_rate(optax_decay.huber_decay),
        {"axes": toy.AXES, "threshold": "mean"},
        {"weight_decay": 0.3, "factor": 0.4},
        ("weight_decay", "factor"),
        reduction=True,
    ),
    Case(
        "huber_decay ema",
        before_rate(optax_decay.huber_decay),
        {"axes": toy.AXES, "threshold": "ema", "factor": 0.5},
        {"weight_decay": 0.3, "factor": 0.4, "decay_rate": 0.2},
        ("weight_decay", "factor"),
        reduction=True,
    ),
    Case(
        "huber_proximal_decay",
        last(optax_decay.huber_proximal_decay),
        {"axes": toy.AXES, "threshold": "rms", "factor": 0.5},
        {"learning_rate": 0.05, "weight_decay": 0.3, "factor": 0.4},
        ("learning_rate", "weight_decay", "factor"),
        reduction=True,
    ),
    Case(
        "adam_huber_decay",
        optax_decay.adam_huber_decay,
        {"learning_rate": RATE, "axes": toy.AXES},
        {
            "learning_rate": 0.05,
            "b1": 0.8,
            "b2": 0.9,
            "eps": 1e-2,
            "eps_root": 1e-2,
            "weight_decay": 0.3,
            "factor": 0.4,
        },
        ("learning_rate", "weight_decay", "factor"),
        reduction=True,
    ),
    Case(
        "scale_by_exadam",
        decayed(optax_decay.scale_by_exadam, takes_axes=False),
        {"log_growth": True},
        {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-2},
    ),
    Case(
        "exadam",
        optax_decay.exadam,
        {"learning_rate": RATE, "axes": toy.AXES, "weight_decay": 0.1},
        {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-2, "weight_decay": 0.3},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "scale_by_one_bit_adam",
        one_worker(decayed(optax_decay.scale_by_one_bit_adam)),
        {"warmup_steps": 3, "axes": toy.AXES, "bias_correction": True},
        {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-2, "warmup_steps": 2},
    ),
    Case(
        "one_bit_adam",
        one_worker(optax_decay.one_bit_adam),
        {"learning_rate": RATE, "warmup_steps": 3, "axes": toy.AXES, "weight_decay": 0.1},
        {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-2, "weight_decay": 0.3},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "scale_by_sophia",
        decayed(optax_decay.scale_by_sophia, takes_axes=False),
        {
            "update_interval": 2,
            "refresh": "optax",
            "bias_correction": True,
            "gamma": 1.0,
            "b2": 0.5,
        },
        {
            "learning_rate": 0.05,
            "b1": 0.8,
            "b2": 0.6,
            "eps": 0.1,
            "gamma": 2.0,
            "clip_threshold": 0.5,
        },
        extra=curvature,
    ),
    Case(
        "sophia_g",
        optax_decay.sophia_g,
        {"learning_rate": RATE, "axes": toy.AXES, "update_interval": 3, "gamma": 1.0, "b2": 0.5},
        {
            "learning_rate": 0.05,
            "b1": 0.8,
            "b2": 0.6,
            "eps": 0.1,
            "weight_decay": 0.3,
            "gamma": 2.0,
            "clip_threshold": 0.5,
            "update_interval": 2,
        },
        ("learning_rate", "weight_decay"),
        extra=curvature,
        reduction=True,
    ),
    Case(
        "sophia_h",
        optax_decay.sophia_h,
        {"learning_rate": RATE, "axes": toy.AXES, "update_interval": 3, "b2": 0.5},
        {"weight_decay": 0.3, "gamma": 2.0},
        ("weight_decay",),
        extra=curvature,
        reduction=True,
    ),
    Case(
        "scale_by_conda",
        decayed(optax_decay.scale_by_conda),
        {"axes": toy.AXES, "refresh_every": 4, "staggered": True},
        {
            "learning_rate": 0.05,
            "b1": 0.8,
            "b2": 0.9,
            "eps": 1e-2,
            "refresh_every": 3,
            "scale": 0.5,
        },
        reduction=True,
    ),
    Case(
        "conda",
        optax_decay.conda,
        {"learning_rate": RATE, "axes": toy.AXES, "refresh_every": 4, "weight_decay": 0.1},
        {
            "learning_rate": 0.05,
            "b1": 0.8,
            "b2": 0.9,
            "eps": 1e-2,
            "refresh_every": 3,
            "scale": 0.5,
            "weight_decay": 0.3,
        },
        ("learning_rate", "weight_decay"),
        reduction=True,
    ),
    Case(
        "scale_by_root",
        decayed(optax_decay.scale_by_root),
        {"axes": toy.AXES, "coefficients": "polar_express", "threshold": 0.2},
        {"learning_rate": 0.05, "momentum": 0.8, "threshold": 0.1, "update_rms": 0.3},
        reduction=True,
    ),
    Case(
        "root",
        optax_decay.root,
        {"learning_rate": RATE, "axes": toy.AXES},
        {
            "learning_rate": 0.05,
            "momentum": 0.8,
            "quantile": 0.6,
            "ns_steps": 4,
            "weight_decay": 0.3,
            "update_rms": 0.3,
            "b1": 0.8,
            "b2": 0.9,
            "eps": 1e-2,
        },
        ("learning_rate", "weight_decay"),
        reduction=True,
    ),
    Case(
        "width_scaled_decay",
        before_rate(optax_decay.width_scaled_decay),
        {"axes": toy.AXES, "base_width": 2, "head": "matrix"},
        {"learning_rate": 0.05, "weight_decay": 0.3, "exponent": 0.9},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "width_scaled_decay mup_package",
        before_rate(optax_decay.width_scaled_decay),
        {"axes": toy.AXES, "base_width": {"D": 3, "F": 5, "H": 2}, "rule": "mup_package"},
        {"weight_decay": 0.3, "exponent": 0.6},
        ("weight_decay",),
    ),
    Case(
        "width_scaling",
        before_rate(optax_decay.width_scaling),
        {"axes": toy.AXES, "base_width": 2, "head": "matrix", "optimizer": "conda"},
        {"learning_rate": 0.05, "weight_decay": 0.3, "exponent": 0.9},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "width_scaled_learning_rate",
        after_decay(optax_decay.width_scaled_learning_rate),
        {"axes": toy.AXES, "base_width": 2},
        {"learning_rate": 0.05},
        ("learning_rate",),
        mask=False,
    ),
    Case(
        "mup_adamw",
        optax_decay.mup_adamw,
        {"learning_rate": RATE, "axes": toy.AXES, "base_width": 2, "head": "matrix"},
        {
            "learning_rate": 0.05,
            "b1": 0.8,
            "b2": 0.9,
            "eps": 1e-2,
            "eps_root": 1e-2,
            "weight_decay": 0.3,
            "exponent": 0.9,
        },
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "lp_decay",
        before_rate(optax_decay.lp_decay),
        {"axes": toy.AXES, "p": 1.5},
        {"weight_decay": 0.3},
        ("weight_decay",),
    ),
    Case(
        "lp_proximal_decay",
        last(optax_decay.lp_proximal_decay),
        {"axes": toy.AXES, "p": 0.8, "linearize_at": "new", "weight_decay": 0.1},
        {"learning_rate": 0.05, "weight_decay": 0.3},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "elastic_net_proximal_decay",
        last(optax_decay.elastic_net_proximal_decay),
        {"axes": toy.AXES},
        {"learning_rate": 0.05, "weight_decay": 0.3, "l1_ratio": 0.2},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "cautious_decay",
        before_rate(optax_decay.cautious_decay),
        {"axes": toy.AXES},
        {"weight_decay": 0.3},
        ("weight_decay",),
    ),
    Case(
        "corrected_decay",
        adamc,
        {"axes": toy.AXES, "peak_learning_rate": 2 * RATE},
        {"learning_rate": 0.05, "weight_decay": 0.3, "peak_learning_rate": 0.05},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "target_norm_decay",
        before_rate(optax_decay.target_norm_decay),
        {"axes": toy.AXES, "target": 0.3},
        {"weight_decay": 0.3, "target": 0.1},
        ("weight_decay", "target"),
        reduction=True,
    ),
    Case(
        "target_norm_decay initial",
        before_rate(optax_decay.target_norm_decay),
        {"axes": toy.AXES},
        {"weight_decay": 0.3},
        reduction=True,
    ),
    Case(
        "stable_decay",
        before_rate(optax_decay.stable_decay),
        {"axes": toy.AXES, "weight_decay": 0.03},
        {"weight_decay": 0.1, "b2": 0.5},
        ("weight_decay",),
        extra=with_gradients,
        reduction=True,
    ),
    Case(
        "adam_stable_decay",
        optax_decay.adam_stable_decay,
        {"learning_rate": RATE, "axes": toy.AXES, "weight_decay": 0.03},
        {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-2, "weight_decay": 0.1},
        ("learning_rate", "weight_decay"),
        reduction=True,
    ),
    Case(
        "awd_decay",
        before_adam(optax_decay.awd_decay),
        {"axes": toy.AXES},
        {"weight_decay": 0.3, "average": 0.5, "eps": 1.0},
        ("weight_decay",),
        reduction=True,
    ),
    Case(
        "adadecay",
        before_adam(optax_decay.adadecay),
        {"axes": toy.AXES},
        {"weight_decay": 0.3, "sharpness": 2.0},
        ("weight_decay",),
        reduction=True,
    ),
    Case(
        "block_adadecay",
        before_rate(optax_decay.block_adadecay),
        {"axes": toy.AXES, "refresh_every": 2},
        {"weight_decay": 0.3, "sharpness": 2.0, "refresh_every": 4},
        ("weight_decay",),
        extra=with_gradients,
        reduction=True,
    ),
    Case(
        "spectral_alpha_decay",
        before_rate(optax_decay.spectral_alpha_decay),
        {"axes": toy.AXES, "min_eigenvalues": 4, "refresh_every": 4},
        {"weight_decay": 0.3, "min_ratio": 0.2, "max_ratio": 5.0, "refresh_every": 2},
        ("weight_decay",),
        reduction=True,
    ),
    Case(
        "spectral_alpha_decay sigmoid",
        before_adam(optax_decay.spectral_alpha_decay),
        {
            "axes": toy.AXES,
            "min_eigenvalues": 4,
            "refresh_every": 3,
            "schedule": "all",
            "metric": "stable_rank",
            "assignment": "sigmoid",
        },
        {"weight_decay": 0.3, "sharpness": 1.0, "start_step": 4, "refresh_every": 2},
        ("weight_decay",),
        reduction=True,
    ),
    Case(
        "cpr_decay",
        constrained,
        {"axes": toy.AXES, "bound": "uniform", "bound_parameter": 0.5},
        {"learning_rate": 0.05, "bound_parameter": 1.0, "rate": 0.5},
        ("learning_rate", "rate"),
        reduction=True,
    ),
    Case(
        "cpr_decay inflection",
        constrained,
        {"axes": toy.AXES, "bound_parameter": 1},
        {"rate": 4.0},
        reduction=True,
    ),
    Case(
        "rotational_update",
        rotated,
        {"axes": toy.AXES},
        {"learning_rate": 0.05, "weight_decay": 0.3, "b1": 0.8, "average": 0.5, "eps": 1.0},
        ("learning_rate", "weight_decay"),
        mask=False,
        reduction=True,
    ),
    Case(
        "rotational_adamw",
        optax_decay.rotational_adamw,
        {"learning_rate": RATE, "axes": toy.AXES},
        {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-2, "weight_decay": 0.3},
        ("learning_rate", "weight_decay"),
        mask=False,
        reduction=True,
    ),
    Case(
        "skip_on_spike",
        guarded,
        {"sigma": 1.0, "window": 4},
        {"learning_rate": 0.05, "sigma": 50.0},
        extra=with_loss,
        mask=False,
        reduction=True,
    ),
)
