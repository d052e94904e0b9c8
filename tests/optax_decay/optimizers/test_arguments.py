"""Every argument of the optimizers acts or raises on a mesh and with two workers; defaults are written once."""

import inspect
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay import newton, one_bit
from optax_decay.product.masks import MATRICES

AXES = (
    ("embed", "V -> D"),
    ("wide", "D -> F"),
    ("tall", "F -> D"),
    ("square", "D -> G"),
    ("stack", "L | D -> F"),
    ("head", "D -> V"),
    ("bias", "D"),
)
SHAPES = {
    "embed": (5, 4),
    "wide": (4, 6),
    "tall": (6, 4),
    "square": (4, 4),
    "stack": (2, 4, 6),
    "head": (4, 5),
    "bias": (4,),
}
B1, B2, EPS = (0.9, 0.8), (0.99, 0.95), (1e-8, 1e-3)
LINK = optax_decay.decay(0.2)

CONDA = {
    "b1": B1,
    "b2": B2,
    "eps": EPS,
    "refresh_every": (4, 3),
    "scale": (0.25, 0.5),
    "side": ("smaller_or_inputs", "smaller_or_outputs", "inputs", "outputs"),
    "basis": ("eigh", "svd"),
    "staggered": (False, True),
    "axes": (AXES, None),
    "stack_axes": (None, ()),
}
ROOT = {
    "momentum": (0.95, 0.8),
    "threshold": (newton.quantile(0.9), newton.quantile(0.6), 0.3, None),
    "coefficients": (
        newton.released(),
        newton.muon(4),
        newton.dion(),
        newton.polar_express(8),
        newton.triple((2.0, -1.5, 0.5)),
    ),
    "nesterov": (True, False),
    "update_rms": (0.2, 0.3, None),
    "b1": B1,
    "b2": B2,
    "eps": EPS,
    "iteration_dtype": (None, jnp.bfloat16),
    "axes": (AXES, None),
    "stack_axes": (None, ()),
}
EXADAM = {
    "b1": B1,
    "b2": B2,
    "eps": EPS,
    "mu_dtype": (None, jnp.bfloat16),
    "log_growth": (False, True),
}
SOPHIA = {
    "b1": B1,
    "b2": B2,
    "eps": EPS,
    "gamma": (0.05, 0.1),
    "clip_threshold": (1.0, 0.5),
    "refresh_every": (3, 2),
    "mu_dtype": (None, jnp.bfloat16),
    "bias_correction": (False, True),
    "refresh_after_update": (False, True),
    "key": (0, 1),
}
ONE_BIT = {
    "axis_name": ("worker", "nowhere"),
    "warmup_steps": (3, 2, one_bit.VarianceCriterion(1), one_bit.VarianceCriterion(2)),
    "b1": B1,
    "b2": B2,
    "eps": EPS,
    "layout": ("joined", "per_leaf", "flat"),
    "compress": (MATRICES, None, "head", ()),
    "axes": (AXES, None),
    "param_specs": (None, {name: jax.P("fsdp" if name == "wide" else None) for name in SHAPES}),
    "variance_floor": (0.0, 1e-3, None),
    "bias_correction": (False, True, "frozen_variance"),
    "largest_direction": (None, 1.0, 0.5),
}
DECAY = {
    "learning_rate": (0.03, 0.01),
    "weight_decay": (0.1, 0.3, LINK),
    "mask": (MATRICES, None, "hidden"),
    "axes": (AXES, None),
}
ROTATION = {
    "learning_rate": (0.03, 0.01),
    "weight_decay": (0.1, 0.3),
    "b1": B1,
    "memory": (0.9, 0.5),
    "eps": EPS,
    "zero_mean": (True, False),
    "per_neuron": (True, False),
    "mask": ("hidden", ("hidden", "embedding")),
    "axes": (AXES, None),
}
CHOICES = {
    "scale_by_conda": CONDA,
    "conda": CONDA | DECAY,
    "scale_by_root": ROOT,
    "root": ROOT | DECAY,
    "scale_by_exadam": EXADAM,
    "exadam": EXADAM | DECAY,
    "scale_by_sophia": SOPHIA,
    "sophia_g": SOPHIA | DECAY,
    "sophia_h": SOPHIA | DECAY,
    "scale_by_one_bit_adam": ONE_BIT,
    "one_bit_adam": ONE_BIT | DECAY,
    "rotational_update": ROTATION,
    "rotational_adamw": ROTATION | {"b2": B2, "decay_mask": ("head", "vector", None)},
}
# Each passes its options on to the other; with the arguments whose defaults differ.
PASSED_ON = {
    "conda": ("scale_by_conda", set()),
    "root": ("scale_by_root", set()),
    "exadam": ("scale_by_exadam", set()),
    "sophia_g": ("scale_by_sophia", set()),
    "sophia_h": ("sophia_g", {"gamma"}),
    "one_bit_adam": ("scale_by_one_bit_adam", {"compress"}),
    "rotational_adamw": ("rotational_update", {"weight_decay"}),
}


def parameters(name):
    return inspect.signature(getattr(optax_decay, name)).parameters


def outcome(name, arguments):
    """Everything the numbers of a run follow from: the first state and the program of a step. Or the error."""
    rng = np.random.default_rng(0)
    weights = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}

    def step(g):
        extra = {"hessian_fn": lambda params, key: params} if "sophia" in name else {}
        tx = optax.with_extra_args_support(getattr(optax_decay, name)(**arguments))
        state = tx.init(weights)
        return state, tx.update(g, state, weights, **extra)

    def on_worker(g):
        if "one_bit" not in name:
            return step(g)
        workers = jax.vmap(lambda i: step(jax.tree.map(lambda x: x * i, g)), axis_name="worker")
        return workers(jnp.arange(1.0, 3.0))

    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        try:
            traced = jax.jit(on_worker).trace(weights)
            return traced.lower().as_text() + str(traced.out_info)
        except ValueError as error:
            return f"ValueError: {error}"


def may_be_silent(name, arguments, argument):
    """Axes may describe more than is asked: roles, beside a mask of None. So may the specs: those of leaves that are
    not compressed."""
    if argument == "param_specs":
        return arguments["compress"] == "head"  # the specs split another matrix
    if argument == "axes":
        return name in ("exadam", "sophia_g", "sophia_h") and arguments["mask"] is None
    return argument == "mask" and arguments["axes"] is None


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CHOICES)
def test_every_argument_acts_or_raises(name, seed):
    """Whatever the other arguments are: a changed one changes the program or the state, or raises."""
    choices = CHOICES[name]
    draw = random.Random(f"{name} {seed}")
    base = {argument: values[0] for argument, values in choices.items()}
    before = outcome(name, base)
    for _ in range(20):
        if seed == 0:
            break
        base = {argument: draw.choice(values) for argument, values in choices.items()}
        before = outcome(name, base)
        if not before.startswith("ValueError"):
            break
    assert not before.startswith("ValueError"), before
    for argument, values in choices.items():
        if may_be_silent(name, base, argument):
            continue
        other = draw.choice([value for value in values if value is not base[argument]])
        after = outcome(name, base | {argument: other})
        assert after != before, f"{argument}: {base[argument]!r} and {other!r} are the same"


@pytest.mark.parametrize("name", CHOICES)
def test_every_argument_is_tried(name):
    known = {"mesh"} if "one_bit" in name else set()  # see test_the_mesh_acts
    assert set(parameters(name)) == set(CHOICES[name]) | known


def test_the_mesh_acts():
    """It tells init the number of workers where nothing else does, and is the only way to."""
    mesh = jax.make_mesh((4,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))
    weights = {"w": jnp.ones((3, 4))}
    state = optax_decay.scale_by_one_bit_adam("worker", 3, mesh=mesh).init(weights)
    assert state.worker_error["w"].shape[0] == 4
    with pytest.raises(ValueError, match=r"pass mesh=\.\.\."):
        optax_decay.scale_by_one_bit_adam("worker", 3).init(weights)


@pytest.mark.parametrize("outer", PASSED_ON)
def test_defaults_are_written_once(outer):
    inner, differ = PASSED_ON[outer]
    own, passed = parameters(outer), parameters(inner)
    shared = [name for name in passed if name in own and name not in ("learning_rate", "axes")]
    assert len(shared) >= 4
    found = {name for name in shared if own[name].default != passed[name].default}
    assert found == differ
    for name in shared:
        assert own[name].annotation == passed[name].annotation, name


@pytest.mark.parametrize("name", CHOICES)
def test_no_number_or_choice_is_typed_as_any(name):
    """What is a tree or a pattern may be of any type; numbers, schedules, dtypes and names may not."""
    trees = {"axes", "mask", "decay_mask", "compress", "param_specs"}
    for parameter in parameters(name).values():
        if parameter.name not in trees:
            text = (
                str(parameter.annotation).replace("type[typing.Any]", "").replace("type[Any]", "")
            )
            assert "Any" not in text, parameter
