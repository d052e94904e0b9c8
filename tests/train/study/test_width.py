"""The width experiment: what it concludes from known losses, its runs, resume, and the coordinate check."""

import dataclasses
import functools
import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_decay
from models import gpt, llama
from tests.support.runs import flags as run_flags
from tests.support.runs import records, write_text
from train import main
from train.config.fields import UserError
from train.data import batches
from train.step import optimizer
from train.step.update import loss as language_loss
from train.study import coordinate_check, gains
from train.study.width import analysis, figures
from train.study.width import main as width
from train.study.width.runs import model, proxy, run_group

ETAS = [0.002, 0.004, 0.008, 0.016, 0.032]
LAMBDAS = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0]


def planted(parametrisation, width_, eta, lam, noise=0.0, seeds=3):
    """Records of a sweep at one width whose loss is a tilted paraboloid in (log2 η, log2 λ_i)."""
    rng = np.random.default_rng(width_)
    records = []
    for e in ETAS:
        for k in LAMBDAS:
            for seed in range(seeds):
                x, y = math.log2(e / eta), math.log2(k / lam)
                loss = 2.0 + 0.05 * x * x + 0.02 * y * y + 0.01 * x * y
                records.append(
                    {
                        "parametrisation": parametrisation,
                        "width": width_,
                        "learning_rate": e,
                        "weight_decay": k,
                        "seed": seed,
                        "loss": loss + noise * rng.standard_normal(),
                        "top": {"up": 3.0 * width_ ** (0.8 - 0.5)},
                    }
                )
    return records


def test_the_optimum_of_a_known_surface_is_found_between_the_points_of_the_grid():
    (surface,) = analysis.surfaces(planted("mup", 32, 0.0093, 1.3), "constant", 32)
    best = analysis.optimum(surface)
    assert best.learning_rate == pytest.approx(0.0093, rel=1e-6)
    assert best.weight_decay == pytest.approx(1.3, rel=1e-6)
    assert best.inside
    assert best.rate_error == pytest.approx(0, abs=1e-6)
    edge = analysis.surfaces(planted("mup", 32, 0.0093, 30.0), "constant", 32)[0]
    assert not analysis.optimum(edge).inside
    assert analysis.optimum(edge).weight_decay <= LAMBDAS[-1]


def test_the_error_of_an_optimum_is_that_of_its_noise():
    """Deviation of the fitted log2 η over fresh noise, against the one claimed from resampled seeds."""
    found = []
    for i in range(40):
        records = planted("mup", 100 + i, 0.0093, 1.3, noise=0.01, seeds=5)
        surface = analysis.surfaces(records, "constant", 100 + i)[0]
        found.append(analysis.optimum(surface))
    actual = np.std([math.log2(best.learning_rate) for best in found])
    claimed = np.sqrt(np.mean([best.rate_error**2 for best in found]))
    # Resampling n of n gives the deviation times sqrt((n-1)/n), n = 5; 40 draws know it to 11 %.
    assert 0.6 * actual < claimed < 1.4 * actual
    assert actual > 0.003


def test_rules_are_readings_of_the_same_runs():
    """A planted optimum with λ_i ∝ m^½ stays put under fan2025 and moves by known amounts under the others."""
    records = planted("mup", 32, 0.008, 1.0) + planted("mup", 128, 0.008, 2.0)
    records += planted("standard", 32, 0.008, 1.0) + planted("standard", 128, 0.0025, 1.2)
    shifts = {rule: analysis.transfer(records, rule, 32) for rule in analysis.RULES}
    for rule, want in (("fan2025", 0.0), ("constant", 1.0), ("mup_package", -1.0)):
        assert shifts[rule].decay_shift == pytest.approx(want, abs=1e-6)
        assert shifts[rule].rate_shift == pytest.approx(0, abs=1e-6)
    adamw = shifts["adamw"]
    assert adamw.rate_shift == pytest.approx(math.log2(0.0025 / 0.008), abs=1e-6)
    assert adamw.decay_shift == pytest.approx(math.log2(1.2), abs=1e-6)
    # The proxy's best point of the grid is its optimum here; what it costs at the target:
    assert shifts["fan2025"].cost == pytest.approx(0, abs=1e-9)
    assert shifts["constant"].cost == pytest.approx(0.02, abs=1e-9)
    x = math.log2(0.008 / 0.0025)
    y = math.log2(1 / 1.2)
    loss = 2 + 0.05 * x * x + 0.02 * y * y + 0.01 * x * y
    assert adamw.transferred == pytest.approx(loss, abs=1e-9)


def test_diverged_runs_do_not_bend_the_fit():
    records = planted("mup", 32, 0.0093, 1.3)
    for record in records:
        if record["learning_rate"] == ETAS[-1]:
            record["loss"] = math.inf
    (surface,) = analysis.surfaces(records, "constant", 32)
    best = analysis.optimum(surface)
    assert best.learning_rate == pytest.approx(0.0093, rel=1e-6)


def test_an_unfinished_width_is_left_out():
    records = planted("mup", 32, 0.01, 1.0) + planted("mup", 64, 0.01, 1.0)[:-1]
    assert [s.width for s in analysis.surfaces(records, "fan2025", 32)] == [32]
    assert analysis.transfer(records, "fan2025", 32) is None


def test_exponents_of_spectra():
    records = planted("mup", 32, 0.01, 1.0) + planted("mup", 128, 0.01, 1.0)
    found = analysis.spectral_exponents(records, 0.008, 1.0)
    assert found["up"][0] == pytest.approx(0.8, abs=1e-9)


def test_a_picture_of_a_sweep_is_drawn_also_before_it_is_complete(tmp_path):
    records = planted("mup", 32, 0.01, 1.0) + planted("mup", 64, 0.01, 1.0)
    for some in ([], records[:7], records):
        path = figures.draw(some, 32, tmp_path / "width.png")
        assert path.stat().st_size > 10_000


TINY = proxy(8, 8, layers=1, length=12, batch_size=2, eval_batches=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(write_text(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def data(text):
    return batches.load_text(text, "bytes", length=12, batch_size=2, seed=0)


def test_runs_side_by_side_are_runs_alone(data):
    """One of the runs again: by itself, with `mup_adamw` at the default rule and the proxy's λ."""
    records = run_group(TINY, 25, data, "mup", 16, 0.02, [0.5, 3.0], [0, 7])
    assert [(r["seed"], r["weight_decay"]) for r in records] == [
        (0, 0.5), (0, 3.0), (7, 0.5), (7, 3.0),
    ]  # fmt: skip
    config = model(TINY, 16, data.vocab_size, "mup")
    assert config.base_width == 8
    climb = round(0.1 * 25)

    def schedule(count):
        return 0.02 * jnp.minimum(1, jnp.minimum((count + 1) / climb, (25 - count) / (25 - climb)))

    tx = optax.chain(
        optimizer.clip(1.0),
        optax_decay.mup_adamw(
            *(schedule, 8),
            b2=0.95,
            weight_decay=3.0 / math.sqrt(2),  # √m less than λ of the matrices, with m = 2
            axes=llama.axes(config),
        ),
    )
    forward = functools.partial(llama.forward, config)
    params = llama.init(config, jax.random.key(7))
    state = tx.init(params)

    @jax.jit
    def update(params, state, tokens):
        gradient = jax.grad(lambda p: language_loss(forward, p, tokens))(params)
        change, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, change), state

    source = dataclasses.replace(data, seed=7)
    for i in range(25):
        params, state = update(params, state, source.batch(i))
    alone = np.mean([language_loss(forward, params, batch) for batch in data.held_out(2)])
    # The same float32 arithmetic up to fusion and batching; 25 steps amplify roundings little.
    assert records[3]["loss"] == pytest.approx(alone, abs=1e-4)
    assert abs(records[3]["loss"] - records[2]["loss"]) > 1e-3
    tops, _ = optax_decay.spectra.top_singular_values(
        params, exact_below=100, roles=("hidden",), axes=llama.axes(config)
    )
    for path, value in tops.items():
        assert records[3]["top"][path] == pytest.approx(float(value[0]), rel=0.05)


def flags(text, folder):
    asked = (
        "quick --seeds 1 --widths 8 --learning_rates 0.01 0.04 --weight_decays 0.5 1"
        " --task.width 8 --task.heads 1 --task.mlp_width 24 --task.layers 1 --steps 3"
        " --task.length 12 --task.batch_size 2 --task.eval_batches 2"
    )
    return [*asked.split(), "--text", text, "--folder", str(folder)]


def test_a_stopped_sweep_goes_on(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert width.main(flags(text, whole)) == 0
    said = capsys.readouterr().out
    assert "loss there" in said
    assert (whole / "width.png").exists() and (whole / "summary.txt").read_text().strip() in said
    lines = (whole / "results.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 2 * 2  # parametrisations, learning rates, decays
    starts = json.loads((whole / "environment.json").read_text())
    assert len(starts[0]["text"]["digest"]) == 64

    # Killed while it wrote its fourth line, then asked to stop in its next group.
    stopped.mkdir()
    (stopped / "results.jsonl").write_text("\n".join(lines[:3]) + "\n" + lines[3][:30])
    trained = []
    plain = width.run_group

    def interrupted(*arguments):
        trained.append(len(arguments[6]))
        if len(trained) == 1:
            signal.raise_signal(signal.SIGINT)
        return plain(*arguments)

    monkeypatch.setattr(width, "run_group", interrupted)
    assert width.main(flags(text, stopped)) == 128 + signal.SIGINT
    assert width.main(flags(text, stopped)) == 0
    assert trained == [1, 2, 2]  # the rest of the second group, then the other groups
    again = (stopped / "results.jsonl").read_text().splitlines()
    for one, other in zip(map(json.loads, lines), map(json.loads, again), strict=True):
        # A group of other runs rounds differently.
        assert one.pop("loss") == pytest.approx(other.pop("loss"), abs=1e-5)
        assert one.pop("training_loss") == pytest.approx(other.pop("training_loss"), abs=1e-5)
        assert len(one.pop("check")) == len(other.pop("check")) == 8  # of the digits
        assert one.pop("top") == pytest.approx(other.pop("top"), rel=1e-4)
        assert one == other

    with pytest.raises(UserError, match="holds another sweep: seeds"):
        width.main([*flags(text, stopped), "--seeds", "2"])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["fast"], "nearest: "),
        (["--widths", "32", "40"], "width 40 is not a multiple .* nearest: 32"),
        (["--widths", "64", "128"], "task.width = 32 .* nearest: 64"),
        (["--learning_rates", "0.1", "-0.1"], "learning_rates"),
        (["--seeds", "0"], "seeds = 0"),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_refused(asked, said):
    with pytest.raises(UserError, match=said):
        width.parse(asked)


def test_the_sweeps_are_what_their_texts_say():
    for make, runs in ((width.cpu, 648), (width.h200, 756)):
        sweep = make()
        width.check(sweep)
        grid = len(sweep.learning_rates) * len(sweep.weight_decays) * sweep.seeds
        assert 2 * len(sweep.widths) * grid == runs
        assert str(runs) in (make.__doc__ or "")
        assert max(sweep.widths) == 4 * min(sweep.widths) == 4 * sweep.task.width


@pytest.fixture(scope="module")
def checked(data):
    """Sizes of activations at two widths, under both parametrisations."""
    task = proxy(16, 8, layers=1, length=12, batch_size=2, eval_batches=2, init_std=0.2)
    source = dataclasses.replace(data, batch_size=16)
    batches = [source.batch(i) for i in range(4)]
    return {
        parametrisation: coordinate_check.sizes_by_width(
            *(task, parametrisation, (16, 64), batches, data.vocab_size),
            learning_rate=0.03,
            seeds=range(3),
        )
        for parametrisation in ("standard", "mup")
    }


def test_activations_keep_their_size_under_mup_only(checked):
    mup = coordinate_check.slopes(checked["mup"], 4)
    standard = coordinate_check.slopes(checked["standard"], 4)
    for name in ("attention", "mlp", "residual", "Δ attention", "Δ mlp", "Δ residual", "Δ logits"):
        assert abs(mup[name]) < 0.25, name
    for name in ("mlp", "residual", "Δ mlp", "Δ residual"):
        assert standard[name] > 0.6, name
    start = coordinate_check.slopes(checked["mup"], 0)
    assert start["logits"] == pytest.approx(-0.5, abs=0.15)
    assert math.isnan(start["Δ mlp"])


def test_the_picture_of_a_coordinate_check(checked, tmp_path):
    path = coordinate_check.draw(checked, 4, tmp_path / "folder" / "picture.png")
    assert path.stat().st_size > 10_000


def test_activations_lead_to_the_logits_of_the_model(data):
    config = model(TINY, 16, data.vocab_size, "mup")
    params = llama.init(config, jax.random.key(1))
    tokens = data.batch(0)[:, :-1]
    found = coordinate_check.activations(config, params, tokens)
    x = np.asarray(found["residual"], np.float64)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps)
    logits = 0.5 * x @ np.asarray(params["head"]["kernel"], np.float64)
    np.testing.assert_allclose(logits, found["logits"], rtol=1e-4, atol=1e-5)
    total = found["embedding"] + found["attention"].sum(0) + found["mlp"].sum(0)
    np.testing.assert_allclose(total, found["residual"], rtol=1e-4, atol=1e-5)
    assert found["mlp"].shape == (TINY.layers, *tokens.shape, 16)


def test_activations_of_a_gpt_lead_to_its_logits(data):
    task = dataclasses.replace(TINY, family="gpt")
    config = model(task, 16, data.vocab_size, "mup")
    assert isinstance(config, gpt.Config) and config.base_width == TINY.width < config.width
    params = gpt.init(config, jax.random.key(1))
    tokens = data.batch(0)[:, :-1]
    found = coordinate_check.activations(config, params, tokens)
    x = np.asarray(found["residual"], np.float64)
    x -= x.mean(axis=-1, keepdims=True)
    x /= np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_eps)
    logits = 0.5 * x @ np.asarray(params["embed"]["embedding"], np.float64).T
    np.testing.assert_allclose(logits, found["logits"], rtol=1e-4, atol=1e-5)
    total = found["embedding"] + found["attention"].sum(0) + found["mlp"].sum(0)
    np.testing.assert_allclose(total, found["residual"], rtol=1e-4, atol=1e-5)


def test_the_coordinate_check_of_a_gpt(data):
    task = proxy(16, 8, family="gpt", layers=1, length=12, batch_size=2, init_std=0.2)
    source = dataclasses.replace(data, batch_size=16)
    found = {
        parametrisation: coordinate_check.sizes_by_width(
            *(task, parametrisation, (16, 64), [source.batch(0)] * 3, data.vocab_size),
            learning_rate=0.03,
        )
        for parametrisation in ("standard", "mup")
    }
    powers = {name: coordinate_check.slopes(records, 3) for name, records in found.items()}
    for name in ("Δ attention", "Δ mlp", "Δ residual"):
        assert powers["standard"][name] > powers["mup"][name] + 0.3, name


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Folders of a run of width 32 and of its proxy of width 16, six steps each."""
    folder = tmp_path_factory.mktemp("runs")
    base = ["--width.base", "16", "--optimizer.learning_rate", "0.01"]
    found = []
    for name, size, heads in (("proxy", 16, 2), ("wide", 32, 4)):
        shape = ["--model.width", str(size), "--model.heads", str(heads), "--model.kv_heads", "1"]
        shape += ["--model.mlp_width", str(3 * size), "--run.folder", str(folder / name)]
        assert main.main(run_flags(folder, *base, *shape)) == 0
        found.append(folder / name)
    return found


def test_a_run_with_a_base_width_says_so_and_logs_its_gains(two_runs):
    _, wide = two_runs
    table = (wide / "decay.txt").read_text()
    assert "×2" in table and "0.005" in table  # width factor, and η/m
    seen = [r for r in records(wide) if r["kind"] == "gains"]
    assert [r["step"] for r in seen] == [0, 2, 4, 6]
    last = seen[-1]
    assert len(last["matrix"]) == 7 * 2 and len(last["sublayer"]) == 2 * 2
    config, _, params, done, _ = gains.load_trained(wide)
    assert (done, config.model.width) == (6, 32)
    for layer in range(2):
        found = {
            name: np.linalg.svd(
                np.asarray(params["blocks"]["mlp"][name]["kernel"][layer]), compute_uv=False
            )[0]
            for name in ("up", "down")
        }
        for name, value in found.items():
            logged = last["matrix"][f"mlp/{name}/{layer}"]
            # Four looks of eight iterations: log(n)/k of the gap-free bound is 0.14.
            assert 0.86 * value < logged < 1.0001 * value
        product = last["matrix"][f"mlp/up/{layer}"] * last["matrix"][f"mlp/down/{layer}"]
        assert last["sublayer"][f"mlp/{layer}"] == pytest.approx(product, rel=1e-5)


def test_two_run_folders_are_compared(two_runs, tmp_path, capsys):
    proxy, wide = two_runs
    code = gains.main([str(wide), str(proxy), "--tolerance", "0.9"])
    said = capsys.readouterr().out
    assert code == 0 and "passed: largest singular values within 90 %" in said
    assert "sublayer attention" in said and "not a transfer" not in said
    assert (wide / "gains.txt").read_text().strip() in said
    assert gains.main([str(wide), str(proxy), "--tolerance", "1e-6"]) == 1
    with pytest.raises(UserError, match=r"width.base of .* is 16, but .* has the width 32"):
        gains.compare(wide, wide, 0.15)
    with pytest.raises(UserError, match="holds no config"):
        gains.load_trained(tmp_path)
