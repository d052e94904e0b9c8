"""The state of 1-bit Adam: placement, other numbers of workers, resuming, FSDP inside a slice, and what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_decay.one_bit import compression
from optax_decay.one_bit.adam import OneBitAdamState, one_bit_adam, scale_by_one_bit_adam
from optax_decay.one_bit.state import change_workers, one_bit_phase, state_partition_specs
from optax_decay.one_bit.warmup import VarianceCriterion
from tests.references.one_bit_adam import OneBitAdam
from tests.support import workers

WARMUP, RATE = 4, 0.01
EVERY = tuple(workers.SHAPES)
STACKED = (("bias", "B"), ("kernel", "D -> F"), ("stack", "L | M -> N"))


def make(**options):
    options = {"b2": 0.99, "compress": None, "mask": None, "weight_decay": 0.1} | options
    return one_bit_adam(RATE, "data", options.pop("warmup_steps", WARMUP), **options)


def compressed_state(count, steps=10, dtype=np.float32, **options):
    grads = workers.gradients(steps, count, dtype)
    trajectory, state = workers.train(make(**options), workers.weights(dtype), grads)
    assert one_bit_phase(state) == "compressed"
    return trajectory[-1], jax.tree.map(np.asarray, state)  # as from a checkpoint


def test_resuming_is_bitwise():
    grads = workers.gradients(12, 4, np.float32)
    whole, end = workers.train(make(), workers.weights(np.float32), grads)
    for cut in (3, 4, 9):  # in the warm-up, at the switch, in the compressed phase
        first, state = workers.train(
            make(), workers.weights(np.float32), {k: g[:cut] for k, g in grads.items()}
        )
        leaves, treedef = jax.tree.flatten(jax.tree.map(np.asarray, state))
        stored = [np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape) for x in leaves]
        rest, resumed = workers.train(
            make(),
            first[-1],
            {k: g[cut:] for k, g in grads.items()},
            state=treedef.unflatten(stored),
        )
        assert workers.bits(rest[-1]) == workers.bits(whole[-1])
        assert workers.bits(resumed) == workers.bits(end)


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (4, 2)])
def test_errors_of_other_workers_are_refused(before, after):
    params, state = compressed_state(before)
    grads = workers.gradients(2, after, np.float32)
    # Onto more devices the rows do not fit; onto fewer, several rows reach one device.
    with pytest.raises(ValueError, match=r"change_workers|evenly divisible"):
        workers.train(make(), params, grads, state=state)


@pytest.mark.parametrize("layout", ["joined", "flat"])
@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4)])
def test_changing_the_number_of_workers(before, after, layout):
    params, state = compressed_state(before, layout=layout, axes=STACKED)
    tx = make(layout=layout, axes=STACKED)
    with jax.set_mesh(workers.mesh_of(after)):
        fresh = jax.eval_shape(tx.init, params)
    notes = []
    reset, note = change_workers(state, fresh, report=notes.append)
    assert notes == [note]
    assert f"{before} workers were reset to 0 for {after} workers" in note
    assert not any(np.any(np.asarray(e)) for e in jax.tree.leaves(reset[0].worker_error))
    assert workers.bits(reset[0].mu) == workers.bits(state[0].mu)
    assert workers.bits(reset[0].nu) == workers.bits(state[0].nu)
    assert one_bit_phase(reset) == "compressed" and int(reset[0].count) == 10

    spread, note = change_workers(state, fresh, "redistribute", report=None)
    assert "redistributed" in note
    for name, old in state[0].worker_error.items():
        size = sum(x.size for x in params.values()) if name == "flat" else params[name].size
        rows, size = old.shape[1], size // old.shape[1]
        assert rows == (3 if name == "stack" else 1)
        old_server, new = state[0].server_error[name], spread[0].worker_error[name]
        assert not np.any(np.asarray(spread[0].server_error[name]))
        want = old.mean(0) + old_server.swapaxes(0, 1).reshape(rows, -1)
        np.testing.assert_allclose(np.mean(new, axis=0)[:, :size], want[:, :size], atol=1e-6)
        assert np.all(np.any(want[:, :size], axis=1))

    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), fresh)
    grads = workers.gradients(3, after, np.float32, seed=5)
    for converted in (reset, spread):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), converted) == shapes
        trajectory, end = workers.train(tx, params, grads, state=converted)
        assert int(end[0].count) == 13 and np.all(np.isfinite(trajectory[-1]["kernel"]))
    same, note = change_workers(state, state, report=None)
    assert "kept" in note and workers.bits(same) == workers.bits(state)


def test_states_that_cannot_be_converted_are_refused():
    params, state = compressed_state(4)
    with jax.set_mesh(workers.mesh_of(8)):
        flat = jax.eval_shape(make(layout="flat").init, params)
        other = jax.eval_shape(make().init, params | {"more": params["bias"]})
    with pytest.raises(ValueError, match=r"cannot be redistributed.*errors='reset'"):
        change_workers(state, flat, "redistribute")
    assert "reset" in change_workers(state, flat, report=None)[1]
    with pytest.raises(ValueError, match="different chains or parameters"):
        change_workers(state, other)
    with pytest.raises(ValueError, match="allowed: 'reset', 'redistribute'"):
        change_workers(state, flat, "keep")
    with pytest.raises(ValueError, match="holds no OneBitAdamState"):
        one_bit_phase(optax.adam(0.1).init(params))


# FSDP inside a slice: two slices of four devices.

SPECS = {"w": jax.P("fsdp"), "x": jax.P(None, "fsdp"), "b": jax.P()}


def pieces(name, x):
    """The shards of one array in the order of the fsdp axis."""
    axis = {"w": 0, "x": 1}.get(name)
    return [x] if axis is None else np.split(x, 4, axis=axis)


def hierarchical_case(steps=10):
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 5), "x": (3, 12), "b": (6,)}
    params = {k: rng.normal(size=s) for k, s in shapes.items()}
    common = {k: rng.normal(size=s) for k, s in shapes.items()}
    grads = {k: common[k] + 0.7 * rng.normal(size=(steps, 2, *s)) for k, s in shapes.items()}
    return params, grads


def hierarchical_reference(params, grads, layout):
    """Every shard is a parameter of its own to the reference; flat: one group per device of a slice."""
    cut = {f"{k}{i}": x for k, p in params.items() for i, x in enumerate(pieces(k, p))}
    joined = [("b0",), *((f"w{i}", f"x{i}") for i in range(4))]
    groups = joined if layout == "flat" else [(name,) for name in cut]
    out = {}
    for names in groups:
        reference = OneBitAdam(
            {n: cut[n] for n in names},
            2,
            WARMUP,
            RATE,
            b2=0.99,
            weight_decay=0.1,
            compressed=names,
            flat=True,
        )
        for t in range(grads["w"].shape[0]):
            reference.step(
                [{n: pieces(n[0], grads[n[0]][t, s])[int(n[1])] for n in names} for s in range(2)]
            )
        out |= reference.params
    return {
        "w": np.concatenate([out[f"w{i}"] for i in range(4)]),
        "x": np.concatenate([out[f"x{i}"] for i in range(4)], axis=1),
        "b": out["b0"],
    }


@pytest.mark.parametrize("manual", ["slice axis only", "all axes"])
@pytest.mark.parametrize("layout", ["joined", "per_leaf", "flat"])
def test_fsdp_inside_a_slice(layout, manual, as_for_users):
    params, grads = hierarchical_case()
    mesh = workers.mesh_of(2, 4, names=("slice", "fsdp"))
    tx = one_bit_adam(
        RATE, "slice", WARMUP, b2=0.99, weight_decay=0.1, compress=None, mask=None,
        layout=layout, param_specs=SPECS,
    )  # fmt: skip
    with jax.enable_x64(True), jax.set_mesh(mesh):
        abstract = jax.eval_shape(tx.init, params)
        placed = state_partition_specs(abstract, "slice", SPECS)
        shardings = jax.tree.map(
            lambda s: jax.NamedSharding(mesh, s),
            (SPECS, placed),
            is_leaf=lambda x: isinstance(x, jax.P),
        )
        p = jax.device_put(params, shardings[0])
        if manual == "all axes":
            inside, own, names = (
                (SPECS, placed),
                {k: jax.P("slice", *s) for k, s in SPECS.items()},
                None,
            )
            state = jax.jit(jax.shard_map(tx.init, in_specs=(SPECS,), out_specs=placed))(p)
        else:
            names = {"slice"}
            outer = state_partition_specs(abstract, "slice", SPECS, manual_axes=("slice",))
            inside, own = (jax.P(), outer), jax.P("slice")
            state = jax.jit(tx.init, out_shardings=shardings[1])(p)
        assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, abstract)
        options = {} if names is None else {"axis_names": names}
        step = jax.jit(
            jax.shard_map(
                functools.partial(workers.step_of, tx),
                in_specs=(*inside, own), out_specs=inside, **options,
            ),
            out_shardings=shardings, donate_argnums=(0, 1),
        )  # fmt: skip
        for t in range(10):
            p, state = jax.block_until_ready(step(p, state, {k: g[t] for k, g in grads.items()}))
        assert step._cache_size() == 1
        split = state[0].worker_error["flat/fsdp" if layout == "flat" else "w"]
        assert split.sharding.spec == jax.P(("slice", "fsdp")) and split.shape[0] == 8
        assert [s.data.shape[0] for s in split.addressable_shards] == [1] * 8
        want = hierarchical_reference(params, grads, layout)
        for name in want:
            np.testing.assert_allclose(p[name], want[name], rtol=1e-11, atol=1e-11)
        lines = step.lower(p, state, {k: g[0] for k, g in grads.items()}).compile().as_text()
    wide = [
        line
        for line in lines.splitlines()
        if re.search(r" (all-gather|all-to-all|all-reduce|collective-permute)\(", line)
        and not re.search(r"\{\{0,4\},\{1,5\}|\{'slice'\}", line)
    ]
    assert not wide, "nothing but the exchange between slices may cross devices"


def test_the_criterion_counts_all_shards():
    params, grads = hierarchical_case(30)
    mesh = workers.mesh_of(2, 4, names=("slice", "fsdp"))
    tx = scale_by_one_bit_adam(
        "slice", VarianceCriterion(min_steps=2, check_every=5), b2=0.8, param_specs=SPECS, mesh=mesh
    )
    placed = state_partition_specs(jax.eval_shape(tx.init, params), "slice", SPECS)
    state = jax.jit(jax.shard_map(tx.init, mesh=mesh, in_specs=(SPECS,), out_specs=placed))(params)
    own = {k: jax.P("slice", *s) for k, s in SPECS.items()}

    def update(grads, state):
        return tx.update({k: g[0] for k, g in grads.items()}, state)[1]

    step = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(own, placed), out_specs=placed))
    v = {k: np.zeros_like(p) for k, p in params.items()}
    for t in range(5):
        state = jax.block_until_ready(
            step({k: g[t].astype(np.float32) for k, g in grads.items()}, state)
        )
        v = {k: 0.8 * v[k] + 0.2 * g[t].mean(0) ** 2 for k, g in grads.items()}
    np.testing.assert_allclose(state.last_check.norm, sum(x.sum() for x in v.values()), rtol=1e-5)


# What is refused.


def outside(tx, params):
    return lambda: tx.update(params, tx.init(params), params)


def inside(tx, params, grads_of, specs=None):
    specs = specs or jax.P()

    def call():
        mesh = workers.mesh_of(4)
        with jax.set_mesh(mesh):
            state = tx.init(params)
        placed = state_partition_specs(state, "data")
        if specs != jax.P():  # momenta and errors sharded alike
            placed = jax.tree.map(lambda _: specs, placed, is_leaf=lambda x: isinstance(x, jax.P))
            placed = placed._replace(count=jax.P(), warmup_end=jax.P(), last_check=jax.P())

        def update(params, state):
            return tx.update(grads_of(params), state, params)[0]

        jax.eval_shape(
            jax.shard_map(update, mesh=mesh, in_specs=(specs, placed), out_specs=jax.P()),
            params,
            state,
        )

    return call


def own_gradient(params):
    return jax.grad(lambda p: jnp.sum(p["w"] ** 2) * (1 + jax.lax.axis_index("data")))(
        compression.local_params(params, "data")
    )


def summed_gradient(params):
    return jax.grad(lambda p: jnp.sum(p["w"] ** 2) * (1 + jax.lax.axis_index("data")))(params)


def test_misuse_is_named():
    params = {"w": jnp.ones((8, 3))}
    link = functools.partial(scale_by_one_bit_adam, "data", 2)
    tx = link()
    inside(tx, params, own_gradient)()
    with pytest.raises(ValueError, match=r"summed over the mesh already.*local_params"):
        inside(tx, params, summed_gradient)()
    with pytest.raises(ValueError, match=r"'w' is sharded over 'data'"):
        inside(tx, params, own_gradient, jax.P("data"))()
    with pytest.raises(ValueError, match=r"'w' is sharded over 'data'"):
        link(param_specs={"w": jax.P(None, "data")}, mesh=workers.mesh_of(4)).init(params)
    spread = jax.device_put(params, jax.NamedSharding(workers.mesh_of(4), jax.P("data")))
    with jax.set_mesh(workers.mesh_of(4)):
        with pytest.raises(ValueError, match=r"'w' is sharded over 'data'"):
            tx.init(spread)
        with pytest.raises(ValueError, match=r"does not run inside jax.shard_map"):
            outside(tx, params)()
    with pytest.raises(ValueError, match=r"size of the mesh axis 'data' is not known.*mesh=\.\.\."):
        tx.init(params)
    with pytest.raises(ValueError, match=r"dimension 1 of 'w'.* split 2 ways"):
        mesh = workers.mesh_of(4, 2, names=("data", "fsdp"))
        link(param_specs={"w": jax.P(None, "fsdp")}, mesh=mesh).init(params)
    with pytest.raises(ValueError, match=r"'w' holds complex64"):
        link(mesh=workers.mesh_of(4)).init({"w": 1j * params["w"]})
    with pytest.raises(ValueError, match=r"param_specs is not a tree"):
        link(param_specs={"v": jax.P()}, mesh=workers.mesh_of(4)).init(params)


def test_momenta_split_over_an_axis_that_is_not_named_are_refused():
    mesh = workers.mesh_of(2, 4, names=("data", "fsdp"))
    tx = scale_by_one_bit_adam("data", 2)

    def update(params):
        state = tx.init(params)
        mu = compression.local_params(state.mu, "fsdp")
        grads = compression.local_params(params, ("data", "fsdp"))
        return tx.update(grads, state._replace(mu=mu), params)[0]

    with pytest.raises(ValueError, match=r"split over 'fsdp'.*param_specs"):
        jax.eval_shape(
            jax.shard_map(update, mesh=mesh, in_specs=jax.P("fsdp"), out_specs=jax.P("fsdp")),
            {"w": jnp.ones((8, 3))},
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, r"b1=1.0"),
        ({"b2": -0.1}, r"b2=-0.1"),
        ({"eps": -1e-8}, r"eps=-1e-08"),
        ({"warmup_steps": 0}, r"warmup_steps=0"),
        ({"variance_floor": -1.0}, r"variance_floor=-1.0"),
        ({"layout": "per_tensor"}, r"layout='per_tensor'.*did you mean 'per_leaf'"),
        ({"compress": "matrix"}, r"mask='matrix' is not known"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        scale_by_one_bit_adam("data", **({"warmup_steps": 3} | options))


@pytest.mark.parametrize(
    "options", [{"min_steps": 0}, {"min_ratio": 1.1}, {"max_ratio": 0.9}, {"check_every": 0}]
)
def test_bad_criteria(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VarianceCriterion(**({"min_steps": 5} | options))


# The contract of a transformation.


def test_init_takes_shapes_and_holes_and_maps_params():
    tx = make(mesh=workers.mesh_of(4))
    params = workers.weights(np.float32)
    holes = params | {"none": None, "masked": optax.MaskedNode()}
    state = tx.init(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), holes))
    assert workers.bits(state) == workers.bits(tx.init(params))
    assert state[0].mu["none"] is None and isinstance(state[0].nu["masked"], optax.MaskedNode)
    marked = optax.tree.map_params(tx, lambda x: "p", state, transform_non_params=lambda x: "s")
    flags = marked[0]
    assert isinstance(flags, OneBitAdamState)
    assert {*jax.tree.leaves((flags.mu, flags.nu))} == {"p"}
    assert {*jax.tree.leaves(flags._replace(mu=None, nu=None))} == {"s"}


def test_low_precision_gradients_unknown_arguments_and_traced_numbers():
    mesh = workers.mesh_of(4)
    grads = workers.gradients(8, 4, np.float32)
    make_link = optax.inject_hyperparams(
        functools.partial(scale_by_one_bit_adam, "data"), static_args=("warmup_steps", "mesh")
    )
    tx = make_link(warmup_steps=2, b1=0.9, b2=0.99, mesh=mesh)
    params = jax.tree.map(jnp.asarray, workers.weights(np.float32))
    state = tx.init(params)
    specs = state_partition_specs(state, "data")

    def update(state, g):
        g = jax.tree.map(lambda x: x[0].astype(jnp.bfloat16), g)
        return tx.update(g, state, params, value=3.0, unknown=None)

    step = jax.jit(
        jax.shard_map(
            update, mesh=mesh, in_specs=(specs, jax.P("data")), out_specs=(jax.P(), specs)
        )
    )
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for t in range(8):
        updates, state = jax.block_until_ready(step(state, {k: g[t] for k, g in grads.items()}))
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
    assert int(state.inner_state.warmup_end) == 2
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in jax.tree.leaves(updates))
