"""Repeated text: the plan finds known optima, the controls can fail, and a run is one of the population engine."""

import dataclasses
import json
import math

import numpy as np
import pytest

from tests.support.drawings import is_drawn
from tests.support.runs import write_text
from train.config.fields import UserError
from train.study.compare.tuning import FIRST_SEED
from train.study.population import Member, population
from train.study.regimes import main as command
from train.study.regimes import repeated_report, repeated_tiers, rows, texts
from train.study.regimes.arms import ARMS, DECAYS, LINKS
from train.study.regimes.repeated import AGAIN, Repeated, program
from train.study.regimes.repeated_tiers import TIERS
from train.study.regimes.work import known
from train.study.small_runs import SmallTask

TINY = SmallTask(
    width=16, mlp_width=24, layers=1, heads=2, length=12, batch_size=4, eval_batches=2, chunk=4
)
ARMS_HERE = ("huber", "cautious", "muon_none", "nadamw")
# Loss at the optimum, best η, best λ.
VALLEYS = {
    "none": (2.5, 0.008, 1.0),
    "l2": (2.2, 0.008, 1.3),
    "huber": (2.15, 0.004, 6.0),
    "cautious": (2.2, 0.008, 2.0),
    "muon_l2": (2.1, 0.016, 0.2),
    "muon_none": (2.6, 0.016, 1.0),
    "nadamw": (2.19, 0.008, 1.0),
    "again": (2.2, 0.008, 1.3),
}


def loss(job, noise=0.01):
    """A valley per arm; one pass has one of its own. The noise of a seed is shared by all arms."""
    low, eta, lam = VALLEYS[job["arm"].partition("_tuned_")[0]]
    common = 0.05 * np.random.default_rng(job["seed"]).standard_normal()
    key = [job["seed"], sum(map(ord, job["arm"])), round(1e6 * job["weight_decay"])]
    own = noise * np.random.default_rng(key).standard_normal()
    if job["unique"] == 0:
        return (1.9 if job["arm"] == "muon_l2" else 2.0) + common + own
    x = math.log2(job["learning_rate"] / eta)
    y = math.log2(job["weight_decay"] / lam) if job["weight_decay"] else 0.0
    return low + 0.03 * x * x + 0.02 * y * y + common + own


def simulated(regime, loss=loss):
    """All lines of a comparison with known losses."""
    lines = []
    for unit in regime.units():
        results = []
        for jobs in regime.wanted(unit, results):
            results += [
                job | {"loss": loss(job), "training_loss": 1.0, "seconds": 0.1} for job in jobs
            ]
        lines += results
    return lines


@pytest.fixture(scope="module")
def regime():
    made = Repeated(texts=("one", "two"), arms=ARMS_HERE, seeds=12)
    made.check()
    return made


@pytest.fixture(scope="module")
def lines(regime):
    return simulated(regime)


@pytest.fixture
def folder(tmp_path):
    start = {
        "command": "c",
        "commit": "abc",
        "uncommitted_changes": False,
        "python": "3",
        "versions": {"jax": "0"},
        "devices": {"kind": "cpu"},
        "cores": 2,
        "system": "s",
        "texts": {},
    }
    (tmp_path / "environment.json").write_text(json.dumps([start]))
    return tmp_path


def test_known_differences_are_found_with_their_signs(regime, lines):
    found = rows.rows(regime, known(regime, lines).records)
    table = {(row.arm, row.text): row for row in found}
    assert rows.failed(regime, found, lines) == []
    assert {row.verdict for row in found if row.arm == "huber"} == {"better"}
    assert rows.overall(found, "huber", regime.texts) == "better"
    assert rows.overall(found, "none", regime.texts) == "worse"
    assert rows.overall(found, "muon_none", regime.texts) == "worse"
    same = rows.overall(found, "cautious", regime.texts)
    assert same.startswith("differs by less than") and float(same.split()[-1]) < 0.05
    huber = table["huber", "one"]
    assert 0.0036 < huber.learning_rate < 0.0044 and 5 < huber.weight_decay < 7.2
    # 0.02·log2² is 0.02 at a factor of two on each side; lines between points move that a little.
    assert huber.forgiving is not None and 1.2 < huber.forgiving.doublings < 2.8
    assert huber.to_l2 is not None and huber.to_l2.interval.holds(-0.05)
    assert table["muon_none", "one"].to_l2.interval.value > 0.3  # to L2 on Muon


def test_search_sweep_and_results_have_seeds_of_their_own(regime, lines):
    main = [r for r in lines if r["arm"] == "l2" and r["unique"] == regime.unique]
    counted = {r["seed"] for r in main if r["seed"] < FIRST_SEED}
    assert counted == set(range(12))
    assert {r["seed"] - AGAIN for r in lines if r["arm"] == "again"} == counted
    fresh = dataclasses.replace(regime, fresh_seeds=3)
    other = {r["seed"] for r in simulated(fresh)}
    assert not other & {r["seed"] for r in lines} and min(other) == 3000
    trials = [len(regime.tuning(arm, "one").trials_in(lines)) for arm in ("l2", "huber", "nadamw")]
    assert trials == [15, 15, 15]
    finer = {r["seed"] for r in main if r["seed"] % 100 >= 50 and r["seed"] >= FIRST_SEED}
    assert finer == {FIRST_SEED + 50, FIRST_SEED + 51}


def test_best_decay_against_steps_epochs_and_batch(regime, folder):
    """A λ that is best at ηλT = 10 is read off as a timescale."""

    def timescale(job):
        if job["unique"] == 0:
            return loss(job)
        best = 1.3 * regime.steps / job["steps"]
        y = math.log2(job["weight_decay"] / best) if job["weight_decay"] else 6.0
        return 2.2 + 0.02 * y * y

    lines = known(regime, simulated(regime, timescale)).records
    found = rows.rows(regime, lines)
    text = repeated_report.claims(regime, found, lines)
    parts = [line for line in text.splitlines() if "timescale" in line]
    assert len(parts) == 3 and all("within a factor of √2" in part for part in parts)
    assert "2.00 times as large" in parts[0] and "0.50 times as large" in parts[1]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda job, x: x + 0.1 * (job["arm"] == "again"), "against itself"),
        (lambda job, x: x - 0.25 * (job["arm"] == "none"), "does not test decay"),
        (lambda job, x: x + 0.2 * (job["arm"] == "muon_l2" and not job["unique"]), "Muon must"),
    ],
)
def test_a_broken_control_is_reported_at_the_top(regime, lines, folder, broken, words):
    changed = [r | {"loss": broken(r, r["loss"])} for r in lines]
    reasons = repeated_report.write_report(regime, known(regime, changed).records, folder)
    assert len(reasons) == 2 and all(words in reason for reason in reasons)
    assert "may be claimed" in (folder / "report.md").read_text().split("|")[0]


def test_the_report_and_its_pictures(regime, lines, folder):
    assert repeated_report.write_report(regime, lines, folder) == []
    text = (folder / "report.md").read_text()
    for words in (
        "All controls hold",
        "reproduced in direction",
        "epochs 64",
        "± is one deviation",
    ):
        assert words in text
    for name in ("curves.png", "gains.png"):
        assert is_drawn(folder / name)


def test_points_of_a_finished_comparison_are_run_again_without_a_search(regime, lines, folder):
    repeated_report.write_report(regime, lines, folder)
    path = folder / "points.json"
    table = {(e["arm"], e["text"]): e for e in json.loads(path.read_text())}
    first = {(row.arm, row.text): row for row in rows.rows(regime, lines)}
    assert set(table) == set(first)
    again = dataclasses.replace(
        regime, points=str(path), fresh_seeds=2, texts=("two",), arms=("huber",)
    )
    again.check()
    other = simulated(again)
    # none, L2, its A/A control, Muon, Huber, and two arms in one pass
    assert len(other) == again.expected() == 7 * regime.seeds
    assert {r["seed"] // 1000 for r in other} == {2}
    (row,) = (row for row in rows.rows(again, other) if row.arm == "huber")
    assert row.learning_rate == table["huber", "two"]["learning_rate"]
    assert row.learning_rate == first["huber", "two"].learning_rate
    assert row.weight_decay == first["huber", "two"].weight_decay
    assert row.verdict == "better" and row.forgiving is None and not row.curve
    assert repeated_report.write_report(again, other, folder) == []
    made = command.parse(
        "repeated", repeated_tiers, ["smoke", "--points", str(path), "--texts", "one"]
    )
    assert made.folder == f"{TIERS['smoke']().folder}-points"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("{", "holds no points"),
        ('[{"arm": "l2"}]', "'text'"),
        ('[{"arm": "l2", "text": "stdlib", "learning_rate": -1, "weight_decay": 1}]', "negative"),
        (
            '[{"arm": "nome", "text": "stdlib", "learning_rate": 1, "weight_decay": 1}]',
            "nearest: nome",
        ),
    ],
)
def test_a_file_without_the_points_is_refused(content, words, tmp_path):
    path = tmp_path / "points.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"--points .*points\.json") as error:
        dataclasses.replace(TIERS["smoke"](), points=str(path)).check()
    assert words in str(error.value)


def test_an_unfinished_comparison_is_no_result(regime, lines, folder):
    half = [r for r in lines if r["text"] == "one" or r["seed"] >= FIRST_SEED]
    reasons = repeated_report.write_report(regime, known(regime, half).records, folder)
    assert any("not finished" in reason for reason in reasons)


def test_every_decay_of_the_library_is_an_arm():
    assert set(LINKS) < set(DECAYS) and {"p_norm", "cpr", "rotational", "hyperball", "soda"} < set(
        DECAYS
    )
    assert sum(arm.kind == "muon" for arm in ARMS.values()) > len(DECAYS) / 2
    for name, arm in ARMS.items():
        ratios = np.diff(np.log(arm.weight_decays)) if len(arm.weight_decays) > 1 else [0.0]
        np.testing.assert_allclose(ratios, ratios[0], atol=0.01, err_msg=name)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(write_text(tmp_path_factory.mktemp("texts")))


def test_a_text_is_cut_to_pieces_from_all_of_it(text):
    whole = texts.read(TINY, text, 0)
    some = texts.read(TINY, text, 3000)
    assert len(some.train) == 3000 and len(whole.train) > 20_000
    cut = some.train.windows(np.array([0, 2048]), 900)
    train = whole.train.windows(np.array([0]), len(whole.train))[0]
    last = len(train) - 1024
    assert (cut[0] == train[:900]).all() and (cut[1] == train[last : last + 900]).all()
    assert (some.held_out(2)[0] == whole.held_out(2)[0]).all()
    for unique in (5, 10**7):
        with pytest.raises(UserError, match="nearest"):
            texts.read(TINY, text, unique)
    english = texts.read(TINY, "reference", 2000)
    assert english.vocab_size == whole.vocab_size and len(english.held) > 20_000


def test_a_run_is_one_of_the_engine_and_leaves_its_weights(text, tmp_path):
    regime = Repeated(TINY, texts=(text,), unique=600, steps=8, seeds=2)
    job = {"arm": "huber", "text": text, "unique": 600, "steps": 8, "batch_size": 4}
    job |= {"learning_rate": 0.02, "weight_decay": 5.0, "seed": 7}
    (found,) = regime.train([job], tmp_path)
    data = texts.read(TINY, text, 600)
    small = program(TINY, "huber", data.vocab_size, 8)
    (alone,) = population(small, [Member(0.02, 5.0, 7)], data, 8)
    assert found["loss"] == alone.loss and found["training_loss"] == float(alone.losses[-1])
    name = found["weights"].split()[0]
    with np.load(tmp_path / "weights" / name) as arrays:
        assert len(arrays.files) > 5 and all(np.isfinite(arrays[f]).all() for f in arrays.files)
    (tuning,) = regime.train([job | {"seed": FIRST_SEED}], tmp_path)
    assert "weights" not in tuning and tuning["loss"] != found["loss"]


def test_a_whole_comparison_stops_and_goes_on(finished):
    """`finished` was stopped after some runs, and started again."""
    assert 0 < finished.stopped_at < 40 < finished.lines
    arguments = [*finished.arguments]
    before = (finished.folder / "results.jsonl").read_text()
    assert command.main(arguments) == 1  # four steps are no test of decay
    assert (finished.folder / "results.jsonl").read_text() == before
    assert "does not test decay" in (finished.folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("repeatd", "nearest: repeated"),
        ("repeated gpus", "nearest: gpu"),
        ("repeated smoke --arms hubr", "nearest: huber"),
        ("repeated smoke --arms again", "nearest"),
        ("repeated smoke --trials 8", "nearest: 9"),
        ("repeated smoke --seeds 1", "2 to 500; nearest: 2"),
        ("repeated smoke --fresh_seeds 901", "nearest: 900"),
        ("repeated smoke --epochs 0", "1 or more"),
        ("repeated cpu --epochs 16", "leave it out"),
        ("repeated cpu --lengths 1", "leave it out"),
        ("repeated cpu --batches 0", "1 or more"),
        ("repeated smoke --texts reference --epochs 1 --steps 90000", "epochs 1: "),
        ("repeated smoke --minutes 0", "above 0"),
        ("repeated smoke --texts stdlib stdlib", "each once"),
        ("repeated smoke --arms one_bit_adam --task.batch_size 6", "nearest: 8"),
        ("bfloat16 smoke --shrinks 0 0.6", "nearest: 0.5"),
        ("ending smoke --arms one_bit_adam", "nearest"),
        ("grokking smoke --steps 30", "nearest: 40"),
        ("grokking smoke --arms to_zero", "nearest"),
        ("compress smoke --source nowhere", "--source"),
        ("map --tier nothing", "compare repeated nothing"),
    ],
)
def test_bad_input_names_the_nearest_choice(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        command.main(arguments.split())
    assert words in str(error.value)


def test_fresh_seeds_get_a_folder_of_their_own():
    for module in command.REGIMES.values():
        tiers = __import__(module, fromlist=["TIERS"]).TIERS
        assert list(tiers) == ["smoke", "cpu", "gpu"]
        for make in tiers.values():
            assert make.__doc__ and make().folder.startswith("runs/compare-")
    made = command.parse("repeated", repeated_tiers, ["smoke", "--fresh_seeds", "2"])
    assert made.folder == f"{TIERS['smoke']().folder}-seeds-2"
