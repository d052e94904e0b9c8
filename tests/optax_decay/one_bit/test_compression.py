"""The collective alone: against the simulation, what it conserves, and what the compiled program sends."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_decay.one_bit import compression
from optax_decay.one_bit.adam import scale_by_one_bit_adam
from tests.references.one_bit_adam import Collective, padded
from tests.support import workers
from train.plan.collectives import collectives, sent

SHAPES = ((1, 100), (3, 6), (2, 64))  # rows with scales of their own; the last needs no padding


def run(xs, worker, server, count, **options):
    """xs, worker, server: lists of [workers, …] arrays."""

    def body(*parts):
        parts = [[x[0] for x in part] for part in parts]
        means, *errors = compression.sign_compressed_means(*parts, "data")
        return means, *([e[None] for e in part] for part in errors)

    step = jax.shard_map(
        body,
        mesh=workers.mesh_of(count),
        in_specs=jax.P("data"),
        out_specs=(jax.P(), jax.P("data"), jax.P("data")),
        **options,
    )
    return jax.jit(step)(xs, worker, server)


def zeros(count, dtype=np.float64):
    worker = [np.zeros((count, rows, padded(size, count)), dtype) for rows, size in SHAPES]
    return worker, [e[..., : e.shape[-1] // count] for e in worker]


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_matches_the_simulation_over_several_rounds(count, check_vma):
    rng = np.random.default_rng(0)
    simulated = [
        [Collective(size, count, np.float64) for _ in range(rows)] for rows, size in SHAPES
    ]
    with jax.enable_x64(True):
        worker, server = zeros(count)
        for _ in range(5):
            xs = [rng.normal(size=(count, *s)) * (1 + np.arange(s[0]))[:, None] for s in SHAPES]
            means, worker, server = run(xs, worker, server, count, check_vma=check_vma)
            for i, row in enumerate(simulated):
                for r, simulate in enumerate(row):
                    want = simulate(list(xs[i][:, r]))
                    np.testing.assert_allclose(means[i][r], want, rtol=1e-13)
                    np.testing.assert_allclose(worker[i][:, r], simulate.worker_error, atol=1e-13)
                    np.testing.assert_allclose(server[i][:, r], simulate.server_error, atol=1e-13)
    assert all(np.any(np.asarray(e) != 0) for e in (*worker, *server))


def test_nothing_is_lost():
    rng = np.random.default_rng(1)
    worker, server = zeros(8, np.float32)
    got = [np.zeros(shape) for shape in SHAPES]
    want = [np.zeros(shape) for shape in SHAPES]
    for _ in range(6):
        xs = [rng.normal(size=(8, *shape)).astype(np.float32) for shape in SHAPES]
        means, worker, server = run(xs, worker, server, 8)
        for i, x in enumerate(xs):
            got[i] += means[i]
            want[i] += x.mean(0, dtype=np.float64)
    for i, (rows, size) in enumerate(SHAPES):
        left = np.asarray(worker[i]).mean(0, dtype=np.float64)
        left += np.asarray(server[i]).swapaxes(0, 1).reshape(rows, -1)
        assert np.max(np.abs(got[i] - want[i])) > 0.1
        # 6 rounds, each with 8 roundings of numbers up to 4.
        np.testing.assert_allclose(got[i] + left[:, :size], want[i], atol=6 * 8 * 4 * 2.0**-24)


def test_zeros_of_either_sign_count_as_positive():
    z = jnp.array([[0.0, -0.0, 3.0, -3.0, 0.0, -0.0, -3.0, 3.0]])
    packed, scale, error = jax.jit(compression.encode)(z)
    np.testing.assert_array_equal(packed, [[0b11101101]])
    assert scale == np.float32(np.sqrt(36 / 8))
    decoded = compression.decode(packed, scale)
    assert np.all(np.asarray(decoded)[0, [0, 1, 4, 5]] > 0)
    np.testing.assert_allclose(error, z - decoded, rtol=1e-7)


@pytest.mark.parametrize("count", [2, 3, 12])
def test_sum_of_decoded_rows(count):
    rng = np.random.default_rng(2)
    packed = rng.integers(0, 256, (count, 3, 5), dtype=np.uint8)
    scales = rng.random((count, 3)).astype(np.float32)
    signs = 2.0 * np.unpackbits(packed, axis=-1) - 1
    total = jax.jit(compression.decode_sum)(packed, scales)
    want = np.einsum("ns,nsp->sp", scales.astype(np.float64), signs)
    np.testing.assert_allclose(total, want, atol=count * 2.0**-24 * scales.sum())


@pytest.mark.parametrize(("size", "count"), [(6, 4), (65, 8), (64, 8), (1, 3), (1000, 12)])
def test_padding(size, count):
    total = compression.padded_size(size, count)
    assert total == padded(size, count) >= size
    assert total % count == 0 and (total // count) % 8 == 0 and total - size < count * 8 * count


def test_one_worker_gets_its_own_back():
    rng = np.random.default_rng(4)
    xs = [rng.normal(size=(1, *shape)).astype(np.float32) for shape in SHAPES]
    worker, server = zeros(1, np.float32)
    means, *_ = run(xs, worker, server, 1)
    for x, mean in zip(xs, means):
        np.testing.assert_array_equal(x[0], mean)


def test_workers_may_span_two_axes():
    mesh = workers.mesh_of(2, 4, names=("a", "b"))
    x = np.random.default_rng(3).normal(size=(8, 1, 100)).astype(np.float32)
    total = padded(100, 8)
    e = [np.zeros((8, 1, total), np.float32), np.zeros((8, 1, total // 8), np.float32)]

    def body(axis, x, worker, server):
        means, *_ = compression.sign_compressed_means([x[0]], [worker[0]], [server[0]], axis)
        return means[0]

    results = []
    for m, axis in ((mesh, ("a", "b")), (workers.mesh_of(8), "data")):
        step = jax.shard_map(
            functools.partial(body, axis), mesh=m, in_specs=jax.P(axis), out_specs=jax.P()
        )
        results.append(np.asarray(jax.jit(step)(x, *e)))
    np.testing.assert_array_equal(*results)


def program(phase, layout, count=8, compress=None, shapes=None):
    params = {
        k: jax.ShapeDtypeStruct(s, jnp.float32)
        for k, s in (shapes or {"a": (300, 70), "b": (90,), "c": (4, 50, 60)}).items()
    }
    mesh = workers.mesh_of(count)
    tx = scale_by_one_bit_adam("data", 5, layout=layout, compress=compress, mesh=mesh)
    state = jax.eval_shape(tx.init, params)
    grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), params)
    step = workers.compiled(optax.with_extra_args_support(tx), state, mesh, phase)
    text = step.lower(params, state, grads).compile().as_text()
    return text, sum(int(np.prod(x.shape)) for x in params.values())


def kinds(found):
    return sorted((c.kind, *sorted({dtype for dtype, _ in c.arrays})) for c in found)


ONE_EXCHANGE = [
    ("all-gather", "f32"),
    ("all-gather", "f32"),
    ("all-gather", "u8"),
    ("all-to-all", "u8"),
]
MEAN = ("all-reduce", "f32")


@pytest.mark.parametrize("count", [4, 8])
def test_compiled_program_holds_exactly_the_promised_collectives(count, as_for_users):
    for layout, exchanges in (("joined", 1), ("flat", 1), ("per_leaf", 3)):
        text, size = program("compressed", layout, count)
        found = collectives(text)
        assert kinds(found) == sorted(ONE_EXCHANGE * exchanges), layout
        # Counted once more without the parser: opcodes in the text.
        opcodes = re.findall(
            r" (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)\(", text
        )
        assert len(opcodes) == 4 * exchanges
        signs = sum(c.sent() for c in found if c.arrays[0][0] == "u8")
        scales = sum(c.sent() for c in found if c.arrays[0][0] == "f32")
        buffers = 1 if layout == "flat" else 3
        assert scales == 2 * buffers * 4 * (count - 1)
        plain = 2 * (count - 1) / count * 4 * size
        assert signs <= plain / 30
        assert sent(found) == signs + scales


def test_warmup_holds_one_mean_and_both_phases_hold_both(as_for_users):
    warm = collectives(program("warmup", "joined")[0])
    assert {(c.kind, c.arrays[0][0]) for c in warm} == {MEAN}
    assert sum(n for c in warm for _, n in c.arrays) == 300 * 70 + 90 + 4 * 50 * 60
    both = collectives(program(None, "joined")[0])
    assert sorted(set(kinds(both))) == sorted({*ONE_EXCHANGE, MEAN})
    assert " conditional(" in program(None, "joined")[0]


def test_leaves_left_out_are_averaged_in_float32(as_for_users):
    rules = (("b", False), ("a|c", True))
    found = collectives(program("compressed", "joined", compress=rules)[0])
    assert kinds(found) == sorted([*ONE_EXCHANGE, MEAN])
    (mean,) = [c for c in found if c.kind == "all-reduce"]
    assert mean.arrays == (("f32", 90),)
