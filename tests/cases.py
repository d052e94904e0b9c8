"""The contract table: one row per public factory, holding everything that differs between them.

`test_contract.py` runs every check on every row and has no exceptions by name. A new factory is not public before it
has a row here. A row says nothing about a particular model: `Case.build` is given the axes and shapes of one, the toy
tree's by default, and passes on what the factory takes.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import optax_decay
from optax_decay import bounds, couplings, newton, pulls, shape_scales, thresholds
from tests.support import toy

RATE = 0.03


class Given(NamedTuple):
    """What a row is built from.

    Attributes:
        axes: of the model.
        params: its parameters, as ``jax.ShapeDtypeStruct`` or arrays.
        learning_rate: of the chain.
        mask: of the decay, where the row's chain holds one of its own.
    """

    axes: Any
    params: Any
    learning_rate: Any
    mask: Any


class From(NamedTuple):
    """An argument that follows from what the row is given."""

    function: Callable[[Given], Any]


@dataclasses.dataclass(frozen=True)
class Of:
    """An argument that is a value with numbers of its own, such as a threshold: ``make(**arguments)``."""

    make: Callable[..., Any]
    arguments: dict[str, Any]


def of(make: Callable[..., Any], **arguments: Any) -> Of:
    return Of(make, arguments)


def filled(value: Any, changes: dict[str, Any], given: Given, name: str) -> Any:
    """The argument `name` with its parts built; dots in `changes` name what is inside of it, ``threshold.factor``."""
    if isinstance(value, From):
        return value.function(given)
    if not isinstance(value, Of):
        return value
    inside = {n.removeprefix(f"{name}."): v for n, v in changes.items() if n.startswith(f"{name}.")}
    own = {**value.arguments, **{n: v for n, v in inside.items() if "." not in n}}
    return value.make(**{n: filled(v, inside, given, n) for n, v in own.items()})


Link = optax.GradientTransformation
Place = Callable[[Link, Given], Link]


def whole(link: Link, given: Given) -> Link:
    """A ready-made optimizer."""
    return link


def before_rate(link: Link, given: Given) -> Link:
    """A decay between Adam and the learning rate."""
    return optax.chain(
        optax.scale_by_adam(), link, optax.scale_by_learning_rate(given.learning_rate)
    )


def before_adam(link: Link, given: Given) -> Link:
    """A decay that looks at gradients and is added to them."""
    return optax.chain(
        link, optax.scale_by_adam(), optax.scale_by_learning_rate(given.learning_rate)
    )


def after_decay(link: Link, given: Given) -> Link:
    """A multiplier of the learning rate, which also multiplies the decay before it."""
    return optax.chain(
        optax.scale_by_adam(),
        optax_decay.decay(0.2),
        link,
        optax.scale_by_learning_rate(given.learning_rate),
    )


def last(link: Link, given: Given) -> Link:
    """A link that sees the finished step."""
    return optax.chain(
        optax.scale_by_adam(), optax.scale_by_learning_rate(given.learning_rate), link
    )


def in_place_of_rate(link: Link, given: Given) -> Link:
    """A rule that takes the place of the learning rate."""
    return optax.chain(optax.scale_by_adam(), link)


def direction(link: Link, given: Given) -> Link:
    """A rule for the direction, followed by AdamW's decay and the learning rate."""
    return optax.chain(
        link,
        optax_decay.decay(0.1, mask=given.mask, axes=given.axes),
        optax.scale_by_learning_rate(given.learning_rate),
    )


def on_one_worker(place: Place) -> Place:
    """An optimizer for use inside `shard_map`, on an axis of one worker, which every program has."""

    def alone(link: Link, given: Given) -> Link:
        tx = optax.with_extra_args_support(place(link, given))

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
        place: makes an optimizer of the link that the factory returns.
        options: arguments that every check uses. The learning rate, the axes and a mask need no mention: the factory
            gets those that it takes.
        numbers: hyperparameters and another value for each, which must change the weights. ``threshold.factor`` is the
            number `factor` of the option `threshold`, which is then an `Of`.
        schedules: those of them that also take a schedule of the step.
        static: arguments of the factory that cannot be traced, and that ``optax.inject_hyperparams`` must be told of.
        extra: extra arguments of ``update`` from (params, gradients), if the factory needs any.
        mask: takes ``mask=``.
        reduction: sums over a matrix are part of the step, so that sharding may change the last bits.
        steps: updates per check; enough to pass every refresh and phase.
        others: for arguments of this factory alone that are not numbers, other values, of which one must matter;
            `test_nothing_is_ignored.py` knows those of the arguments that several factories share.
    """

    name: str
    place: Place
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    schedules: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    extra: Callable[[Any, Any], dict[str, Any]] | None = None
    mask: bool = True
    reduction: bool = False
    steps: int = 6
    others: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    @property
    def factory(self) -> Callable[..., optax.GradientTransformation]:
        return getattr(optax_decay, self.name.split(" ")[0])

    def arguments(
        self, axes: Any = toy.AXES, params: Any = None, learning_rate: Any = RATE, **changes: Any
    ) -> dict[str, Any]:
        """Those of the factory, for a model of these axes and shapes, with some of the row's numbers changed."""
        params = toy.shapes() if params is None else params
        given = Given(axes, params, learning_rate, changes.get("mask"))
        takes = set(inspect.signature(self.factory).parameters)
        if "options" in takes:  # a factory that does not say which
            takes |= {"mask", "axes"}
        chain = {"axes": axes, "learning_rate": learning_rate}
        own = {name: value for name, value in chain.items() if name in takes}
        own |= self.options
        own |= {n: v for n, v in changes.items() if "." not in n and (n in takes or n != "mask")}
        return {name: filled(value, changes, given, name) for name, value in own.items()}

    def build(
        self,
        factory: Callable[..., optax.GradientTransformation] | None = None,
        axes: Any = toy.AXES,
        params: Any = None,
        learning_rate: Any = RATE,
        **changes: Any,
    ) -> optax.GradientTransformationExtraArgs:
        """A whole optimizer, with `factory` (or a wrapper of it) in the row's place."""
        link = (factory or self.factory)(**self.arguments(axes, params, learning_rate, **changes))
        given = Given(axes, params, learning_rate, changes.get("mask"))
        return optax.with_extra_args_support(self.place(link, given))


def rate(given: Given) -> Any:
    """The learning rate of the chain, for values that hold it."""
    return given.learning_rate


def narrow(given: Given) -> dict[str, int]:
    """Base widths by letter: two fifths of what the inputs of the matrices have."""
    sizes: dict[str, int] = {}
    for signature in optax_decay.axes.signatures(given.axes, given.params).values():
        sizes |= {signature.names[i]: signature.shape[i] for i in signature.inputs}
    return {letter: max(2, 2 * size // 5) for letter, size in sizes.items()}


def adam_huber(given: Given) -> Link:
    return optax_decay.adam_huber_decay(given.learning_rate, axes=given.axes)


def roles(given: Given) -> dict[str, Link | None]:
    """An optimizer for each role of the model; vectors are frozen."""
    optimizers = {
        "hidden": optax_decay.muon_hyperball(given.learning_rate, axes=given.axes),
        "head": optax.adamw(given.learning_rate, weight_decay=0.2),
        "embedding": optax.sgd(given.learning_rate),
        "vector": None,
    }
    signatures = optax_decay.axes.signatures(given.axes, given.params).values()
    return {role: optimizers[role] for role in sorted({s.role for s in signatures})}


# Other values of arguments that are no numbers, for the two rows of one rule.
CONDA = {"side": ("smaller_or_outputs", "inputs", "outputs"), "basis": ("svd", "eigh")}
MUON = {
    "coefficients": (newton.polar_express(3), newton.triple((2.0, -1.5, 0.5))),
    "shape_scale": (shape_scales.one(), shape_scales.sqrt_larger_side(0.3)),
    "momentum_form": ("plain", "nesterov", "bias_corrected_nesterov"),
    "iteration_dtype": ("bfloat16", None),
}
NORMS = {
    "per": ("leaf", "output", "matrix"),
    "radius": (0.3, 0.4),
    "rule": ("norm", "first_order"),
    "sphere": (("hidden", "head"), "head"),
}
ROOT = {
    "threshold": (newton.quantile(0.6), None),
    "coefficients": (newton.released(4), newton.triple((2.0, -1.5, 0.5))),
    "iteration_dtype": ("bfloat16", "float16"),
}
ONE_BIT = {
    "layout": ("flat", "per_leaf"),
    "compress": ("head", ("vector", "hidden")),
    "bias_correction": ("frozen_variance", False, True),
    "largest_direction": (1.0, 0.5),
}

CASES = (
    Case(
        "decay",
        before_rate,
        numbers={"learning_rate": 0.05, "weight_decay": 0.3},
        schedules=("learning_rate", "weight_decay"),
    ),
    Case(
        "decay cautious metrics",
        before_rate,
        {"cautious": True, "metrics": True, "weight_decay": 0.4},
        {"weight_decay": 0.3},
        ("weight_decay",),
    ),
    Case(
        "decay corrected",
        before_rate,
        {
            "coupling": of(
                couplings.corrected, learning_rate=From(rate), peak_learning_rate=2 * RATE
            )
        },
        {"learning_rate": 0.05, "weight_decay": 0.3, "coupling.peak_learning_rate": 0.05},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "proximal_decay",
        last,
        {"pull": pulls.l1()},
        {"learning_rate": 0.05, "weight_decay": 0.3},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "huber_decay",
        before_rate,
        {"threshold": 0.3},
        {"learning_rate": 0.05, "weight_decay": 0.3, "threshold": 0.1},
        ("learning_rate", "weight_decay", "threshold"),
    ),
    Case(
        "huber_decay mean_size",
        before_rate,
        {"threshold": of(thresholds.mean_size)},
        {"weight_decay": 0.3, "threshold.factor": 0.4},
        ("weight_decay", "threshold.factor"),
        reduction=True,
    ),
    Case(
        "huber_decay running_mean_size",
        before_rate,
        {"threshold": of(thresholds.running_mean_size, factor=0.5)},
        {"weight_decay": 0.3, "threshold.factor": 0.4, "threshold.memory": 0.2},
        ("weight_decay", "threshold.factor"),
        reduction=True,
    ),
    Case(
        "huber_proximal_decay",
        last,
        {"threshold": of(thresholds.rms_size, factor=0.5)},
        {"learning_rate": 0.05, "weight_decay": 0.3, "threshold.factor": 0.4},
        ("learning_rate", "weight_decay", "threshold.factor"),
        reduction=True,
    ),
    Case(
        "adam_huber_decay",
        whole,
        {"threshold": of(thresholds.mean_size)},
        {
            "learning_rate": 0.05,
            "b1": 0.8,
            "b2": 0.9,
            "eps": 1e-2,
            "eps_root": 1e-2,
            "weight_decay": 0.3,
            "threshold.factor": 0.4,
        },
        ("learning_rate", "weight_decay", "threshold.factor"),
        reduction=True,
    ),
    Case(
        "scale_by_exadam",
        direction,
        {"log_growth": True},
        {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-2},
    ),
    Case(
        "exadam",
        whole,
        {"weight_decay": 0.1},
        {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-2, "weight_decay": 0.3},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "scale_by_one_bit_adam",
        on_one_worker(direction),
        {"axis_name": "worker", "warmup_steps": 3, "bias_correction": True},
        {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-2, "warmup_steps": 2},
        others=ONE_BIT,
    ),
    Case(
        "one_bit_adam",
        on_one_worker(whole),
        {"axis_name": "worker", "warmup_steps": 3, "weight_decay": 0.1},
        {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-2, "weight_decay": 0.3},
        ("learning_rate", "weight_decay"),
        others=ONE_BIT,
    ),
    Case(
        "scale_by_sophia",
        direction,
        {
            "refresh_every": 2,
            "refresh_after_update": True,
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
        whole,
        {"refresh_every": 3, "gamma": 1.0, "b2": 0.5},
        {
            "learning_rate": 0.05,
            "b1": 0.8,
            "b2": 0.6,
            "eps": 0.1,
            "weight_decay": 0.3,
            "gamma": 2.0,
            "clip_threshold": 0.5,
            "refresh_every": 2,
        },
        ("learning_rate", "weight_decay"),
        extra=curvature,
        reduction=True,
    ),
    Case(
        "sophia_h",
        whole,
        {"refresh_every": 3, "b2": 0.5},
        {"weight_decay": 0.3, "gamma": 2.0},
        ("weight_decay",),
        extra=curvature,
        reduction=True,
    ),
    Case(
        "scale_by_conda",
        direction,
        {"refresh_every": 4, "staggered": True},
        {
            "learning_rate": 0.05,
            "b1": 0.8,
            "b2": 0.9,
            "eps": 1e-2,
            "refresh_every": 3,
            "scale": 0.5,
        },
        reduction=True,
        others=CONDA,
    ),
    Case(
        "conda",
        whole,
        {"refresh_every": 4, "weight_decay": 0.1},
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
        others=CONDA,
    ),
    Case(
        "adam_hyperball",
        whole,
        {"weight_decay": 0.1, "pull": pulls.huber(0.2), "per": "layer"},
        {
            "learning_rate": 0.05,
            "b1": 0.8,
            "b2": 0.9,
            "eps": 1e-2,
            "weight_decay": 0.3,
            "radius": 0.4,
            "min_direction": 0.9,
        },
        ("learning_rate", "weight_decay"),
        reduction=True,
        others=NORMS,
    ),
    Case(
        "muon_hyperball",
        whole,
        {"weight_decay": 0.1},
        {"learning_rate": 0.05, "momentum": 0.8, "weight_decay": 0.3, "radius": 0.4},
        ("learning_rate", "weight_decay"),
        mask=False,  # every form of a mask that decays a hidden matrix contradicts the sphere
        reduction=True,
        others={**MUON, **NORMS},
    ),
    Case(
        "by_role",
        whole,
        {"transforms": From(roles)},
        {"learning_rate": 0.05},
        ("learning_rate",),
        mask=False,
        reduction=True,
        others={
            "transforms": tuple(
                {r: optax.sgd(x / (1 + len(r))) for r in optax_decay.axes.ROLES} for x in (0.1, 0.2)
            ),
            "rules": (((r"bias", "head"),), ((r"head", "hidden"),)),
        },
    ),
    Case(
        "scale_by_muon",
        direction,
        {"shape_scale": of(shape_scales.sqrt_outputs_per_input, at_least=1.2)},
        {"learning_rate": 0.05, "momentum": 0.8, "eps": 0.1, "shape_scale.at_least": 2.5},
        reduction=True,
        others=MUON,
    ),
    Case(
        "muon",
        whole,
        {"shape_scale": of(shape_scales.sqrt_larger_side)},
        {
            "learning_rate": 0.05,
            "momentum": 0.8,
            "weight_decay": 0.3,
            "shape_scale.factor": 0.3,
            "eps": 0.1,
            "b1": 0.8,
            "b2": 0.9,
            "adam_eps": 1e-2,
        },
        ("learning_rate", "weight_decay"),
        reduction=True,
        others=MUON,
    ),
    Case(
        "scale_by_normuon",
        direction,
        {"shape_scale": shape_scales.one(), "momentum_form": "bias_corrected_nesterov"},
        {"learning_rate": 0.05, "momentum": 0.8, "eps": 0.1, "output_memory": 0.5},
        reduction=True,
        others=MUON,
    ),
    Case(
        "normuon",
        whole,
        {"momentum_form": "plain"},
        {"learning_rate": 0.05, "weight_decay": 0.3, "output_memory": 0.5, "adam_eps": 1e-2},
        ("learning_rate", "weight_decay"),
        reduction=True,
        others=MUON,
    ),
    Case(
        "scale_by_root",
        direction,
        {"coefficients": newton.polar_express(), "threshold": 0.2},
        {"learning_rate": 0.05, "momentum": 0.8, "threshold": 0.1, "update_rms": 0.3},
        reduction=True,
        others=ROOT,
    ),
    Case(
        "root",
        whole,
        {"threshold": of(newton.quantile), "coefficients": of(newton.published)},
        {
            "learning_rate": 0.05,
            "momentum": 0.8,
            "threshold.q": 0.6,
            "coefficients.steps": 4,
            "weight_decay": 0.3,
            "update_rms": 0.3,
            "b1": 0.8,
            "b2": 0.9,
            "eps": 1e-2,
        },
        ("learning_rate", "weight_decay"),
        reduction=True,
        others=ROOT,
    ),
    Case(
        "width_scaled_decay",
        before_rate,
        {"base_width": 2, "head": "matrix"},
        {"learning_rate": 0.05, "weight_decay": 0.3, "exponent": 0.9},
        ("learning_rate", "weight_decay"),
        static=("base_width",),
    ),
    Case(
        "width_scaled_decay mup_package",
        before_rate,
        {"base_width": From(narrow), "rule": "mup_package"},
        {"weight_decay": 0.3, "exponent": 0.6},
        ("weight_decay",),
    ),
    Case(
        "width_scaling",
        before_rate,
        {"base_width": 2, "head": "matrix", "optimizer": "conda"},
        {"learning_rate": 0.05, "weight_decay": 0.3, "exponent": 0.9},
        ("learning_rate", "weight_decay"),
        static=("base_width",),
    ),
    Case(
        "width_scaled_learning_rate",
        after_decay,
        {"base_width": 2},
        {"learning_rate": 0.05},
        ("learning_rate",),
        static=("base_width",),
        mask=False,
    ),
    Case(
        "mup_adamw",
        whole,
        {"base_width": 2, "head": "matrix"},
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
        static=("base_width",),
    ),
    Case(
        "lp_decay",
        before_rate,
        {"p": 1.5},
        {"weight_decay": 0.3},
        ("weight_decay",),
        static=("p",),
        others={"p": (1.2, 1.7)},
    ),
    Case(
        "lp_proximal_decay",
        last,
        {"p": 0.8, "linearize_at": "new", "weight_decay": 0.1},
        {"learning_rate": 0.05, "weight_decay": 0.3},
        ("learning_rate", "weight_decay"),
        static=("p",),
        others={"p": (1.2, 1.7), "linearize_at": ("old", "new")},
    ),
    Case(
        "elastic_net_decay",
        before_rate,
        {},
        {"weight_decay": 0.3, "l1_ratio": 0.2},
        ("weight_decay",),
    ),
    Case(
        "elastic_net_proximal_decay",
        last,
        {},
        {"learning_rate": 0.05, "weight_decay": 0.3, "l1_ratio": 0.2},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "cautious_decay",
        before_rate,
        {},
        {"weight_decay": 0.3},
        ("weight_decay",),
    ),
    Case(
        "corrected_decay",
        before_rate,
        {"peak_learning_rate": 2 * RATE},
        {"learning_rate": 0.05, "weight_decay": 0.3, "peak_learning_rate": 0.05},
        ("learning_rate", "weight_decay"),
        others={"normalized": ("head", "hidden")},
    ),
    Case(
        "target_norm_decay",
        before_rate,
        {"target": 0.3},
        {"weight_decay": 0.3, "target": 0.1},
        ("weight_decay", "target"),
        reduction=True,
    ),
    Case(
        "target_norm_decay initial",
        before_rate,
        {},
        {"weight_decay": 0.3},
        reduction=True,
    ),
    Case(
        "toward_initial_decay",
        before_rate,
        {"weight_decay": 0.5},
        {"learning_rate": 0.05, "weight_decay": 3.0},
        ("learning_rate", "weight_decay"),
    ),
    Case(
        "toward_initial_decay cautious",
        before_rate,
        {"weight_decay": 3.0, "cautious": True},
        {"weight_decay": 1.0},
        ("weight_decay",),
    ),
    Case("soda_decay", last, {}, {"learning_rate": 0.05, "start": 5.0}, ("learning_rate",)),
    Case(
        "stable_decay",
        before_rate,
        {"weight_decay": 0.03},
        {"weight_decay": 0.1, "b2": 0.5},
        ("weight_decay",),
        extra=with_gradients,
        reduction=True,
    ),
    Case(
        "adam_stable_decay",
        whole,
        {"weight_decay": 0.03},
        {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 1e-2, "weight_decay": 0.1},
        ("learning_rate", "weight_decay"),
        reduction=True,
    ),
    Case(
        "awd_decay",
        before_adam,
        {},
        {"weight_decay": 0.3, "memory": 0.5, "eps": 1.0},
        ("weight_decay",),
        reduction=True,
    ),
    Case(
        "adadecay",
        before_adam,
        {},
        {"weight_decay": 0.3, "sharpness": 2.0},
        ("weight_decay",),
        reduction=True,
    ),
    Case(
        "block_adadecay",
        before_rate,
        {"refresh_every": 2},
        {"weight_decay": 0.3, "sharpness": 2.0, "refresh_every": 4},
        ("weight_decay",),
        extra=with_gradients,
        reduction=True,
    ),
    Case(
        "spectral_alpha_decay",
        before_rate,
        {"min_eigenvalues": 4, "refresh_every": 4},
        {"weight_decay": 0.3, "min_ratio": 0.2, "max_ratio": 5.0, "refresh_every": 2},
        ("weight_decay",),
        reduction=True,
    ),
    Case(
        "spectral_alpha_decay sigmoid",
        before_adam,
        {
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
        last,
        {"bound": of(bounds.uniform, bound=0.5)},
        {"learning_rate": 0.05, "bound.bound": 1.0, "rate": 0.5},
        ("learning_rate", "rate"),
        reduction=True,
        others={"bound": (bounds.uniform(0.4), bounds.dependent(0.5)), "measure": ("l1", "std")},
    ),
    Case(
        "cpr_decay inflection",
        last,
        {"bound": of(bounds.inflection, steps=1)},
        {"rate": 4.0},
        reduction=True,
    ),
    Case(
        "hyperball",
        last,
        {"min_direction": 0.05},
        {"learning_rate": 0.05, "min_direction": 0.9},
        ("learning_rate",),
        mask=False,
        reduction=True,
        others=NORMS,
    ),
    Case(
        "hyperball radius",
        last,
        {"radius": 0.3, "per": "layer"},
        {"learning_rate": 0.05, "radius": 0.4},
        ("learning_rate",),
        mask=False,
        reduction=True,
    ),
    Case(
        "radial_brake",
        last,
        {},
        {"learning_rate": 0.05, "outward": 0.2, "inward": 0.7},
        ("learning_rate",),
        mask=False,
        reduction=True,
        others=NORMS,
    ),
    Case(
        "radial_brake first_order",
        last,
        {"rule": "first_order", "per": "output"},
        {"learning_rate": 0.05, "outward": 0.2, "inward": 0.7},
        ("learning_rate",),
        mask=False,
        reduction=True,
    ),
    Case(
        "relative_update",
        before_rate,
        {},
        {"learning_rate": 0.05},
        ("learning_rate",),
        mask=False,
        reduction=True,
        others=NORMS,
    ),
    Case(
        "relative_update_floor",
        before_rate,
        {"floor": 3.0},
        {"learning_rate": 0.05, "floor": 4.0},
        ("learning_rate",),
        mask=False,
        reduction=True,
        others=NORMS,
    ),
    Case(
        "rotational_update",
        in_place_of_rate,
        {},
        {"learning_rate": 0.05, "weight_decay": 0.3, "b1": 0.8, "memory": 0.5, "eps": 1.0},
        ("learning_rate", "weight_decay"),
        mask=False,
        reduction=True,
    ),
    Case(
        "rotational_adamw",
        whole,
        {},
        {
            "learning_rate": 0.05,
            "b1": 0.8,
            "b2": 0.9,
            "eps": 1e-2,
            "weight_decay": 0.3,
            "memory": 0.5,
        },
        ("learning_rate", "weight_decay"),
        mask=False,
        reduction=True,
        others={"decay_mask": ("vector", None)},
    ),
    Case(
        "skip_on_spike",
        whole,
        {"inner": From(adam_huber), "sigma": 1.0, "window": 4},
        {"learning_rate": 0.05, "sigma": 50.0},
        static=("window",),
        extra=with_loss,
        mask=False,
        reduction=True,
        others={"inner": (optax.sgd(0.1),), "window": (6, 8)},
    ),
)
