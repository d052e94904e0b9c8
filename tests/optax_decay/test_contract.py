"""What optax promises of every transformation, and what this library promises beyond it, on every row of `cases`."""

import functools
import inspect
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay.parameters.paths import leaf_paths
from tests.cases import CASES
from tests.support import toy

each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))


def abstract(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def step_of(case, tx):
    def step(weights, state, g):
        extra = case.extra(weights, g) if case.extra else {}
        updates, state = tx.update(g, state, weights, **extra)
        return optax.apply_updates(weights, updates), state

    return step


def run(case, tx, weights=None, grads=None, jit=True):
    """Weights and state after the row's number of steps."""
    weights = toy.params() if weights is None else weights
    grads = toy.gradients(case.steps) if grads is None else grads
    state = tx.init(weights)
    step = jax.jit(step_of(case, tx)) if jit else step_of(case, tx)
    for g in grads:
        weights, state = step(weights, state, g)
    return weights, state


@functools.cache
def baseline(case):
    return run(case, case.build())


def computed(case, tx):
    """All that the numbers of a run follow from: the program of its step, with its constants, and the first state."""
    weights = toy.params()
    state = tx.init(weights)
    return jax.jit(step_of(case, tx)).lower(weights, state, toy.gradients(1)[0]).as_text(), state


def largest_difference(a, b):
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_a_row_is_built_for_any_axes():
    """Nothing in a row is of the toy tree alone: another model's axes and shapes build and step it as well."""
    axes = (
        (r"table", "V -> D"),
        (r"layer/in", "L | D -> F"),
        (r"layer/out", "L | F -> D"),
        (r"last", "D -> V"),
    )
    shapes = {"table": (7, 6), "layer": {"in": (3, 6, 10), "out": (3, 10, 6)}, "last": (6, 7)}
    weights = jax.tree.map(
        lambda shape: jnp.linspace(-0.3, 0.5, math.prod(shape)).reshape(shape),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    for case in CASES:
        tx = case.build(axes=axes, params=weights)
        extra = case.extra(weights, weights) if case.extra else {}
        jax.eval_shape(lambda w, tx=tx, e=extra: tx.update(w, tx.init(w), w, **e), weights)


def test_every_public_factory_has_a_row():
    rows = {case.name.split(" ")[0] for case in CASES}
    factories = set()
    for name in dir(optax_decay):
        thing = getattr(optax_decay, name)
        if callable(thing) and not isinstance(thing, type) and not name.startswith("_"):
            returns = str(getattr(thing, "__annotations__", {}).get("return", ""))
            if "GradientTransformation" in returns:
                factories.add(name)
    assert factories
    assert rows == factories


@each
def test_init_from_shapes(case):
    tx = case.build()
    shapes = jax.eval_shape(lambda: toy.params())
    from_shapes = jax.eval_shape(tx.init, shapes)
    assert abstract(tx.init(shapes)) == abstract(tx.init(toy.params())) == abstract(from_shapes)


@each
def test_jit_agrees_with_eager(case):
    # XLA fuses and contracts across the operations that eager mode rounds one by one: 32 roundings of numbers of
    # order one per step, amplified at most tenfold by Adam's division on these gradients.
    tolerance = case.steps * 10 * 32 * 2.0**-24
    eager, _ = run(case, case.build(), jit=False)
    chex.assert_trees_all_close(eager, baseline(case)[0], rtol=tolerance, atol=tolerance)


@each
@pytest.mark.parametrize("dtypes", [("f4", "bf16"), ("bf16", "f4"), ("bf16", "bf16"), ("f4", "f4")])
def test_state_and_update_types_are_stable(case, dtypes):
    """State keeps structure, shapes and dtypes; the decay link returns updates in the dtype it was given (F22)."""
    names = {"f4": jnp.float32, "bf16": jnp.bfloat16}
    weights, grad = toy.params(names[dtypes[0]]), toy.gradients(1, names[dtypes[1]])[0]
    tx = case.build()
    extra = case.extra(weights, grad) if case.extra else {}
    before = jax.eval_shape(tx.init, weights)
    # optax's Adam keeps its own moments, whose dtype follows the gradients: compare from the first update on.
    _, first = jax.eval_shape(lambda g, s, w: tx.update(g, s, w, **extra), grad, before, weights)
    updates, second = jax.eval_shape(
        lambda g, s, w: tx.update(g, s, w, **extra), grad, first, weights
    )
    assert abstract(first) == abstract(second)
    for a, b in zip(
        jax.tree.leaves(before, is_leaf=is_ours), jax.tree.leaves(first, is_leaf=is_ours)
    ):
        if is_ours(a):
            assert abstract(a) == abstract(b)
    assert jax.tree.structure(updates) == jax.tree.structure(grad)
    assert {u.dtype for u in jax.tree.leaves(updates)} <= {
        grad["bias"].dtype,
        weights["bias"].dtype,
    }


def is_ours(x):
    return type(x).__module__.startswith("optax_decay")


@each
def test_runs_in_a_scan(case):
    tx = case.build()
    weights, grads = toy.params(), toy.gradients(case.steps)
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)

    def body(carry, g):
        weights, state = carry
        extra = case.extra(weights, g) if case.extra else {}
        updates, state = tx.update(g, state, weights, **extra)
        return (optax.apply_updates(weights, updates), state), None

    (got, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, stacked))((weights, tx.init(weights)))
    tolerance = case.steps * 10 * 32 * 2.0**-24
    chex.assert_trees_all_close(got, baseline(case)[0], rtol=tolerance, atol=tolerance)


@each
def test_none_and_masked_leaves_pass_through(case):
    weights, grad = toy.params(), toy.gradients(1)[0]
    chosen = jax.tree_util.tree_map_with_path(
        lambda key, _: "blocks" in jax.tree_util.keystr(key), weights
    )
    tx = optax.with_extra_args_support(optax.masked(case.build(), chosen))
    extra = case.extra(weights, grad) if case.extra else {}
    updates, _ = tx.update(grad, tx.init(weights), weights, **extra)
    np.testing.assert_array_equal(updates["bias"], grad["bias"])
    assert np.any(np.asarray(updates["blocks"]["up"]["kernel"] != grad["blocks"]["up"]["kernel"]))

    # A tree filtered to its trainable leaves has None where the rest was.
    tx = case.build()
    weights, grad = {**weights, "bias": None}, {**grad, "bias": None}
    updates, _ = tx.update(grad, tx.init(weights), weights, **extra)
    assert updates["bias"] is None
    assert updates["head"]["kernel"] is not None


@each
def test_unknown_extra_arguments_are_accepted(case):
    weights, grad = toy.params(), toy.gradients(1)[0]
    tx = case.build()
    extra = case.extra(weights, grad) if case.extra else {}
    tx.update(grad, tx.init(weights), weights, **{**extra, "value": 1.0}, something_else=weights)


@each
def test_every_number_matters(case):
    """No hyperparameter is accepted and then ignored (F6)."""
    for name, value in case.numbers.items():
        changed, _ = run(case, case.build(**{name: value}))
        assert largest_difference(changed, baseline(case)[0]) > 1e-6, name


@each
def test_schedules_are_called_with_0_1_2(case):
    for name in case.schedules:
        seen = []

        def schedule(count, seen=seen, name=name):
            seen.append(int(count))
            return jnp.asarray(case.numbers[name], jnp.float32)

        scheduled, _ = run(case, case.build(**{name: schedule}), jit=False)
        assert sorted(set(seen)) == list(range(case.steps)), name
        plain, _ = run(case, case.build(**{name: case.numbers[name]}), jit=False)
        # The schedule gives float32 where the number is float64 until it meets an array: one rounding per use.
        chex.assert_trees_all_close(scheduled, plain, rtol=1e-5, atol=1e-5)


@each
def test_schedule_does_not_change_the_state(case):
    """A checkpoint can be continued with a schedule where there was a number (F3)."""
    for name in set(case.schedules) - {"learning_rate"}:
        value = case.numbers[name]
        number = case.build(**{name: value}).init(toy.params())
        schedule = case.build(**{name: lambda count, v=value: v + 0.0 * count}).init(toy.params())
        assert jax.tree.structure(number) == jax.tree.structure(schedule)
        assert abstract(number) == abstract(schedule)


@each
def test_donation(case):
    """No state leaf is a buffer of the weights, and none appears twice (F27)."""
    tx = case.build()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights, state, g):
        extra = case.extra(weights, g) if case.extra else {}
        updates, state = tx.update(g, state, weights, **extra)
        return optax.apply_updates(weights, updates), state

    weights = toy.params()
    state = tx.init(weights)
    for g in toy.gradients(3):
        weights, state = step(weights, state, g)
    jax.block_until_ready(weights)


@each
def test_map_params(case):
    """optax.tree.map_params finds the moments and leaves per-matrix numbers alone."""
    tx, weights = case.build(), toy.params()
    state = tx.init(weights)
    marked = optax.tree.map_params(tx, lambda w: w.shape, state)
    # Where a state covers part of the tree, optax has its other leaves found by `is_leaf`.
    hidden = lambda x: isinstance(x, optax.MaskedNode)
    shaped = optax.tree.map_params(
        tx, lambda w, p: w if hidden(w) else w + 0 * p, state, weights, is_leaf=hidden
    )
    assert abstract(shaped) == abstract(state)
    assert jax.tree.leaves(marked, is_leaf=lambda x: isinstance(x, tuple))


def floats(case):
    return {name: value for name, value in case.numbers.items() if isinstance(value, float)}


@each
def test_inject_hyperparams(case):
    """The public factory itself can be injected, and injected and plain runs agree (F17, F18)."""
    injected = optax.inject_hyperparams(case.factory, static_args=case.static)
    numbers = {name: value for name, value in floats(case).items() if "." not in name}
    got, _ = run(case, case.build(injected, **numbers))
    plain, _ = run(case, case.build(**numbers))
    assert largest_difference(got, plain) <= 5e-5


@each
def test_vmap_over_numbers(case):
    """Numbers may be traced, those inside of values too: two settings in one program agree with each alone."""
    settings = [{name: x * value for name, value in floats(case).items()} for x in (1.0, 0.9)]
    numbers = jax.tree.map(lambda *x: jnp.asarray(x, jnp.float32), *settings)

    @jax.jit
    @jax.vmap
    def step(numbers, weights, state, g):
        return step_of(case, case.build(**numbers))(weights, state, g)

    both = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)
    weights = both(toy.params())
    state = jax.vmap(lambda numbers, w: case.build(**numbers).init(w))(numbers, weights)
    for g in toy.gradients(case.steps):
        weights, state = step(numbers, weights, state, both(g))
    for i, alone in enumerate(settings):
        plain, _ = run(case, case.build(**alone))
        assert largest_difference(jax.tree.map(lambda x, i=i: x[i], weights), plain) <= 5e-5


factories = pytest.mark.parametrize(
    "factory", sorted({case.name.split(" ")[0] for case in CASES}), ids=str
)


@factories
def test_signature_shows_every_argument_and_the_docstring_describes_it(factory):
    function = getattr(optax_decay, factory)
    parameters = inspect.signature(function).parameters.values()
    assert not [p for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    text = inspect.getdoc(function) or ""
    described = re.split(r"\n(?:Returns|Raises|Extra arguments.*):\n|\n>>> ", text)[0]
    described = described.partition("Args:\n")[2]
    missing = [p.name for p in parameters if not re.search(rf"\b{p.name}\b", described)]
    assert not missing


@each
def test_zero_learning_rate_leaves_every_weight(case):
    """Building, initialising and steps at rate zero change no bit (F5)."""
    got, _ = run(case, case.build(learning_rate=0.0))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(toy.params())):
        np.testing.assert_array_equal(x, y)


@each
def test_resume_is_bitwise(case):
    """State through host memory and back, at every step, gives the same weights."""
    tx = case.build()
    weights = toy.params()
    state = tx.init(weights)

    @jax.jit
    def step(weights, state, g):
        extra = case.extra(weights, g) if case.extra else {}
        updates, state = tx.update(g, state, weights, **extra)
        return optax.apply_updates(weights, updates), state

    for g in toy.gradients(case.steps):
        fresh = tx.init(weights)
        leaves = [np.asarray(x).copy() for x in jax.tree.leaves(state)]
        state = jax.tree.unflatten(jax.tree.structure(fresh), [jnp.asarray(x) for x in leaves])
        weights, state = step(weights, state, g)
    for x, y in zip(jax.tree.leaves(weights), jax.tree.leaves(baseline(case)[0])):
        np.testing.assert_array_equal(x, y)


@each
def test_counter_stops_at_the_largest_int32(case):
    tx, weights = case.build(), toy.params()
    top = np.iinfo(np.int32).max
    state = jax.tree.map(
        lambda x: jnp.full_like(x, top) if x.dtype == jnp.int32 and x.ndim == 0 else x,
        tx.init(weights),
    )
    g = toy.gradients(1)[0]
    _, state = tx.update(g, state, weights, **(case.extra(weights, g) if case.extra else {}))
    counters = [int(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int32 and x.ndim == 0]
    assert all(c >= 0 for c in counters)


@each
def test_needs_params_and_says_so(case):
    tx, weights = case.build(), toy.params()
    g = toy.gradients(1)[0]
    with pytest.raises(ValueError, match="params"):
        tx.update(g, tx.init(weights), **(case.extra(weights, g) if case.extra else {}))


@each
def test_masks(case):
    """A tree, a prefix, rules, a function and a role that select the same leaves are the same."""
    if not case.mask:
        return
    weights = toy.params()
    tree = toy.nest({path: path in toy.HIDDEN for path in toy.SHAPES})
    prefix = {**{name: False for name in weights}, "mix": True}
    prefix["blocks"] = {"attention": True, "up": True, "down": True, "norm": False}
    forms = [
        tree,
        prefix,
        ((r".*norm/scale|bias|embed.*|head.*", False), (r".*", True)),
        lambda shapes: toy.nest({p: p in toy.HIDDEN for p in leaf_paths(shapes)}),
        "hidden",
        ("hidden",),
    ]
    (program, state), *others = [computed(case, case.build(mask=mask)) for mask in forms]
    for other in others:
        assert other[0] == program
        chex.assert_trees_all_equal(other[1], state)
    assert computed(case, case.build(mask=None))[0] != program
    chosen, everything = (run(case, case.build(mask=mask))[0] for mask in (tree, None))
    assert largest_difference(everything, chosen) > 1e-6


@each
@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_sharded_over_two_axes(case, mode):
    """Eight devices give the numbers of one, and the state keeps its sharding and dtype from step to step."""
    axis_type = getattr(jax.sharding.AxisType, mode)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(axis_type,) * 3)
    specs = optax_decay.axes.partition_specs(toy.AXES, toy.params(), toy.MESH_AXES)
    shardings = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs)
    tx = case.build()
    with jax.set_mesh(mesh):
        weights = jax.device_put(toy.params(), shardings)
        grads = [jax.device_put(g, shardings) for g in toy.gradients(case.steps)]
        state = jax.jit(tx.init)(weights)

        step = jax.jit(step_of(case, tx))
        places = []
        for g in grads:
            weights, state = step(weights, state, g)
            places.append(jax.tree.map(lambda x: x.sharding, state))
        assert all(
            a.is_equivalent_to(b, x.ndim)
            for a, b, x in zip(
                jax.tree.leaves(places[1]), jax.tree.leaves(places[-1]), jax.tree.leaves(state)
            )
        )
    # Elementwise rows may still differ by a contraction in another fusion; reductions in another order as well.
    tolerance = case.steps * 10 * (256 if case.reduction else 32) * 2.0**-24
    got = jax.tree.map(np.asarray, weights)
    chex.assert_trees_all_close(
        got, jax.tree.map(np.asarray, baseline(case)[0]), rtol=tolerance, atol=tolerance
    )
