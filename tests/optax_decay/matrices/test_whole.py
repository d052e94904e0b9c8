"""Whole matrices on split weights: the same numbers everywhere, by all-to-all, without gathering a weight."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_decay.matrices import orthogonal
from optax_decay.matrices.whole import each_matrix, split_axes

SPEC = jax.P(None, "fsdp", "tensor")
COLLECTIVES = ("all-to-all", "all-gather", "all-reduce", "collective-permute")


def mesh_of(mode):
    kind = getattr(jax.sharding.AxisType, mode)
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(kind,) * 3)


def stack(count):
    rng = np.random.default_rng(count)
    return rng.standard_normal((count, 6, 10)).astype(np.float32)


def norms(x):
    """Largest singular values: something that needs whole matrices."""
    return jax.lax.map(lambda w: jnp.linalg.svd(w, compute_uv=False)[0], x)


def collectives(compiled):
    text = compiled.as_text()
    return {name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES}


def test_split_axes():
    assert split_axes((None, "a", ("b", "c"))) == (("a", 1), ("c", 2), ("b", 2))


@pytest.mark.parametrize("count", [1, 3, 8, 11])
@pytest.mark.parametrize("mode", ["Explicit", "Auto"])
def test_jit(mode, count, as_for_users):
    x = stack(count)
    expected = np.linalg.svd(x.astype(np.float64), compute_uv=False)[:, 0]
    scaled = x * 2.0
    mesh = mesh_of(mode)

    def both(x):
        # Inside, x is whole matrices: one output per matrix, and one of the matrix's own shape.
        return each_matrix(
            lambda w: (norms(w), 2 * w), x, spec=None if mode == "Explicit" else SPEC
        )

    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.NamedSharding(mesh, SPEC))
        run = jax.jit(both)
        got, same = run(placed)
        found = collectives(run.lower(placed).compile())
    np.testing.assert_allclose(got, expected, rtol=40 * 2.0**-24)
    np.testing.assert_array_equal(same, scaled)
    assert same.sharding.is_equivalent_to(placed.sharding, 3)
    assert got.sharding.is_fully_replicated
    assert found["all-gather"] == 0 and found["all-to-all"] >= 2


def test_the_other_way_gathers(as_for_users):
    """What the exchange avoids: the compiler, left alone, gathers the weights."""
    mesh = mesh_of("Auto")
    placed = jax.device_put(stack(8), jax.NamedSharding(mesh, SPEC))
    assert collectives(jax.jit(norms).lower(placed).compile())["all-gather"] > 0


@pytest.mark.parametrize("spec", [SPEC, jax.P(None, ("fsdp", "tensor")), jax.P(None, None, "data")])
def test_inside_shard_map(spec):
    x = stack(8)
    expected = np.linalg.svd(x.astype(np.float64), compute_uv=False)[:, 0]
    mesh = mesh_of("Auto")
    body = lambda x: each_matrix(lambda w: (norms(w), -w), x, spec=spec)
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=(jax.P(), spec)))
    shape = {"fsdp": 2, "tensor": 2, "data": 2}
    if any(x.shape[d] % np.prod([shape[n] for n, e in split_axes(spec) if e == d]) for d in (1, 2)):
        x = np.pad(x, ((0, 0), (0, 2), (0, 0)))
        expected = np.linalg.svd(x.astype(np.float64), compute_uv=False)[:, 0]
    got, same = run(x)
    np.testing.assert_allclose(got, expected, rtol=40 * 2.0**-24)
    np.testing.assert_array_equal(same, -x)


def test_further_arrays_follow_their_matrix():
    """Row i of another array meets matrix i on whatever device that is."""
    x, other = stack(8), np.arange(8.0, dtype=np.float32)
    mesh = mesh_of("Explicit")
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.NamedSharding(mesh, SPEC))
        got = jax.jit(lambda x, o: each_matrix(lambda w, o: o * w[:, 0, 0], x, o))(placed, other)
    np.testing.assert_array_equal(got, other * x[:, 0, 0])


def test_shards_are_not_taken_for_matrices():
    mesh = mesh_of("Auto")
    run = jax.shard_map(
        lambda x: each_matrix(norms, x), mesh=mesh, in_specs=SPEC, out_specs=jax.P("fsdp")
    )
    with pytest.raises(ValueError, match="pass its partition"):
        run(stack(8))
    run = jax.shard_map(
        lambda x: each_matrix(norms, x, spec=jax.P("fsdp")),
        mesh=mesh,
        in_specs=jax.P("fsdp"),
        out_specs=jax.P("fsdp"),
    )
    with pytest.raises(ValueError, match="split the matrices"):
        run(stack(8))


@pytest.mark.parametrize("mode", ["Explicit", "Auto"])
def test_orthogonal_factors_on_split_matrices(mode):
    x = stack(3)
    mesh = mesh_of(mode)
    alone = orthogonal.newton_schulz(jnp.asarray(x), orthogonal.NEWTON_SCHULZ)
    spec = None if mode == "Explicit" else SPEC
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.NamedSharding(mesh, SPEC))
        run = lambda x: orthogonal.newton_schulz(x, orthogonal.NEWTON_SCHULZ, spec=spec)
        got = jax.jit(run)(placed)
    assert got.sharding.is_equivalent_to(placed.sharding, 3)
    # Whole matrices on one device: the same products in the same order, up to how they are batched.
    np.testing.assert_allclose(got, alone, atol=12 * 10 * 2.0**-24)
