"""What is seen of a run: sizes of weights, pictures, and the words of the display."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import colors, pyplot

import optax_decay
from optax_decay.parameters.axes import signatures
from tests.support import toy
from train import display
from train.run import figures
from train.step import observe


def test_sizes_of_weights_by_role_against_numpy():
    flat = toy.flat_params()
    params = toy.nest({path: jnp.asarray(w, jnp.float32) for path, w in flat.items()})
    described = signatures(toy.AXES, params)
    seen = jax.jit(lambda p: observe.weights(described, p))(params)
    for role in ("hidden", "embedding", "head", "vector"):
        paths = [path for path in flat if described[path].role == role]
        w = np.abs(np.concatenate([flat[path].reshape(-1) for path in paths]))
        expected = (np.sqrt(np.mean(w**2)), np.median(w), np.quantile(w, 0.99), w.max())
        found = [float(seen[role][name]) for name in ("rms", "median", "p99", "largest")]
        np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32 sums of 1000 squares


def test_a_large_role_is_sampled_evenly(monkeypatch):
    monkeypatch.setattr(observe, "SAMPLE", 500)
    w = np.random.default_rng(0).normal(size=(50, 900))
    described = signatures(((r"w", "D -> F"),), {"w": jnp.asarray(w)})
    seen = observe.weights(described, {"w": jnp.asarray(w)})["hidden"]
    # A median of 500 normal |w| has a standard error of 0.026.
    assert float(seen["median"]) == pytest.approx(np.median(np.abs(w)), abs=0.1)
    assert float(seen["largest"]) == pytest.approx(np.abs(w).max(), rel=1e-6)


def test_what_the_decay_did_against_numpy():
    flat = toy.flat_params()
    params = toy.nest({path: jnp.asarray(w, jnp.float32) for path, w in flat.items()})
    gradient = toy.nest({p: jnp.asarray(w, jnp.float32) for p, w in toy.flat_params(1).items()})
    tx = optax_decay.huber_decay(0.3, 0.5, mask="hidden", axes=toy.AXES, metrics=True)
    _, state = tx.update(gradient, tx.init(params), params)
    seen = observe.decay(signatures(toy.AXES, params), jax.device_get(state.metrics))
    w = np.concatenate([flat[path].reshape(-1) for path in toy.HIDDEN])
    u = np.concatenate([toy.flat_params(1)[path].reshape(-1) for path in toy.HIDDEN])
    hidden = seen["hidden"]
    assert hidden["weights"] == w.size and hidden["decaying"] == 1
    assert hidden["beyond"] == pytest.approx(np.mean(np.abs(w) > 0.5), rel=1e-6)
    pull = 0.3 * np.clip(w, -0.5, 0.5)
    assert hidden["decay_rms"] == pytest.approx(np.sqrt(np.mean(pull**2)), rel=1e-5)
    assert hidden["update_rms"] == pytest.approx(np.sqrt(np.mean(u**2)), rel=1e-5)
    assert seen["head"]["decaying"] == seen["head"]["decay_rms"] == 0


def records(steps: int) -> list[dict]:
    role = {"rms": 0.1, "median": 0.05, "p99": 0.2, "largest": 0.4, "weights": 9.0}
    done = {"decaying": 1.0, "beyond": 0.2, "decay_rms": 0.01, "update_rms": 0.5}
    still = {name: 0.0 for name in done}
    weights = {"hidden": role | done, "head": role | done, "vector": role | still}
    train = [
        {"kind": "train", "step": n + 1, "loss": 5 - n / 9, "learning_rate": 1e-3}
        for n in range(steps)
    ]
    held_out = [{"kind": "held_out", "step": n, "loss": 5.0} for n in range(0, steps + 1, 2)]
    return train + held_out + [{"kind": "weights", "step": n, **weights} for n in (0, steps)]


@pytest.mark.parametrize("steps", [1, 60])
def test_pictures_have_labels_with_units(tmp_path, monkeypatch, steps):
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    paths = figures.draw(records(steps), 4.2, "a run", tmp_path / "figures")
    assert [p.name for p in paths] == ["loss.png", "decay.png"]
    assert all(pyplot.imread(p).shape[0] > 500 for p in paths)
    loss, decay = kept
    labels = [axis.get_ylabel() for axis in loss.axes]
    assert labels == ["loss [nats per token]", "learning rate"]
    assert loss.axes[1].get_xlabel() == "step"
    assert any("4.20" in text.get_text() for text in loss.axes[0].texts)
    assert all(axis.get_ylabel() and axis.get_title(loc="left") for axis in decay.axes)
    assert all(axis.get_xlabel() == "step" for axis in decay.axes[2:])
    assert len(decay.axes[2].lines) == 2  # roles that decay


def test_a_run_of_no_steps_draws_what_there_is(tmp_path):
    only_start = [r for r in records(4) if r["step"] == 0]
    assert [p.name for p in figures.draw(only_start, 4.2, "a run", tmp_path)] == ["decay.png"]
    assert figures.draw([], 4.2, "a run", tmp_path) == []


def test_lines_differ_in_grey_and_in_dashes():
    def grey(style: dict) -> float:
        return float(np.dot(colors.to_rgb(style["color"]), (0.299, 0.587, 0.114)))

    greys = sorted(grey(style) for style in figures.STYLES.values())
    assert np.diff(greys).min() > 0.05
    assert len({style["linestyle"] for style in figures.STYLES.values()}) == len(figures.STYLES)


def test_smoothing_keeps_constants_and_averages_the_rest():
    np.testing.assert_allclose(figures.smooth(np.full(7, 3.0), 4), 3.0)
    found = figures.smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3)
    np.testing.assert_allclose(found, [1.5, 3.0, 3.0, 3.0])


def test_words_of_the_display():
    assert display.clock(59.6) == "1:00" and display.clock(3725) == "1:02:05"
    assert display.pace(30, 2048, "tokens", 0.5) == "  4.1k tokens/s  0:15 left"
    assert display.pace(30, 100, "images", 2.0) == "  50 images/s  1:00 left"
    assert display.pace(30, 100, "tokens", None) == ""


def test_lines_are_about_twenty_over_a_run(capsys, monkeypatch):
    said = []
    monkeypatch.setattr(display, "say", said.append)
    lines = display.Lines(100, 900, "tokens")
    for step in range(101, 901):
        lines.step(step, 1.0, 10, 0.1)
    assert 20 <= len(said) <= 22 and said[-1].startswith("step 900/900")
