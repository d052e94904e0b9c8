"""Every argument that a public factory accepts changes something, beside whatever else is given: or it is refused.

For every factory: its row of the contract, and the same with other arguments drawn at random. Against each of these
settings every single argument is changed. What must differ is what a run follows from: the program of one step, the
first state, or the error. Values that were accepted and then ignored are found without anyone thinking of the pair.
"""

import inspect
import random
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_decay import couplings, multipliers, pulls, thresholds
from tests import cases

AXES = (
    (r"embed", "V -> D"),
    (r"up", "L | D -> F"),
    (r"bias", "D"),
    (r"head", "D -> V"),
)
# A stack that is none, and no rule for a leaf.
OTHER_AXES = (
    ((r"embed", "V -> D"), (r"up", "L D -> F"), (r"bias", "D"), (r"head", "D -> F")),
    ((r"nowhere", "D"),),
)
RATE = 0.04

# For arguments that several factories share and that are no numbers: other values, of which one at least must matter.
OTHERS = {
    "weight_decay": (0.3, 0.2),
    "learning_rate": (0.5, 0.25),
    "pull": (pulls.l1(), pulls.huber(0.05)),
    "multiplier": (multipliers.constant(0.5), (multipliers.constant(0.25),)),
    "coupling": (
        couplings.schedule(0.5),
        couplings.independent(),
        couplings.corrected(0.03, 0.5),
        couplings.learning_rate(),
    ),
    "mask": ("hidden", "head", None),
    "head": ("vector", "matrix"),
    "axes": OTHER_AXES,
    "axis_name": ("nowhere",),
    "threshold": (0.05, thresholds.rms_size(0.7), thresholds.running_mean_size(0.5)),
    "mu_dtype": (jnp.bfloat16, jnp.float32),
    "peak_learning_rate": (0.7, 0.6),
    "base_width": (4, 3),
}
# Where arrays live: seen only on a mesh, so the tests of sharding look at them.
PLACEMENT = {"mesh", "param_specs", "partition"}


def params():
    rng = np.random.default_rng(0)
    shapes = {"embed": (5, 6), "up": (2, 6, 8), "bias": (6,), "head": (6, 5)}
    return {name: jnp.asarray(rng.standard_normal(s), jnp.float32) for name, s in shapes.items()}


def outcome(case, arguments):
    """What a run follows from, as text and arrays; or the error."""
    weights = params()
    given = cases.Given(AXES, weights, RATE, None)
    try:
        tx = optax.with_extra_args_support(case.place(case.factory(**arguments), given))
        extra = case.extra(weights, weights) if case.extra else {}
        state = tx.init(weights)
        step = jax.jit(lambda g, s, w: tx.update(g, s, w, **extra))
        text = step.lower(weights, state, weights).as_text()
    except (ValueError, NameError) as error:
        return f"{type(error).__name__}: {error}", []
    return text, [np.asarray(x) for x in jax.tree.leaves(state)]


def same(a, b):
    return a[0] == b[0] and len(a[1]) == len(b[1]) and all(map(np.array_equal, a[1], b[1]))


def refused(result):
    return "module @" not in result[0]


def others(case, name, value):
    """Values of an argument beside the present one."""
    if isinstance(value, bool):
        return (not value,)
    if name in case.numbers:
        return (case.numbers[name], case.numbers[name] * 2)
    known = {**OTHERS, **case.others}
    if name in known:
        return tuple(x for x in known[name] if x is not value and x != value)
    if isinstance(value, int | float):
        return (value * 2 + 1, value / 2 if isinstance(value, float) else value + 1)
    raise AssertionError(f"give the row {case.name!r} others={{{name!r}: (...)}}")


def setting(case):
    """The row's arguments, with the factory's own defaults where it has none."""
    given = case.arguments(axes=AXES, params=params(), learning_rate=RATE)
    parameters = inspect.signature(case.factory).parameters.values()
    return {p.name: given.get(p.name, p.default) for p in parameters}


def drawn(case, base, rng):
    """The setting with a third of its arguments changed, such that it is not refused."""
    for _ in range(20):
        arguments = dict(base)
        for name, value in base.items():
            if name not in PLACEMENT | {"axes", "axis_name"} and rng.random() < 0.3:
                arguments[name] = rng.choice(others(case, name, value))
        if not refused(outcome(case, arguments)):
            return arguments
    raise AssertionError("every draw was refused")


ROWS = {case.name.split(" ")[0]: case for case in reversed(cases.CASES)}


@pytest.mark.parametrize("factory", sorted(ROWS))
def test_every_argument_matters_or_is_refused(factory):
    case = ROWS[factory]
    base = setting(case)
    rng = random.Random(zlib.crc32(factory.encode()))
    for arguments in (base, drawn(case, base, rng), drawn(case, base, rng)):
        before = outcome(case, arguments)
        assert not refused(before), before[0]
        ignored = [
            name
            for name, value in arguments.items()
            if name not in PLACEMENT
            and all(
                same(before, outcome(case, {**arguments, name: other}))
                for other in others(case, name, value)
            )
        ]
        assert not ignored, f"{ignored} of {arguments}"


@pytest.mark.parametrize("factory", sorted(ROWS))
def test_unknown_arguments_are_refused(factory):
    with pytest.raises(TypeError, match="no_such_argument"):
        ROWS[factory].factory(**setting(ROWS[factory]), no_such_argument=1)
