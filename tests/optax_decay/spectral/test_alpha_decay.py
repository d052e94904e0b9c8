"""AlphaDecay against the released algorithm, its phases, its guards and the switches beyond the paper."""

import dataclasses
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from optax_decay import spectra
from optax_decay.multipliers import spectral_alpha
from optax_decay.spectral import alpha_decay as module
from optax_decay.spectral.alpha_decay import SpectralSettings, spectral_alpha_decay
from optax_decay.states import SpectralAlphaState
from tests.references import alpha_decay as reference
from tests.references import spectra as reference_spectra
from tests.support.toy import nest, unnest

L, D, F = 2, 12, 18
AXES = (
    (r"embed/embedding", "V -> D"),
    (r"blocks/attention/(query|key|value)/kernel", "L | D -> H E"),
    (r"blocks/attention/out/kernel", "L | H E -> D"),
    (r"blocks/mlp/(gate|up)/kernel", "L | D -> F"),
    (r"blocks/mlp/down/kernel", "L | F -> D"),
    (r"blocks/norm/scale", "L | D"),
    (r"head/kernel", "D -> V"),
)
SHAPES = {
    "embed/embedding": (30, D),
    "blocks/attention/query/kernel": (L, D, 3, 6),
    "blocks/attention/key/kernel": (L, D, 3, 6),
    "blocks/attention/value/kernel": (L, D, 3, 6),
    "blocks/attention/out/kernel": (L, 3, 6, D),
    "blocks/mlp/gate/kernel": (L, D, F),
    "blocks/mlp/up/kernel": (L, D, F),
    "blocks/mlp/down/kernel": (L, F, D),
    "blocks/norm/scale": (L, D),
    "head/kernel": (D, 30),
}
MATRICES = tuple(path for path in SHAPES if path.startswith("blocks") and "norm" not in path)
STEPS, EVERY, RATE = 12, 5, 0.01
# svd compiles fastest; the other methods have tests of their own.
LARGE_ENOUGH = spectra.hidden_matrices(min_eigenvalues=10)
SMALL = {"select": LARGE_ENOUGH, "axes": AXES, "score": spectra.hill(method="svd")}
SCORES = {
    "alpha": spectra.hill(method="svd"),
    "alphahat": spectra.alphahat(method="svd"),
    "stable_rank": spectra.stable_rank("svd"),
    "entropy": spectra.entropy("svd"),
    "spectral_norm": spectra.spectral_norm("svd"),
    "fnorm": spectra.frobenius_norm(),
    "gradnorm": spectra.gradient_norm(),
    "gradnorm_d_weightnorm": spectra.gradient_over_weight_norm("svd"),
}
GRADIENT_NORM = {**SMALL, "score": spectra.gradient_norm()}
ASSIGNMENTS = {
    "linear": spectra.linear(0.5, 4.0),
    "sqrt": spectra.sqrt(),
    "log2": spectra.log2(),
    "sigmoid": spectra.sigmoid(),
}


def weights(seed=0, dtype=np.float32):
    """Every slice with its own scale and tail, so that no two matrices have the same score."""
    rng = np.random.default_rng(seed)
    flat = {}
    for i, (path, shape) in enumerate(SHAPES.items()):
        w = rng.standard_normal(shape) * (0.5 + 0.1 * i)
        if path in MATRICES:
            w = w.reshape(L, shape[1], -1)
            w = w * np.exp(0.2 * (i % 4) * rng.standard_normal((L, shape[1], 1)))
            w = (w * np.array([1.0, 1.7]).reshape(L, 1, 1)).reshape(shape)
        flat[path] = w.astype(np.float32).astype(dtype)
    return flat


def gradients(dtype=np.float32):
    rng = np.random.default_rng(99)
    return [
        {
            p: (rng.standard_normal(s) * (0.3 + 0.2 * len(p) % 1)).astype(dtype)
            for p, s in SHAPES.items()
        }
        for _ in range(STEPS)
    ]


def separate(flat):
    """Stacked leaves as one matrix per layer, as the released program sees them: name -> [in, out]."""
    rows = {}
    for path, x in flat.items():
        if path in MATRICES:
            sides = (D, -1) if "out" not in path and "down" not in path else (F, -1)
            rows.update({f"{path}[{i}]": x[i].reshape(sides) for i in range(L)})
        else:
            rows[path] = x
    return rows


NAMES = [f"{path}[{i}]" for path in MATRICES for i in range(L)]
BLOCKS = [name[-2] for name in NAMES]


def state_of(opt_state):
    is_ours = lambda s: isinstance(s, SpectralAlphaState)
    return next(s for s in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(s))


def chain(link, coupled):
    adam = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)
    links = (link, adam) if coupled else (adam, link)
    return optax.chain(*links, optax.scale_by_learning_rate(RATE))


def run(tx, flat, grads, **extra):
    """Weights and states after every step."""
    params = nest({p: jnp.asarray(x) for p, x in flat.items()})
    state = tx.init(params)

    @jax.jit
    def step(params, state, g, extra):
        updates, state = tx.update(g, state, params, gradients=g, **extra)
        return optax.apply_updates(params, updates), state

    history = []
    for i, g in enumerate(grads):
        now = {name: value[i] for name, value in extra.items()}
        params, state = step(params, state, nest({p: jnp.asarray(x) for p, x in g.items()}), now)
        history.append((unnest(params), jax.device_get(state_of(state))))
    return history


def multipliers(flat, **options):
    """Multipliers of the first step by matrix name, and the state."""
    link = spectral_alpha_decay(0.1, **{**SMALL, **options})
    params = nest({p: jnp.asarray(x) for p, x in flat.items()})
    zero = jax.tree.map(jnp.zeros_like, params)
    _, state = jax.jit(link.update)(zero, link.init(params), params)
    state = jax.device_get(state_of(state))
    return by_name(state.multiplier), state


def by_name(table):
    found = {}
    for path, values in table.items():
        values = np.asarray(values)
        if values.ndim == 1:
            found.update({f"{path}[{i}]": float(v) for i, v in enumerate(values)})
        elif values.ndim == 0:
            found[path] = float(values)
    return found


# The coupling does not depend on the metric: both only where gradients enter the score, and where they do not.
@pytest.mark.parametrize(
    "metric,coupled",
    [(metric, False) for metric in SCORES] + [("alpha", True), ("gradnorm", True)],
)
def test_trajectories_of_the_released_program(metric, coupled):
    """Every metric with every assignment, 12 steps, refreshes before updates 5 and 10, in float64."""
    decay = 0.02 if coupled else 2.0
    flat, grads = weights(dtype=np.float64), gradients(np.float64)
    query = "blocks/attention/query/kernel[0]"
    tuned = [name for name in NAMES if name != query]
    settings = {"metric": metric, "low": 0.5, "high": 4.0, "every": EVERY, "rate": RATE}
    ends = []
    with jax.enable_x64(True):
        for assignment, value in ASSIGNMENTS.items():
            expected = reference.run(
                separate(flat),
                [separate(g) for g in grads],
                tuned,
                [name[-2] for name in tuned],
                assignment=assignment,
                optimizer="adam" if coupled else "adamw",
                decay=decay,
                **settings,
            )
            link = spectral_alpha_decay(
                decay,
                score=SCORES[metric],
                assignment=value,
                refresh=spectra.all_at_once(EVERY),
                select=spectra.reference_matrices(min_eigenvalues=10),
                axes=AXES,
            )
            history = run(chain(link, coupled), flat, grads)
            for (got, _), want in zip(history, expected):
                for name, x in separate(got).items():
                    # float64 through 12 Adam steps: log2 near 1 amplifies by at most 1e3.
                    np.testing.assert_allclose(x, want[name], rtol=1e-9, atol=1e-9, err_msg=name)
            ends.append(np.concatenate([x.ravel() for x in expected[-1].values()]))
    # The four assignments are told apart by far more than the tolerance.
    assert min(np.abs(a - b).max() for i, a in enumerate(ends) for b in ends[:i]) > 1e-4


def test_float32_with_the_default_method():
    flat, grads = weights(), gradients()
    expected = reference.run(
        separate(flat),
        [separate(g) for g in grads],
        NAMES,
        BLOCKS,
        metric="alpha",
        assignment="linear",
        low=2 / 3,
        high=3.0,
        every=EVERY,
        optimizer="adamw",
        rate=RATE,
        decay=2.0,
    )
    link = spectral_alpha_decay(
        2.0, refresh=spectra.all_at_once(EVERY), select=LARGE_ENOUGH, axes=AXES
    )
    history = run(chain(link, False), flat, grads)
    got = separate(history[-1][0])
    for name, want in expected[-1].items():
        # 12 steps of a few roundings of numbers up to 8, plus alpha's 1e-4 times rate · decay · weight.
        np.testing.assert_allclose(got[name], want, atol=12 * (4 * 8 * 2.0**-24 + 1e-4 * 0.02))


def test_phase():
    """Measured in the first update and in updates 5, 10 (counted from 1), with the weights before them."""
    flat, grads = weights(), gradients()
    link = spectral_alpha_decay(2.0, refresh=spectra.all_at_once(EVERY), **SMALL)
    history = run(chain(link, False), flat, grads)
    measured = [int(state.measured) for _, state in history]
    assert measured == [len(NAMES) * (1 + (u >= 4) + (u >= 9)) for u in range(STEPS)]
    for u, before in ((0, flat), (4, history[3][0]), (9, history[8][0])):
        expected = [reference_spectra.metric(separate(before)[name], "alpha") for name in NAMES]
        got = by_name(history[u][1].score)
        np.testing.assert_allclose([got[name] for name in NAMES], expected, rtol=2e-4)
    assert by_name(history[3][1].multiplier) == by_name(history[0][1].multiplier)
    assert by_name(history[4][1].multiplier) != by_name(history[3][1].multiplier)


@pytest.mark.parametrize("every,at_once", [(5, 1), (20, 1), (9, 4), (3, 1), (1, 1), (6, 100)])
def test_staggered_measures_every_matrix_once_per_interval(every, at_once):
    flat = weights()
    steps = 2 * every + 3
    rng = np.random.default_rng(5)
    grads = [
        {p: rng.standard_normal(s).astype(np.float32) for p, s in SHAPES.items()}
        for _ in range(steps)
    ]
    link = spectral_alpha_decay(2.0, refresh=spectra.every(every, at_once=at_once), **SMALL)
    history = run(chain(link, False), flat, grads)
    seen = [by_name(state.score) for _, state in history]
    # Weights move in every step, so a new score is a new measurement.
    changed = [
        {name for name in NAMES if seen[u][name] != seen[u - 1][name]} for u in range(1, steps)
    ]
    for first in range(3):
        window = changed[first : first + every]
        assert sorted(name for names in window for name in names) == sorted(NAMES)
    per_step = -(-len(NAMES) // (every * at_once)) * at_once
    assert max(len(names) for names in changed) <= per_step
    assert int(history[-1][1].measured) == len(NAMES) + sum(len(names) for names in changed)
    # Round 0 of the stagger acts where the program does.
    if every > 1:
        assert changed[every - 2], "nothing was due at (count + 1) % every == 0"


def test_a_measured_matrix_moves_the_map_of_all():
    flat = weights()
    grads = gradients()
    link = spectral_alpha_decay(2.0, refresh=spectra.every(14), **SMALL)
    history = run(chain(link, False), flat, grads)
    for _, state in history:
        scores = by_name(state.score)
        values = np.array([scores[name] for name in NAMES])
        expected = reference.assign(values, "linear", 2 / 3, 3.0, BLOCKS)
        got = by_name(state.multiplier)
        np.testing.assert_allclose([got[name] for name in NAMES], expected, rtol=1e-5)


def test_stacked_and_separate_leaves_agree():
    flat = weights()
    stacked, _ = multipliers(flat, assignment=spectra.sigmoid())
    single = {
        f"layers/{name[-2]}/{name[7:-3]}": x for name, x in separate(flat).items() if name in NAMES
    }
    axes = (
        (r"attention/(query|key|value)/kernel", "D -> F"),
        (r"mlp/(gate|up)/kernel", "D -> F"),
        (r"(out|down)/kernel", "F -> D"),
    )
    alone, state = multipliers(single, assignment=spectra.sigmoid(), axes=axes)
    assert set(state.score) == set(single) and len(alone) == len(NAMES)
    for name in NAMES:
        assert alone[f"layers/{name[-2]}/{name[7:-3]}"] == pytest.approx(stacked[name], rel=1e-4)
    assert len({round(v, 3) for v in alone.values()}) > 10


def test_degenerate_matrices_keep_the_base_decay():
    flat = weights()
    good, _ = multipliers(flat)
    flat["blocks/mlp/up/kernel"][1] = 0
    flat["blocks/mlp/down/kernel"][0, 2, 3] = np.nan
    flat["blocks/attention/key/kernel"][1] = np.eye(D, F).reshape(D, 3, 6)
    bad = ["blocks/mlp/up/kernel[1]", "blocks/mlp/down/kernel[0]", "blocks/attention/key/kernel[1]"]
    got, state = multipliers(flat)
    rest = [name for name in NAMES if name not in bad]
    assert [got[name] for name in bad] == [1.0] * 3
    assert int(state.unstable) == 3
    assert [name for name, ok in by_name(state.stable).items() if not ok] == sorted(bad)
    scores = np.array([by_name(state.score)[name] for name in rest])
    expected = reference.assign(scores, "linear", 2 / 3, 3.0, None)
    np.testing.assert_allclose([got[name] for name in rest], expected, rtol=1e-5)
    assert all(good[name] != 1.0 for name in bad)
    for assignment in ("sqrt", "log2", "sigmoid"):
        got, _ = multipliers(flat, assignment=ASSIGNMENTS[assignment])
        expected = reference.assign(scores, assignment, 0, 0, [name[-2] for name in rest])
        np.testing.assert_allclose([got[name] for name in rest], expected, rtol=1e-4)
        assert [got[name] for name in bad] == [1.0] * 3


def test_equal_scores_and_a_single_matrix_keep_the_base_decay():
    flat = weights()
    for path in MATRICES:
        flat[path] = np.zeros_like(flat[path])
    got, state = multipliers(flat)
    assert set(got.values()) == {1.0} and int(state.unstable) == len(NAMES)
    flat["blocks/mlp/up/kernel"][0] = weights()["blocks/mlp/up/kernel"][0]
    got, state = multipliers(flat)
    assert set(got.values()) == {1.0} and int(state.unstable) == len(NAMES) - 1


def test_what_is_measured():
    flat = weights()
    everything, _ = multipliers(flat)
    assert set(everything) == set(NAMES)
    reference_names, _ = multipliers(flat, select=spectra.reference_matrices(min_eigenvalues=10))
    assert reference_names["blocks/attention/query/kernel[0]"] == 1.0
    assert reference_names["blocks/attention/query/kernel[1]"] != 1.0
    exclude = ("mlp/up/kernel[1]", r"attention/.*/kernel")
    left_out, _ = multipliers(
        flat, select=spectra.hidden_matrices(exclude=exclude, min_eigenvalues=10)
    )
    assert left_out["blocks/mlp/up/kernel[1]"] == 1.0 and left_out["blocks/mlp/up/kernel[0]"] != 1.0
    assert not any("attention" in name for name in left_out)
    chosen, _ = multipliers(
        flat,
        select=spectra.matrices(
            lambda name, signature: "head" in name or name.endswith("[1]"), min_eigenvalues=10
        ),
    )
    assert chosen["head/kernel"] != 1.0 and chosen["blocks/mlp/up/kernel[0]"] == 1.0
    masked, _ = multipliers(flat, mask=((r"mlp/.*", True), (r".*", False)))
    assert all("mlp" in name for name in masked)


def test_no_matrix_is_large_enough():
    with pytest.warns(UserWarning, match="min_eigenvalues=50"):
        got, state = multipliers(weights(), select=spectra.hidden_matrices())
    assert got == {} and state.score == {}
    # gradnorm needs no eigenvalues, and the program does not filter it.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        link = spectral_alpha_decay(0.1, score=spectra.gradient_norm(), axes=AXES)
        state = link.init(nest(weights()))
    assert set(state.multipliers[0].score) == set(MATRICES)


def test_a_given_size_counts_for_every_score():
    """A limit that is written is used, even by a score that needs no eigenvalues."""
    select = spectra.hidden_matrices(min_eigenvalues=13)
    link = spectral_alpha_decay(0.1, score=spectra.gradient_norm(), select=select, axes=AXES)
    with pytest.warns(UserWarning, match="min_eigenvalues=13"):
        assert link.init(nest(weights())).multipliers[0].score == {}


def test_an_exclude_that_matches_nothing_raises():
    link = spectral_alpha_decay(
        0.1, select=spectra.hidden_matrices(exclude=("mlp/gat/kernel",)), axes=AXES
    )
    with pytest.raises(ValueError, match="gate"):
        link.init(nest(weights()))


def test_aspect_correction():
    flat = weights()
    flat["blocks/mlp/up/kernel"] = (
        np.random.default_rng(0).standard_normal((L, D, 3 * D)).astype(np.float32)
    )
    axes = ((r"blocks/mlp/up/kernel", "L | D -> G"), *AXES)
    plain, state = multipliers(flat, axes=axes)
    got, _ = multipliers(flat, axes=axes, score=spectra.hill(aspect_correction=True, method="svd"))
    scores = by_name(state.score)
    random = {name: (3 * D if "up" in name else F) / D for name in NAMES}
    values = np.array(
        [scores[n] / spectra.random_matrix_alpha(D, round(D * random[n])) for n in NAMES]
    )
    expected = reference.assign(values, "linear", 2 / 3, 3.0, None)
    np.testing.assert_allclose([got[name] for name in NAMES], expected, rtol=1e-5)
    assert np.argsort(list(plain.values())).tolist() != np.argsort(list(got.values())).tolist()


def test_preserved_mean():
    flat = weights()
    plain, state = multipliers(flat)
    got, kept = multipliers(flat, assignment=spectra.linear(preserve_mean=True))
    sizes = {name: x.size for name, x in separate(flat).items()}
    mean = lambda table: sum(table[n] * sizes[n] for n in NAMES) / sum(sizes[n] for n in NAMES)
    assert mean(plain) == pytest.approx(float(state.mean_ratio), rel=1e-6) and mean(plain) > 1.2
    assert mean(got) == pytest.approx(1, rel=1e-6) and float(kept.mean_ratio) == pytest.approx(1)
    np.testing.assert_allclose(
        [got[n] for n in NAMES], [plain[n] / mean(plain) for n in NAMES], rtol=1e-5
    )


@pytest.mark.parametrize("quantile", [0.1, 0.27])
def test_quantile_clip(quantile):
    flat = weights()
    flat["blocks/mlp/up/kernel"][1] = 0
    _, state = multipliers(flat)
    names = [name for name in NAMES if name != "blocks/mlp/up/kernel[1]"]
    s = np.array([by_name(state.score)[name] for name in names])
    clipped = np.clip(s, np.quantile(s, quantile), np.quantile(s, 1 - quantile))
    expected = reference.assign(clipped, "linear", 2 / 3, 3.0, None)
    got, _ = multipliers(flat, assignment=spectra.linear(quantile_clip=quantile))
    np.testing.assert_allclose([got[name] for name in names], expected, rtol=1e-5)
    assert np.abs(expected - reference.assign(s, "linear", 2 / 3, 3.0, None)).max() > 0.05


def test_start_step():
    link = spectral_alpha_decay(2.0, refresh=spectra.all_at_once(EVERY, start_step=3), **SMALL)
    history = run(chain(link, False), weights(), gradients())
    measured = [int(state.measured) // len(NAMES) for _, state in history]
    assert measured == [0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3]
    assert set(by_name(history[2][1].multiplier).values()) == {1.0}
    assert len(set(by_name(history[3][1].multiplier).values())) == len(NAMES)


def test_the_training_step_can_own_the_phase():
    ask = np.array([False, False, True, False, True] + [False] * (STEPS - 5))
    link = spectral_alpha_decay(2.0, refresh=spectra.every(EVERY), **SMALL)
    history = run(chain(link, False), weights(), gradients(), refresh=ask)
    measured = [int(state.measured) // len(NAMES) for _, state in history]
    assert measured == np.cumsum(ask).tolist()
    assert set(by_name(history[1][1].multiplier).values()) == {1.0}


def test_a_plain_step_holds_nothing_of_the_measurement():
    link = spectral_alpha_decay(2.0, **{**SMALL, "score": spectra.hill(method="exact")})
    params = nest({p: jnp.asarray(x) for p, x in weights().items()})
    state = link.init(params)

    def text(refresh):
        step = lambda u, s, p: link.update(u, s, p, refresh=refresh)
        return str(jax.make_jaxpr(step)(params, state, params))

    assert "while" not in text(False) and "cond" not in text(False)
    assert "tridiagonal" in text(True) and "tridiagonal" in text(None)


def test_once_measures_once():
    link = spectral_alpha_decay(2.0, refresh=spectra.once(), **SMALL)
    history = run(chain(link, False), weights(), gradients())
    assert {int(state.measured) for _, state in history} == {len(NAMES)}


def test_decompositions_under_multi_steps(monkeypatch):
    """Accumulating around the optimizer runs it on every micro step; `refresh` keeps the measurements to one (F24)."""
    ran = []
    original = module.measure

    def counting(w, *args, **kwargs):
        jax.debug.callback(lambda: ran.append(1))
        return original(w, *args, **kwargs)

    monkeypatch.setattr(module, "measure", counting)
    k, every = 4, 3
    params = nest({p: jnp.asarray(x) for p, x in weights().items()})
    zero = jax.tree.map(jnp.zeros_like, params)

    def count(owned):
        ran.clear()
        link = spectral_alpha_decay(2.0, refresh=spectra.all_at_once(every), **SMALL)
        tx = optax.MultiSteps(chain(link, False), k)
        state = tx.init(params)
        step = jax.jit(lambda s, refresh: tx.update(zero, s, params, refresh=refresh)[1])
        late = jax.jit(lambda s: tx.update(zero, s, params)[1])
        for micro in range(6 * k):
            update = micro // k
            due = update == 0 or (update + 1) % every == 0
            state = step(state, due and micro % k == k - 1) if owned else late(state)
        jax.effects_barrier()
        return len(ran)

    assert count(owned=True) == 3 * len(NAMES)
    assert count(owned=False) == 3 * k * len(NAMES)


def test_convolutions_pool_their_kernel_positions():
    rng = np.random.default_rng(3)
    flat = {
        "stem/kernel": rng.standard_normal((3, 2, 14, 20)).astype(np.float32),
        "mix/kernel": (rng.standard_normal((2, 3, 3, 11, 13)) * [[[[[1.0]]]], [[[[2.0]]]]]).astype(
            np.float32
        ),
        "dense/kernel": rng.standard_normal((15, 22)).astype(np.float32),
    }
    axes = (
        ("stem/kernel", "KH KW | I -> O"),
        ("mix/kernel", "L KH KW | I2 -> O2"),
        ("dense/kernel", "I3 -> O3"),
    )
    _, state = multipliers(flat, axes=axes, score=SCORES["fnorm"])
    matrices = {
        "stem/kernel": [flat["stem/kernel"].reshape(6, 14, 20)],
        "mix/kernel": list(flat["mix/kernel"].reshape(2, 9, 11, 13)),
        "dense/kernel": [flat["dense/kernel"]],
    }
    for metric in ("fnorm", "alpha"):
        _, state = multipliers(flat, axes=axes, score=SCORES[metric])
        for path, parts in matrices.items():
            got = np.asarray(state.score[path])
            assert got.shape == flat[path].shape[: len(flat[path].shape) - 2]
            expected = [reference_spectra.metric(part, metric) for part in parts]
            for value, want in zip(got.reshape(len(parts), -1), expected):
                np.testing.assert_allclose(value, want, rtol=2e-4)


def test_gradient_metrics_wait_for_their_first_refresh():
    link = spectral_alpha_decay(2.0, refresh=spectra.every(EVERY), **GRADIENT_NORM)
    history = run(chain(link, False), weights(), gradients())
    assert set(by_name(history[3][1].multiplier).values()) == {1.0}
    norms = [np.linalg.norm(separate(gradients()[4])[name]) for name in NAMES]
    got = by_name(history[4][1].score)
    np.testing.assert_allclose([got[name] for name in NAMES], norms, rtol=1e-5)


def test_gradient_metrics_use_the_updates_where_no_gradients_are_given():
    link = spectral_alpha_decay(2.0, refresh=spectra.every(1), **GRADIENT_NORM)
    params = nest({p: jnp.asarray(x) for p, x in weights().items()})
    grads = gradients()
    first, second = (nest({p: jnp.asarray(x) for p, x in g.items()}) for g in grads[:2])
    for extra, used in (({}, grads[0]), ({"gradients": second}, grads[1])):
        _, state = link.update(first, link.init(params), params, **extra)
        got = by_name(state_of(state).score)
        norms = [np.linalg.norm(separate(used)[name]) for name in NAMES]
        np.testing.assert_allclose([got[name] for name in NAMES], norms, rtol=1e-5)


def test_gradient_norms_decompose_nothing():
    link = spectral_alpha_decay(2.0, **GRADIENT_NORM)
    params = nest({p: jnp.asarray(x) for p, x in weights().items()})
    text = str(jax.make_jaxpr(link.update)(params, link.init(params), params))
    assert not any(word in text for word in ("tridiagonal", "svd", "eigh", "cholesky"))


def test_product_with_another_pull_and_another_multiplier():
    """λ · m_spectral · 2 · clip(w): one call, against NumPy."""
    flat = weights()
    params = nest({p: jnp.asarray(x) for p, x in flat.items()})
    link = spectral_alpha_decay(
        0.3,
        pull=optax_decay.pulls.huber(threshold=0.4),
        multiplier=optax_decay.multipliers.constant(2.0),
        cautious=True,
        **SMALL,
    )
    grads = nest({p: jnp.asarray(x) for p, x in gradients()[0].items()})
    updates, state = link.update(grads, link.init(params), params)
    factor = by_name(state_of(state).multiplier)
    scores = np.array([reference_spectra.metric(separate(flat)[n], "alpha") for n in NAMES])
    np.testing.assert_allclose(
        [factor[n] for n in NAMES], reference.assign(scores, "linear", 2 / 3, 3.0, None), rtol=1e-4
    )
    got, u = separate(unnest(updates)), separate(gradients()[0])
    for name, w in separate(flat).items():
        pull = 0.3 * factor.get(name, 1.0) * 2.0 * np.clip(w, -0.4, 0.4)
        expected = u[name] + np.where(u[name] * w >= 0, pull, 0)
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)


def test_the_matrix_product_method_carries_its_centre():
    flat = weights()
    options = {**SMALL, "score": spectra.hill(method=spectra.matrix_products())}
    link = spectral_alpha_decay(2.0, refresh=spectra.every(EVERY), **options)
    history = run(chain(link, False), flat, gradients())
    state = history[-1][1]
    assert all(np.all(np.asarray(c) != np.log(0.5)) for c in state.centre.values())
    assert any(np.any(np.asarray(e) > 0) for e in state.error.values())
    exact = {n: reference_spectra.metric(separate(history[-2][0])[n], "alpha") for n in NAMES}
    got = by_name(state.score)
    # Twelve eigenvalues: one of them is worth this much, see test_chebyshev.
    errors = [abs(got[n] - exact[n]) / (exact[n] - 1) for n in NAMES]
    assert np.median(errors) < 0.15
    assert 0 <= int(state.unresolved) <= len(NAMES)


def test_signatures_show_every_option_with_its_default():
    """Defaults are written once, in the settings; help, editors and inject_hyperparams see them everywhere."""
    settings = {f.name: f.default for f in dataclasses.fields(SpectralSettings)}
    of_alpha = inspect.signature(spectral_alpha).parameters
    assert {name: p.default for name, p in of_alpha.items()} == settings
    of_decay = inspect.signature(spectral_alpha_decay).parameters
    shared = inspect.signature(optax_decay.decay).parameters
    assert set(of_decay) == set(settings) | set(shared)
    assert {name: of_decay[name].default for name in settings} == settings
    of_refresh = inspect.signature(optax_decay.spectral_refresh).parameters
    assert {name: p.default for name, p in of_refresh.items()} == {
        "axes": None,
        **{name: settings[name] for name in ("score", "assignment", "select")},
    }
    with pytest.raises(TypeError, match="refresh_every"):
        spectral_alpha_decay(0.1, refresh_every=5)


def test_scores_compare_by_value():
    assert spectra.hill() == spectra.hill(spectra.median(2.0))
    assert len({spectra.hill(), spectra.hill(), spectra.hill(method="svd")}) == 2
    assert spectra.matrix_products(jnp.bfloat16) == spectra.matrix_products("bfloat16")


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: spectral_alpha(score="alphahats"), ["'alphahats'", "spectra.alphahat()"]),
        (lambda: spectral_alpha(score=spectra.entropy), ["mean optax_decay.spectra.entropy()"]),
        (lambda: spectral_alpha(score="alpha"), ["mean optax_decay.spectra.hill()"]),
        (lambda: spectral_alpha(assignment="tb_linear_map"), ["spectra.linear()"]),
        (lambda: spectral_alpha(refresh="every"), ["spectra.every()"]),
        (lambda: spectral_alpha(refresh=500), ["refresh=500", "spectra.every(500)"]),
        (lambda: spectral_alpha(select="referenc"), ["spectra.reference_matrices()"]),
        (lambda: spectra.linear(-0.1), ["low=-0.1", "[0, inf)"]),
        (lambda: spectra.linear(0.1, -0.1), ["high=-0.1", "[0, inf)"]),
        (lambda: spectra.every(0), ["steps=0", "[1, inf)", "1"]),
        (lambda: spectra.all_at_once(0), ["steps=0", "[1, inf)", "1"]),
        (lambda: spectra.once(start_step=-1), ["start_step=-1"]),
        (lambda: spectra.linear(quantile_clip=0.5), ["[0, 0.5)"]),
        (lambda: spectra.sigmoid(0.0), ["sharpness=0.0", "(0, inf)"]),
        (lambda: spectra.stable_rank(spectra.matrix_products()), ["exact"]),
        (lambda: spectra.hill(method="matmul"), ["'matmul'", "exact"]),
        (lambda: spectra.every(5, at_once=0), ["at_once"]),
        (lambda: spectra.hidden_matrices(min_eigenvalues=0), ["min_eigenvalues=0"]),
        (lambda: spectra.matrices("hidden"), ["'hidden'", "hidden_matrices"]),
        (lambda: spectra.matrix_products(jnp.int8), ["int8", "bfloat16"]),
        (
            lambda: spectral_alpha(
                score=spectra.gradient_norm(), refresh=spectra.every(5, at_once=2)
            ),
            ["at_once=2", "all_at_once"],
        ),
        (lambda: spectral_alpha(param_specs={"w": "fsdp"}), ["'fsdp'", "jax.P"]),
    ],
)
def test_arguments_are_checked(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_inject_hyperparams_takes_the_public_factory():
    """The rate is injected; the values of AlphaDecay pass through untouched."""
    flat, grads = weights(), gradients()[:3]
    options = {**SMALL, "assignment": spectra.linear(0.5, 4.0)}
    injected = optax.inject_hyperparams(spectral_alpha_decay)(0.1, **options)
    plain = spectral_alpha_decay(0.1, **options)
    params = nest({p: jnp.asarray(x) for p, x in flat.items()})
    state, plain_state = injected.init(params), plain.init(params)
    assert set(state.hyperparams) == {"weight_decay"}
    for g in grads:
        g = nest({p: jnp.asarray(x) for p, x in g.items()})
        got, state = injected.update(g, state, params)
        want, plain_state = plain.update(g, plain_state, params)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            # One float32 rounding of the rate, times weights below 8 and multipliers up to 4.
            np.testing.assert_allclose(a, b, atol=0.1 * 8 * 4 * 2.0**-23)
    late = optax.inject_hyperparams(spectral_alpha_decay)(lambda count: 0.1 * count, **options)
    first, _ = late.update(g, late.init(params), params)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(g)))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(g)))


def test_numbers_may_be_traced_and_scheduled():
    flat, grads = weights(), gradients()

    def factory(min_ratio, max_ratio):
        link = spectral_alpha_decay(2.0, assignment=spectra.linear(min_ratio, max_ratio), **SMALL)
        return chain(link, False)

    injected = run(optax.inject_hyperparams(factory)(min_ratio=0.5, max_ratio=4.0), flat, grads)
    plain = run(factory(0.5, 4.0), flat, grads)
    for path in SHAPES:
        np.testing.assert_allclose(injected[-1][0][path], plain[-1][0][path], atol=5e-5)
    assert by_name(plain[-1][1].multiplier) != by_name(
        run(factory(0.5, 3.0), flat, grads)[-1][1].multiplier
    )
