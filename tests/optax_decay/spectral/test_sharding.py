"""AlphaDecay on eight devices: the numbers of one, shared work, and no weight gathered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay import spectra
from optax_decay.spectral import alpha_decay as module
from optax_decay.spectral.alpha_decay import spectral_alpha_decay
from tests.support import toy

STEPS = 4
AXES = (*toy.AXES[:-1], (r"single_\d/kernel", "D -> F"), toy.AXES[-1])
ALL = spectra.hidden_matrices(min_eigenvalues=2)
COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "collective-permute")


def params():
    """The toy tree with three separate matrices of one shape, as in a model without stacked layers."""
    rng = np.random.default_rng(8)
    tree = toy.params()
    for i in range(3):
        w = rng.standard_normal((8, 12)) * np.exp(rng.standard_normal((8, 1)))
        tree[f"single_{i}"] = {"kernel": jnp.asarray(w, jnp.float32)}
    return tree


def gradients():
    rng = np.random.default_rng(9)
    return [
        jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape), jnp.float32), params())
        for _ in range(STEPS)
    ]


def specs():
    return optax_decay.axes.partition_specs(AXES, params(), toy.MESH_AXES)


def mesh_of(mode):
    kind = getattr(jax.sharding.AxisType, mode)
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)


def optimizer(**options):
    options = {"refresh": spectra.every(3), "score": spectra.hill(method="svd"), **options}
    link = spectral_alpha_decay(0.5, axes=AXES, select=ALL, **options)
    return optax.chain(optax.scale_by_adam(), link, optax.scale_by_learning_rate(0.03))


def step_of(tx):
    def step(weights, state, g):
        updates, state = tx.update(g, state, weights, gradients=g)
        return optax.apply_updates(weights, updates), state

    return step


def run(tx, step, place=lambda tree: tree):
    weights = place(params())
    state = jax.jit(tx.init)(weights)
    for g in gradients():
        weights, state = step(weights, state, place(g))
    return weights, state


@functools.cache
def alone(**options):
    tx = optimizer(**options)
    return jax.device_get(run(tx, jax.jit(step_of(tx))))


def same(a, b):
    """Equal to the order of summation: 4 Adam steps, 12 terms per sum, exponents that amplify tenfold."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=STEPS * 12 * 10 * 2.0**-24, atol=1e-5)


def collectives(compiled):
    text = compiled.as_text()
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}


SETTINGS = [
    {},
    {"refresh": spectra.all_at_once(3)},
    {"refresh": spectra.every(3, at_once=8)},
    {"score": spectra.gradient_over_weight_norm("svd")},
    {"score": spectra.hill(method=spectra.matrix_products())},
]
IDS = ["default", "all at once", "eight at once", "gradients", "products"]


@pytest.mark.parametrize("options", SETTINGS, ids=IDS)
@pytest.mark.parametrize("mode", ["Explicit", "Auto", "Auto, told"])
def test_jit(mode, options):
    expected = alone(**options)
    mesh = mesh_of(mode.split(",")[0])
    shardings = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs())
    told = {"param_specs": specs()} if "told" in mode else {}
    tx = optimizer(**options, **told)
    with jax.set_mesh(mesh):
        got = run(tx, jax.jit(step_of(tx)), lambda tree: jax.device_put(tree, shardings))
    assert got[0]["blocks"]["up"]["kernel"].sharding.spec == jax.P(None, "fsdp", "tensor")
    same(jax.device_get(got), expected)


@pytest.mark.parametrize("devices", [0, 1])
def test_a_partition_without_devices_to_split_over(devices):
    """One program for one device and for many: told how weights would be split, but with no mesh, or a mesh of one."""
    names = ("data", "fsdp", "tensor")
    one = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), names)
    told = {"param_specs": specs(), **({"mesh": one} if devices else {})}
    tx = optimizer(**told)
    same(jax.device_get(run(tx, jax.jit(step_of(tx)))), alone())


@pytest.mark.parametrize("options", SETTINGS[:4], ids=IDS[:4])
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(options, check_vma):
    expected = alone(**options)
    mesh = mesh_of("Auto")
    tx = optimizer(**options, param_specs=specs())
    state = jax.eval_shape(tx.init, params())
    moments = optax.tree.map_params(
        tx, lambda _, s: s, state, specs(), transform_non_params=lambda _: jax.P()
    )
    shard = jax.shard_map(
        step_of(tx),
        mesh=mesh,
        in_specs=(specs(), moments, specs()),
        out_specs=(specs(), moments),
        check_vma=check_vma,
    )
    same(jax.device_get(run(tx, jax.jit(shard))), expected)


def test_shards_without_a_partition_are_refused():
    mesh = mesh_of("Auto")
    link = spectral_alpha_decay(0.5, axes=AXES, select=ALL)
    state = link.init(params())
    none = jax.tree.map(lambda _: jax.P(), state)
    shard = jax.shard_map(
        lambda u, s, p: link.update(u, s, p),
        mesh=mesh,
        in_specs=(specs(), none, specs()),
        out_specs=(specs(), none),
    )
    with pytest.raises(ValueError, match="param_specs="):
        shard(params(), state, params())


@pytest.mark.parametrize("mode", ["Explicit", "Auto"])
def test_all_to_all_and_no_gather(mode, as_for_users):
    """Per stack of matrices one all-to-all for each mesh axis that splits it, one sum of numbers, nothing else."""
    mesh = mesh_of(mode)
    shardings = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs())
    link = spectral_alpha_decay(0.5, axes=AXES, select=ALL, param_specs=specs())
    with jax.set_mesh(mesh):
        weights = jax.device_put(params(), shardings)
        update = jax.jit(lambda u, s, p: link.update(u, s, p, refresh=True))
        compiled = update.lower(weights, jax.jit(link.init)(weights), weights).compile()
    found = collectives(compiled)
    # attention, up, down, mix, and the three separate matrices as one stack; all split over two axes.
    assert found == {"all-to-all": 5 * 2, "all-gather": 0, "all-reduce": 1, "collective-permute": 0}


def test_the_other_way_gathers(as_for_users):
    """What this avoids: not told how weights are split, the compiler gathers each matrix on every device."""
    mesh = mesh_of("Auto")
    shardings = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs())
    link = spectral_alpha_decay(0.5, axes=AXES, select=ALL)
    weights = jax.device_put(params(), shardings)
    update = jax.jit(lambda u, s, p: link.update(u, s, p, refresh=True))
    assert collectives(update.lower(weights, link.init(weights), weights).compile())["all-gather"]


def test_devices_share_the_matrices():
    """With eight devices, a step that measures eight matrices runs one decomposition per device, not eight."""
    mesh = mesh_of("Explicit")
    shardings = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs())
    link = spectral_alpha_decay(0.5, axes=AXES, select=ALL, score=spectra.hill(method="svd"))
    ran = []
    original = module.measure

    def counting(w, *args, **kwargs):
        jax.debug.callback(lambda: ran.append(1))
        return original(w, *args, **kwargs)

    module.measure = counting
    try:
        with jax.set_mesh(mesh):
            weights = jax.device_put(params(), shardings)
            update = jax.jit(lambda u, s, p: link.update(u, s, p, refresh=True)[1])
            state = update(weights, jax.jit(link.init)(weights), weights)
            jax.block_until_ready(state)
            jax.effects_barrier()
    finally:
        module.measure = original
    # Five stacks of at most eight matrices: five rounds on each of the eight devices.
    assert len(ran) == 5 * 8
    assert int(state.multipliers[0].measured) == 2 + 2 + 2 + 1 + 3


@pytest.mark.parametrize("mode", ["Explicit", "Auto"])
def test_layers_split_over_a_mesh_axis(mode):
    """A stack whose layers are split (pipeline, FSDP by layer) is measured too; only shard_map refuses."""
    axes = {**toy.MESH_AXES, "L": "data"}
    split = optax_decay.axes.partition_specs(AXES, params(), axes)
    expected = alone()
    mesh = mesh_of(mode)
    shardings = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), split)
    tx = optimizer(param_specs=split)
    with jax.set_mesh(mesh):
        got = run(tx, jax.jit(step_of(tx)), lambda tree: jax.device_put(tree, shardings))
    same(jax.device_get(got), expected)
