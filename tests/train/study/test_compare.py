"""The comparison: its search, its runs, what it concludes from known losses, its controls, and its resumption."""

import dataclasses
import functools
import json
import math
import shutil
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import llama
from tests.support.runs import write_text
from train.config.fields import UserError
from train.data import batches
from train.step.update import loss as language_loss
from train.study import results
from train.study.compare import figures, runs, verdicts
from train.study.compare import main as compare
from train.study.compare.arms import ARMS, B1, B2, CONTROLS, quasi_hyperbolic
from train.study.compare.points import POINTS
from train.study.compare.tuning import FIRST_SEED, means, next_trials, tuned
from train.study.small_runs import WORKER, Setting, SmallTask, compiled, numbers

TINY = SmallTask(
    width=16, mlp_width=24, layers=1, heads=2, length=12, batch_size=4, eval_batches=2, chunk=4
)
RATES, DECAYS = (0.004, 0.008, 0.016), (0.0, 0.5, 2.0)


def search(loss, budget, rates=RATES, decays=DECAYS):
    """All trials of a search for the minimum of a known loss (η, λ, seed)."""
    trials = []
    while new := next_trials(rates, decays, trials, budget):
        trials += [t | {"loss": loss(*t.values())} for t in new]
        assert len(trials) <= budget
    return trials


def valley(eta, lam, noise=0.0):
    """A loss with its minimum at a point; no decay lies two doublings below the smallest decay."""

    def loss(e, k, seed):
        x, y = math.log2(e / eta), math.log2(max(k, 0.125) / lam)
        random = np.random.default_rng([seed, round(1e6 * e), round(1e6 * k)])
        return 2 + 0.05 * x * x + 0.02 * y * y + noise * random.standard_normal()

    return loss


@pytest.mark.parametrize(
    ("eta", "lam", "point"),
    [
        (0.009, 0.6, (0.008, 0.5)),  # inside the grid
        (0.031, 0.5, (0.032, 0.5)),  # beyond its edges
        (0.0011, 0.5, (0.001, 0.5)),
        (0.008, 9.0, (0.008, 8.0)),
        (0.008, 0.02, (0.008, 0.0)),  # no decay: not an edge
    ],
)
def test_a_search_ends_inside_its_grid(eta, lam, point):
    trials = search(valley(eta, lam), 24)
    found = tuned(trials)
    assert (found.learning_rate, found.weight_decay) == point
    assert found.edges == "" and found.trials == 24
    assert min(t["seed"] for t in trials) == FIRST_SEED


def test_every_search_takes_the_same_number_of_trials():
    for budget in (9, 12, 15):
        for arm in ("adamw", "none", "exadam_v1"):
            grid = ARMS[arm].learning_rates, ARMS[arm].weight_decays
            assert len(search(valley(0.3, 0.5), budget, *grid)) == budget
    assert tuned(search(valley(0.3, 0.5), 12)).edges == "η"
    assert tuned(search(valley(0.3, 99.0), 9)).edges == "ηλ"
    assert tuned(search(valley(0.3, 0.5), 5, RATES, (0.0,))).edges == "η"


def test_trials_that_are_left_go_to_the_best_points():
    trials = search(valley(0.008, 0.5, noise=0.01), 20)
    seeds = {point: n for point, (_, n) in means(trials).items()}
    assert seeds[0.008, 0.5] > 2 and sum(n > 1 for n in seeds.values()) <= 5
    assert len({(t["learning_rate"], t["weight_decay"], t["seed"]) for t in trials}) == 20


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def data(text):
    return batches.load_text(str(text), "bytes", length=12, batch_size=4, seed=0)


def test_a_run_is_adamw_by_hand(data):
    numbers = {"learning_rate": 0.02, "weight_decay": 3.0, "steps": 12}
    found = runs.run(TINY, data, "adamw", **numbers, seed=7)
    config = llama.Config(
        vocab_size=257, width=16, mlp_width=24, layers=1, heads=2, init_std=TINY.init_std
    )
    params = llama.init(config, jax.random.key(7))
    decayed = jax.tree_util.tree_map_with_path(
        lambda key, w: "kernel" in jax.tree_util.keystr(key), params
    )

    def rate(count):
        return 0.02 * jnp.minimum(1, jnp.minimum(count + 1, (12 - count) / 11))

    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.95, weight_decay=3.0, mask=decayed),
    )
    loss = jax.jit(functools.partial(language_loss, functools.partial(llama.forward, config)))

    @jax.jit
    def update(params, state, tokens):
        value, gradient = jax.value_and_grad(loss)(params, tokens)
        change, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, change), state, value

    state, source, curve = tx.init(params), dataclasses.replace(data, seed=7), []
    for i in range(12):
        params, state, value = update(params, state, source.batch(i))
        curve.append(float(value))
    # Float32 with another order of summation; 12 steps amplify roundings little. Curves have 4 digits.
    final = np.mean([loss(params, batch) for batch in data.held_out(2)])
    assert found["loss"] == pytest.approx(final, abs=1e-4)
    np.testing.assert_allclose(found["curve"], curve, atol=2e-4)
    other = runs.run(TINY, data, "adamw", **(numbers | {"weight_decay": 0.0}), seed=7)
    assert abs(other["loss"] - found["loss"]) > 1e-3
    again = runs.run(TINY, data, "again", **numbers, seed=8)
    assert abs(again["loss"] - found["loss"]) > 1e-3


def test_a_run_that_diverges_is_infinitely_bad(data):
    numbers = {"learning_rate": math.inf, "weight_decay": 0.0, "steps": 4, "seed": 0}
    found = runs.run(TINY, data, "adamw", **numbers)
    assert found["loss"] == math.inf
    assert json.loads(json.dumps(found)) == found


AXES = (("head", "D -> V"), ("blocks", "L | D -> F"))


def test_the_quasi_hyperbolic_baseline():
    """Against its equation in float64: arXiv 1810.06801 with ν₁ = ½, ν₂ = 1."""
    setting: Any = None
    tx, random = quasi_hyperbolic(setting), np.random.default_rng(0)
    state = tx.init({"w": jnp.zeros(3)})
    m = v = np.zeros(3)
    for t in range(1, 6):
        g = random.normal(size=3)
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        root = np.sqrt(v / (1 - B2**t)) + 1e-8
        update, state = tx.update({"w": jnp.asarray(g, jnp.float32)}, state)
        # Six roundings of float32 each, of numbers up to 4.
        np.testing.assert_allclose(update["w"], (m / (1 - B1**t) + g) / 2 / root, atol=2e-6)
        assert np.abs(m / (1 - B1**t) - g).max() > 0.1 or t == 1


def test_all_arms_have_their_own_rule():
    """Chains of all arms are traced (not compiled); only AdamW again and no decay share AdamW's."""
    shapes = {"head": (52, 9), "blocks": (2, 52, 56)}  # large enough for spectra to be measured
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}

    def one_update(arm, eta, lam, steps, gradients):
        setting = Setting(lambda count: eta / (count + 1), eta, lam, steps, AXES, 52)
        tx = optax.with_extra_args_support(ARMS[arm].build(setting))
        looks = {"gradients": gradients, "hessian_fn": lambda params, key: gradients}
        return tx.update(gradients, tx.init(params), params, **looks)[0]

    programs = {}
    for arm, row in ARMS.items():
        function = functools.partial(one_update, arm)
        gradients = params
        if row.workers > 1:
            gradients = {name: jnp.ones((row.workers, *w.shape)) for name, w in params.items()}
            axes = (None, None, None, 0)
            function = jax.vmap(function, in_axes=axes, axis_name=WORKER)
        program = jax.make_jaxpr(function)(0.01, 0.3, 50, gradients)
        programs[arm] = str(program)
        # η and λ are arguments that the program reads, not constants in it.
        used = {str(v) for equation in program.eqns for v in equation.invars}
        assert {str(v) for v in program.jaxpr.invars[:2]} <= used, arm
    same = {arm for arm, program in programs.items() if program == programs["adamw"]}
    assert same == {"adamw", "again", "none"}
    assert len(set(programs.values())) == len(ARMS) - 2


def test_workers_of_one_bit_adam_agree(data):
    """After the variance froze, all simulated workers have the same weights, and other gradients each."""
    small = compiled(runs.program(TINY, "one_bit_adam", data.vocab_size))
    own = numbers(0.01, 0.3, 12, 0)
    state = small.init(own)
    tokens = jnp.asarray(np.stack([data.batch(i) for i in range(4)]))
    state, _ = small.advance(state, own, tokens)
    for leaf in jax.tree.leaves(state["params"]):
        assert leaf.shape[0] == ARMS["one_bit_adam"].workers > 1
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    errors = state["optimizer"][1][0].worker_error
    assert all(np.abs(e[0] - e[1]).max() > 0 for e in jax.tree.leaves(errors))


SLOPE = {"adamw": 1.0, "again": 1.0, "muon": 1.45, "huber": 1.0, "conda": 1.3, "none": 0.75}


def planted(task, data, arm, *, learning_rate, weight_decay, steps, seed, speed=None):
    """A run whose loss is known: `speed` times as many steps of AdamW, less well away from the best point."""
    random = np.random.default_rng([seed, steps])
    loss = (
        2.4
        - 0.19 * math.log((speed or SLOPE)[arm] * steps / 400)
        + 0.006 * random.standard_normal()
    )
    loss += 0.03 * math.log2(learning_rate / 0.008) ** 2
    return {"loss": loss, "curve": [loss + 1, loss + 0.5, loss], "seconds": 0.01}


def fake_cost(task, data, arm, point):
    times = {"seconds_per_step": 0.012, "adamw_seconds_per_step": 0.01, "ratios": [1.31, 1.17]}
    return times | {"clock": "CPU"}


def flags(text, folder, *more):
    asked = "cpu --arms huber conda none --trials 12 --task.length 12 --task.batch_size 4 --texts"
    return [*asked.split(), str(text), *more, "--folder", str(folder)]


@pytest.fixture
def without_training(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "run", planted)
    monkeypatch.setattr(compare, "cost", fake_cost)
    grid = ((0.004, 0.008, 0.016), (0.0, 0.5, 2.0))
    for name in ("conda", "none"):  # so that the same planted valley is inside
        row = dataclasses.replace(ARMS[name], learning_rates=grid[0])
        monkeypatch.setitem(ARMS, name, row)


def test_a_report_with_both_controls(without_training, text, tmp_path, capsys):
    assert compare.main(flags(text, tmp_path / "run")) == 0
    page = (tmp_path / "run" / "report.md").read_text()
    assert "VOID" not in page and "Both controls hold" in page
    rows = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    assert "| faster |" in rows["Conda"] and "| slower |" in rows["no decay"]
    assert "| not resolved |" in rows["Huber (AdamHD)"]
    assert "| 1.20 (1.17 to 1.31) |" in page
    for name in ("speedup", "curves", "ladder", "cost"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 8000
    lines = [json.loads(l) for l in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    trials = [r for r in lines if r["stage"] == "trial"]
    per_arm = {arm: sum(r["arm"] == arm for r in trials) for arm in SLOPE}
    assert per_arm == {"adamw": 12, "again": 0, "muon": 12, "huber": 12, "conda": 12, "none": 12}
    counted = {r["seed"] for r in lines if r["stage"] == "result"}
    assert counted.isdisjoint(r["seed"] for r in trials)
    assert len(counted) == sum(r["stage"] == "result" for r in lines) == 5 * 6 + 5 * 6
    again = [r for r in lines if r["arm"] == "again"]
    adamw = [r for r in lines if r["arm"] == "adamw" and r["stage"] == "result"]
    assert {r["learning_rate"] for r in again} == {adamw[0]["learning_rate"]}
    assert "left" in capsys.readouterr().out


@pytest.fixture
def without_pictures(monkeypatch):
    for name in ("speedups", "curves", "ladders", "costs"):
        monkeypatch.setattr(figures, name, lambda *arguments: False)


@pytest.mark.parametrize(
    ("broken", "said"),
    [({"again": 1.3}, "against itself"), ({"muon": 1.02}, "Muon has the speed-up")],
)
def test_a_broken_control_voids_the_report(
    without_training, without_pictures, monkeypatch, text, tmp_path, broken, said
):
    """The same losses of all other arms; only the control is another."""
    monkeypatch.setattr(compare, "run", functools.partial(planted, speed=SLOPE | broken))
    assert compare.main(flags(text, tmp_path / "run")) == 1
    page = (tmp_path / "run" / "report.md").read_text()
    assert page.splitlines()[2].startswith("**VOID") and said in page
    assert "Both controls hold" not in page


def test_a_stopped_comparison_goes_on(
    without_training, without_pictures, monkeypatch, text, tmp_path
):
    assert compare.main(flags(text, tmp_path / "whole")) == 0
    whole = (tmp_path / "whole" / "results.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    # Killed while it wrote a line in the middle of a search, then asked to stop.
    folder = tmp_path / "stopped"
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(lines[:10]) + lines[10][:30])
    ran = []

    def interrupted(*arguments, **numbers):
        ran.append(numbers)
        if len(ran) == 30:
            signal.raise_signal(signal.SIGINT)
        return planted(*arguments, **numbers)

    monkeypatch.setattr(compare, "run", interrupted)
    assert compare.main(flags(text, folder)) == 128 + signal.SIGINT
    assert (folder / "report.md").read_text().splitlines()[2].startswith("**VOID")
    assert len(ran) == 30
    assert compare.main(flags(text, folder)) == 0
    assert (folder / "results.jsonl").read_text() == whole
    assert len(json.loads((folder / "environment.json").read_text())) == 2
    with pytest.raises(UserError, match="holds another comparison: seeds"):
        compare.main(flags(text, folder, "--seeds", "3"))


def test_only_what_was_run_for_it_gets_into_a_report(
    without_training, without_pictures, monkeypatch, text, tmp_path, capsys
):
    """Lines that are twice, of another seed, of another point or changed; all others are not run again."""
    assert compare.main(flags(text, tmp_path / "whole")) == 0
    whole = results.read(tmp_path / "whole" / "results.jsonl")
    page = (tmp_path / "whole" / "report.md").read_text()
    last = next(i for i, r in enumerate(whole) if r["arm"] == "huber" and r["stage"] == "result")
    assert whole[last]["learning_rate"] != 0.3 and whole[last]["seed"] != 77
    folder, ran = tmp_path / "other", []

    def counted(*arguments, **numbers):
        ran.append(numbers)
        return planted(*arguments, **numbers)

    monkeypatch.setattr(compare, "run", counted)
    for changes in (
        {"seed": 77},
        {"learning_rate": 0.3},
        {"loss": "1.9"},
        {"steps": 600},
    ):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        ran.clear()
        more = [whole[last] | changes, *whole[last + 1 :], whole[0] | {"seconds": 9.0}]
        results.append(folder / "results.jsonl", [*whole[:last], *more])
        assert compare.main(flags(text, folder)) == 0
        assert len(ran) == 1 and ran[0]["seed"] == whole[last]["seed"]
        assert "2 lines of" in capsys.readouterr().out
        again = (folder / "report.md").read_text()
        assert again.split("## How")[0] == page.split("## How")[0]


def test_lines_that_are_not_as_they_were_written_are_told_and_kept(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    written = [
        {"arm": "huber", "loss": 2.5, "seed": seed, "curve": [math.inf]} for seed in range(5)
    ]
    results.append(path, written)
    lines = path.read_text().splitlines(keepends=True)
    assert results.read(path) == written and path.read_text() == "".join(lines)
    # A torn last line is what a kill leaves behind.
    path.write_text("".join(lines[:4]) + lines[4][:-20])
    assert results.read(path) == written[:4]
    assert not capsys.readouterr().out and len(list(tmp_path.iterdir())) == 1
    changed = "".join(
        [lines[0], lines[1].replace("2.5", "2.4"), lines[2][:20] + "\n", *lines[3:], lines[0]]
    )
    path.write_text(changed)
    assert results.read(path) == [written[0], *written[3:]]
    assert "3 of 6 lines cannot be read" in capsys.readouterr().out
    assert (tmp_path / "unreadable-results.jsonl").read_text() == changed
    assert results.read(path) == [written[0], *written[3:]]
    assert not capsys.readouterr().out
    # A line that has lost its check, or whose "check" was misspelled by a flipped bit, vouches for nothing.
    whole = lines[0]
    for changed in (json.dumps(written[0]) + "\n", whole.replace("check", "chesk")):
        path.write_text(changed)
        assert results.read(path) == []
        assert "1 of 1 lines cannot be read" in capsys.readouterr().out


def test_results_of_two_texts_are_not_mixed(without_training, without_pictures, text, tmp_path):
    folder, copy = tmp_path / "run", tmp_path / "text.txt"
    copy.write_bytes(text.read_bytes())
    assert compare.main(flags(copy, folder)) == 0
    copy.write_text(copy.read_text().replace("e", "E"))
    with pytest.raises(UserError, match="results of another text"):
        compare.main(flags(copy, folder))


def records(speed, texts=("one", "two"), seeds=6):
    """Results of a comparison with stored points."""
    found = []
    for k, text in enumerate(texts):
        for i, (arm, factor) in enumerate(speed.items()):
            budgets = (200, 300, 400, 600, 800) if arm == "adamw" else (400,)
            for steps in budgets:
                for seed in range(seeds):
                    numbers = {"learning_rate": 0.008, "weight_decay": 0.5, "steps": steps}
                    if factor == math.inf:
                        run = {"loss": math.inf if seed == 2 else 2.4, "curve": [math.inf] * 3}
                    else:
                        run = planted(
                            *(None, None, arm),
                            **numbers,
                            seed=seed + 100 * i + 9000 * k,
                            speed=speed,
                        )
                    found.append(
                        {"arm": arm, "text": text, "stage": "result", "seed": seed} | numbers | run
                    )
    return found


def test_a_claim_needs_every_text_and_every_run():
    both = records(SLOPE | {"sophia": math.inf})
    rows = verdicts.rows(both, 400)
    texts = ("one", "two")
    assert verdicts.void(rows, texts) == []
    assert verdicts.overall(rows, "conda", texts) == "faster"
    assert verdicts.overall(rows, "sophia", texts) == "diverged (1 of 6)"
    # On the second text, Conda is AdamW.
    mixed = records(SLOPE, ("one",)) + records(SLOPE | {"conda": 1.0}, ("two",))
    verdict = verdicts.overall(verdicts.rows(mixed, 400), "conda", texts)
    assert verdict == "not resolved (faster on one, not resolved on two)"
    one = verdicts.rows(records(SLOPE, ("one",)), 400)
    assert verdicts.overall(one, "conda", texts) == "not finished"
    assert len(verdicts.void(one, texts)) == 3  # no control on the second text
    table = {row.arm: row for row in one}
    assert table["conda"].not_inferior and table["huber"].not_inferior
    assert not table["none"].not_inferior  # 0.055 nats worse
    assert math.isnan(table["muon"].p) and 0 < table["conda"].p < 0.05


def test_nothing_is_said_of_an_arm_whose_search_ended_at_an_edge():
    found = records(SLOPE, ("one",))
    trial = {"arm": "conda", "text": "one", "stage": "trial", "steps": 200, "seed": FIRST_SEED}
    for rate, loss in ((0.004, 2.6), (0.008, 2.5), (0.016, 2.4)):
        found.append(trial | {"learning_rate": rate, "weight_decay": 0.5, "loss": loss})
    row = {row.arm: row for row in verdicts.rows(found, 400)}["conda"]
    assert row.speedup.low > 1 and row.verdict == "not tuned: η at the edge"
    edge = [r | {"arm": "muon"} if r["stage"] == "trial" else r for r in found]
    assert "ended at an edge" in verdicts.void(verdicts.rows(edge, 400), ("one",))[0]


def test_the_smoke_tier_smaller_still(monkeypatch, text, tmp_path):
    """Real runs of the real command, with stored points."""
    monkeypatch.chdir(tmp_path)
    stored = {arm: (0.01, 0.5) for arm in ("adamw", "muon", "none")}
    monkeypatch.setitem(POINTS, str(text), stored)
    task = {f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY)}
    small = [x for name, value in task.items() for x in (f"--task.{name}", str(value))]
    asked = "smoke --arms none --steps 8 --ladder 4 8 12 --seeds 2 --ladder_seeds 2 --trial_steps 4"
    code = compare.main([*asked.split(), *small, "--texts", str(text), "--folder", "run"])
    found = results.read(tmp_path / "run" / "results.jsonl")
    assert len(found) == 3 * 2 + 3 * 2 + 2  # the ladder, three arms, and the cost of two
    losses = {(r["arm"], r["seed"]): r["loss"] for r in found if r["stage"] == "result"}
    assert len(set(losses.values())) == len(losses) and all(map(math.isfinite, losses.values()))
    page = (tmp_path / "run" / "report.md").read_text()
    assert code == ("VOID" in page) and "| stored |" in page


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["fast"], "no tier 'fast'; .* nearest: "),
        (["cpu", "--arms", "hubr"], "'hubr' is not one of .* nearest: huber"),
        (["cpu", "--arms", "muon"], "'muon' is not one of"),
        (["cpu", "--steps", "410"], "410 steps are not a multiple of .* nearest: 400"),
        (["cpu", "--steps", "500"], "ladder = .* among them steps = 500"),
        (["cpu", "--seeds", "1"], "seeds = 1 must be 2 to 100"),
        (["cpu", "--trials", "7"], "do not fill a grid of 9 points; nearest: 9"),
        (["cpu", "--trials", "0", "--texts", "x.txt"], "no point of adamw for 'x.txt'"),
        (["cpu", "--first_seed", "999000"], "first_seed = 999000"),
        (["cpu", "--task.batch_size", "6"], "6 cannot be split over the 4 workers .* nearest: 8"),
    ],
)
def test_a_comparison_that_cannot_be_meant_is_refused(asked, said):
    with pytest.raises(UserError, match=said):
        compare.parse(asked)


def test_the_tiers_are_what_their_texts_say():
    for name in compare.TIERS:
        compare.parse([name])
    for name, weights in (("smoke", 134_000), ("cpu", 134_000)):
        config = compare.TIERS[name]().task.model(257)
        assert llama.count(config) == pytest.approx(weights, rel=0.01)
        task = compare.TIERS[name]().task
        assert task.length * task.batch_size == 512
    assert set(compare.cpu().arms) | set(CONTROLS) == set(ARMS)
    large = compare.TIERS["gpu"]()
    task = large.task
    config = task.model(257)
    assert llama.count(config) - 2 * 257 * task.width == pytest.approx(14e6, rel=0.02)
    assert large.steps * task.length * task.batch_size == pytest.approx(100e6, rel=0.02)
    # Three learning rates around the point of the CPU tier, for a model six times as wide.
    rates, decays = compare.grid(large, "muon")
    eta, lam = POINTS["stdlib"]["muon"]
    assert rates == pytest.approx((eta / 12, eta / 6, eta / 3))
    assert decays[0] * rates[1] * large.steps == pytest.approx(lam * eta * 400)
