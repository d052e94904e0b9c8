"""Largest singular values followed through a run, sharded or not, and the report that compares two widths."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_decay import axes, spectra, width
from optax_decay.parameters.axes import as_matrix, signatures
from optax_decay.parameters.paths import leaf_paths
from tests.support import toy

MATRICES = sorted(toy.MATRICES)


def exact(flat):
    """σ of every slice of every matrix by NumPy's SVD in float64, from the matrix views."""
    found = signatures(toy.AXES, toy.nest(flat))
    result = {}
    for path in MATRICES:
        views = np.asarray(as_matrix(np.asarray(flat[path], np.float64), found[path]))
        tops = np.linalg.svd(views, compute_uv=False)[:, 0]
        result[path] = tops.reshape(found[path].batch_shape)
    return result


def test_exact_values():
    got, vectors = spectra.top_singular_values(toy.params(), exact_below=100, axes=toy.AXES)
    assert sorted(got) == MATRICES
    for path, want in exact(toy.flat_params()).items():
        assert got[path].shape == want.shape
        # float32 Gram matrix: relative error of σ below n·2^-24 with n <= 24
        np.testing.assert_allclose(got[path], want, rtol=24 * 2.0**-24)
        assert vectors[path].shape == (*want.shape, vectors[path].shape[-1])


def test_carried_vectors_follow_the_weights():
    """Few iterations per call catch up over calls, from below, while the weights drift; from scratch they do not."""
    rng = np.random.default_rng(5)
    flat = toy.flat_params()
    drift = {path: rng.standard_normal(w.shape) * 0.003 for path, w in flat.items()}
    measure = jax.jit(
        lambda params, vectors: spectra.top_singular_values(
            params, vectors, iterations=1, axes=toy.AXES
        )
    )
    vectors = spectra.top_singular_values(
        jax.tree.map(jnp.asarray, toy.nest(flat)), iterations=1, axes=toy.AXES
    )[1]
    for _ in range(60):
        flat = {path: w + drift[path] for path, w in flat.items()}
        params = toy.nest({p: jnp.asarray(w, jnp.float32) for p, w in flat.items()})
        followed, vectors = measure(params, vectors)
    fresh, _ = spectra.top_singular_values(params, iterations=1, axes=toy.AXES)
    want = exact(flat)
    lost, lost_fresh = 0.0, 0.0
    for path in MATRICES:
        # Power iteration is a lower bound, up to rounding.
        assert np.all(followed[path] <= want[path] * (1 + 1e-5))
        lost = max(lost, float(np.max(1 - followed[path] / want[path])))
        lost_fresh = max(lost_fresh, float(np.max(1 - fresh[path] / want[path])))
    # Whatever the gap, k iterations from a vector whose overlap is 1/n of its square lose log(n)/k at most (n = 24).
    assert lost < np.log(24) / 60
    assert lost_fresh > 2 * np.log(24) / 60


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_sharded_equals_single_device(mode):
    axis_type = getattr(jax.sharding.AxisType, mode)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(axis_type,) * 3)
    specs = axes.partition_specs(toy.AXES, toy.params(), toy.MESH_AXES)
    shardings = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs)

    def measure(params):
        _, vectors = spectra.top_singular_values(params, iterations=6, axes=toy.AXES)
        return spectra.top_singular_values(params, vectors, iterations=6, axes=toy.AXES)[0]

    alone = jax.jit(measure)(toy.params())
    with jax.set_mesh(mesh):
        split = jax.device_put(toy.params(), shardings)
        assert not split["mix"]["kernel"].sharding.is_fully_replicated
        got = jax.jit(measure)(split)
    for path in MATRICES:
        # Products of whole matrices on another device: the same sums, up to their order.
        np.testing.assert_allclose(np.asarray(got[path]), np.asarray(alone[path]), rtol=1e-5)


def test_roles_and_sublayers():
    values, _ = spectra.top_singular_values(
        toy.params(), roles=("hidden",), exact_below=100, axes=toy.AXES
    )
    assert sorted(values) == sorted(toy.HIDDEN)
    gains = spectra.sublayer_gains(
        values, {"mlp": ("up/kernel", "down/kernel"), "mix": ("mix/.*",)}
    )
    want = exact(toy.flat_params())
    np.testing.assert_allclose(
        gains["mlp"], want["blocks/up/kernel"] * want["blocks/down/kernel"], rtol=1e-5
    )
    np.testing.assert_allclose(gains["mix"], want["mix/kernel"], rtol=1e-5)
    with pytest.raises(ValueError, match="must match one matrix"):
        spectra.sublayer_gains(values, {"mlp": ("kernel",)})
    with pytest.raises(ValueError, match="stacks of shapes"):
        spectra.sublayer_gains(values, {"both": ("mix/kernel", "up/kernel")})


AXES = (
    (r"embed", "V -> D"),
    (r"up", "L | D -> F"),
    (r"down", "L | F -> D"),
    (r"norm", "D"),
    (r"head", "D -> V"),
)


def model(width, layers, scale_up, scale_down):
    """Diagonal matrices, so that every σ is known: slice i of `up` has (1 + 0.2 i)·scale."""

    def stack(rows, columns, scale):
        diagonal = np.zeros((rows, columns))
        np.fill_diagonal(diagonal, np.linspace(1, 0.1, min(rows, columns)))
        return jnp.asarray([(1 + 0.2 * i) * scale * diagonal for i in range(layers)], jnp.float32)

    return {
        "embed": jnp.ones((7, width)),
        "up": stack(width, 3 * width, scale_up),
        "down": stack(3 * width, width, scale_down),
        "norm": jnp.ones(width),
        "head": jnp.ones((width, 7)),
    }


def test_report_recovers_a_planted_exponent():
    """σ = sqrt(η_i/λ_i)·m^a with a = ¾ for one matrix and 1 for the other, under λ ∝ √m and under constant λ."""
    m = 4.0
    for exponent in (0.5, 0.0):
        shrunk = m ** (-(1 + exponent) / 2)  # sqrt of η_i/λ_i
        proxy = model(6, 3, 1.3, 0.8)
        target = model(24, 3, 1.3 * shrunk * m**0.75, 0.8 * shrunk * m)
        report = width.spectral_gain_report(
            target,
            proxy,
            law=width.law(exponent=exponent),
            axes=AXES,
            sublayers={"mlp": ("up", "down")},
        )
        rows = {row.path: row for row in report.rows}
        assert sorted(rows) == sorted(
            [f"{n}[{i}]" for n in ("up", "down", "sublayer mlp") for i in range(3)]
        )
        for i in range(3):
            up, down, mlp = rows[f"up[{i}]"], rows[f"down[{i}]"], rows[f"sublayer mlp[{i}]"]
            assert up.factor == down.factor == m
            assert up.exponent == pytest.approx(0.75, abs=1e-5)
            assert down.exponent == pytest.approx(1.0, abs=1e-5)
            assert up.decay_exponent == pytest.approx(0.5, abs=1e-5)
            assert down.decay_exponent == pytest.approx(1.0, abs=1e-5)
            assert up.proxy == pytest.approx(1.3 * (1 + 0.2 * i), rel=1e-5)
            assert up.ratio == pytest.approx(m ** (0.25 - exponent / 2), rel=1e-5)
            assert up.predicted == pytest.approx(m ** (0.25 - exponent / 2), rel=1e-12)
            assert up.passed == (exponent == 0.5)
            assert not down.passed
            assert mlp.ratio == pytest.approx(up.ratio * down.ratio, rel=1e-5)
        assert not report.passed
        assert "FAILED" in str(report)


def test_report_passes_within_its_tolerance_only():
    proxy, target = model(6, 2, 1.0, 0.5), model(12, 2, 1.12, 0.5 / 1.12)
    loose = width.spectral_gain_report(target, proxy, axes=AXES)
    tight = width.spectral_gain_report(target, proxy, axes=AXES, tolerance=0.1)
    assert loose.passed
    assert not tight.passed
    text = str(loose)
    assert [line.split()[0] for line in text.splitlines()[2:4]] == ["down", "up"]
    assert text.count("2/2") == 2
    assert "passed: largest singular values within 15 %" in text


def test_report_with_another_depth_compares_means():
    proxy, target = model(6, 3, 1.0, 0.5), model(12, 2, 1.0, 0.5)
    report = width.spectral_gain_report(target, proxy, axes=AXES)
    assert sorted(row.path for row in report.rows) == ["down", "up"]
    for row in report.rows:
        want = math.sqrt(1.2) / (1.2 * 1.4) ** (1 / 3)
        assert row.ratio == pytest.approx(want, rel=1e-5)


def test_report_through_three_widths():
    """The exponent is the slope through all widths: here points that lie on no line."""
    sizes, tops = (6, 12, 48), (1.0, 1.5, 1.7)
    trees = [model(d, 1, top, 1.0) for d, top in zip(sizes, tops)]
    report = width.spectral_gain_report(trees[2], trees[:2], axes=AXES, law=width.law("constant"))
    slope = np.polyfit(np.log(sizes), np.log(tops), 1)[0]
    row = next(row for row in report.rows if row.path == "up[0]")
    assert row.factor == 8
    assert row.ratio == pytest.approx(1.7, rel=1e-5)
    assert row.exponent == pytest.approx(slope + 0.5, abs=1e-5)


def test_report_at_equal_width_has_no_exponent():
    a, b = model(6, 1, 1.0, 0.5), model(6, 1, 1.1, 0.4)
    report = width.spectral_gain_report(a, b, axes=AXES)
    assert report.exponent is None
    assert all(row.exponent is None and row.factor == 1 for row in report.rows)


def test_head_is_reported_where_it_counts_as_a_matrix():
    report = width.spectral_gain_report(
        model(12, 1, 1.0, 0.5), model(6, 1, 1.0, 0.5), axes=AXES, law=width.law(head="matrix")
    )
    (head,) = [row for row in report.rows if row.path == "head"]
    assert head.ratio == pytest.approx(math.sqrt(2), rel=1e-5)  # of matrices of ones


def test_bad_arguments():
    a, b = model(12, 1, 1.0, 0.5), model(6, 1, 1.0, 0.5)
    with pytest.raises(ValueError, match=r"'mystery'.* with axes=\.\.\."):
        width.spectral_gain_report({"mystery": jnp.ones((4, 6))}, {"mystery": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match="in one of the trees only"):
        width.spectral_gain_report(
            {"up": jnp.ones((4, 6))},
            {"other": jnp.ones((4, 6))},
            axes=lambda shapes: {leaf_paths(shapes)[0]: "D -> F"},
        )
    with pytest.raises(ValueError, match="tolerance=0"):
        width.spectral_gain_report(a, b, axes=AXES, tolerance=0.0)
