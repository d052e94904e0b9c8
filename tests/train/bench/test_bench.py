"""The benchmarks run, at toy size, and hold what they say they hold."""

import json
import math
import re
import typing

import jax
import optax
import pytest

import optax_decay
from tests.support import toy
from tests.support.runs import write_text
from train.bench import device, loader, optimizers, population, spectral_accuracy, training
from train.bench import main as bench
from train.bench.table import Options, Table
from train.errors import UserError
from train.step import families
from train.study.small_runs import SmallTask


def columns(table, name):
    return [row[name] for row in table.rows]


def test_steps_are_compared_with_adamw():
    options = Options(preset="toy", rounds=1, only=("adam_huber_decay fixed", "root"))
    table = optimizers.steps_table(options)
    assert columns(table, "optimizer") == ["optax.adamw", "adam_huber_decay fixed", "root"]
    adamw, huber, root = table.rows
    # Two moments of four bytes, and counters; Muon-like optimizers keep one on matrices.
    assert adamw["state B/weight"] == pytest.approx(8, abs=0.01)
    assert huber["state B/weight"] == pytest.approx(8, abs=0.01)
    assert root["state B/weight"] < adamw["state B/weight"]
    assert adamw["CPU / adamw"] == adamw["wall / adamw"] == 1
    assert all(row["moved B/weight"] >= row["least B/weight"] for row in (adamw, huber))
    assert "optax.adamw" in str(table)


def test_every_row_of_the_contract_is_there():
    names = {name.split(" ")[0] for name in optimizers.contract_rows()}
    assert names > {"huber_decay", "spectral_alpha_decay", "conda", "one_bit_adam", "sophia_h"}
    assert all(hasattr(optax_decay, name) for name in names - {"optax.adamw"})


@pytest.mark.parametrize("layout", ["layers", "stacked"])
def test_every_row_of_the_contract_works_with_the_axes_of_a_model(layout):
    shapes, axes = optimizers.shapes_and_axes(Options(preset="gpt-toy", layout=layout))
    assert len(set(shapes) - set(toy.SHAPES)) > 10
    for name, row in optimizers.contract_rows().items():
        tx = optax.with_extra_args_support(row.build(axes, shapes))

        def step(params, grads, tx=tx, row=row):
            extra = row.extra(params, grads) if row.extra else {}
            return tx.update(grads, tx.init(params), params, **extra)[0]

        updates = jax.eval_shape(step, shapes, shapes)
        assert jax.tree.map(lambda x: x.shape, updates) == {
            path: x.shape for path, x in shapes.items()
        }, name


# Sections whose table depends on `only`, with rows that once only worked for the tree of the tests.
ROWS = {
    "optimizers": ("optax.contrib.muon", "sophia_g", "conda staggered"),
    "contract": ("scale_by_conda", "scale_by_sophia", "skip_on_spike"),
    "device-step": ("xla attention, remat dots",),
}


@pytest.mark.parametrize("section", [s for s in bench.SECTIONS if s != "collectives"])
def test_every_section_runs_on_the_tree_of_a_model(section, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "SIZES", {"cpu": (64, 1000)})
    device.ceilings.cache_clear()
    sizes = training.Sizes(width=32, layers=1, heads=2, vocabulary=64, length=16, batch=2)
    monkeypatch.setattr(training, "SIZES", sizes)
    tiny = SmallTask(width=16, mlp_width=24, layers=1, heads=2, length=12, batch_size=2, chunk=2)
    monkeypatch.setitem(population.TASKS, "cpu", tiny)
    monkeypatch.setitem(population.COUNTS, "cpu", (1, 3))
    monkeypatch.setattr(spectral_accuracy, "ROWS", 64)
    monkeypatch.setattr(spectral_accuracy, "COLUMNS", 96)
    monkeypatch.setattr(spectral_accuracy, "LAYERS", 1)
    small = Options(
        preset="gpt-toy" if section in ROWS else "toy",
        rounds=1,
        tokens=64,
        training_steps=2,
        megatokens=1,
        text=str(write_text(tmp_path)),
        tokenizer="bytes",
        only=ROWS.get(section, ()),
    )
    table = bench.SECTIONS[section](small)
    assert table.rows and all(row.keys() == table.rows[0].keys() for row in table.rows)
    values = [value for row in table.rows for value in row.values()]
    assert all(math.isfinite(value) for value in values if isinstance(value, float))
    if section in ROWS:
        names = [next(iter(row.values())) for row in table.rows]
        assert set(names) >= set(ROWS[section])
    device.ceilings.cache_clear()


def test_members_of_a_population_are_counted(monkeypatch):
    tiny = SmallTask(width=16, mlp_width=24, layers=1, heads=2, length=12, batch_size=2, chunk=2)
    monkeypatch.setitem(population.TASKS, "cpu", tiny)
    monkeypatch.setitem(population.COUNTS, "cpu", (1, 3))
    alone, _, three = population.population_table(Options(preset="toy", rounds=1)).rows
    assert alone["members"] == "one by one" and alone["/ one by one"] == 1
    assert three["members"] == "3 side by side"
    tokens = 3 * 2 * 12  # members, sequences, length
    assert three["tokens/s"] * three["ms / step of all"] == pytest.approx(1e3 * tokens)


def test_sections_on_the_command_line_are_those_that_exist():
    assert typing.get_args(bench.Section) == tuple(bench.SECTIONS)
    assert set(bench.USUAL) <= set(bench.SECTIONS)


def test_collectives_are_counted():
    """On the eight devices of the tests; the command starts as many."""
    table = optimizers.collectives_table(Options(preset="gpt-toy", only=("optax.adamw", "root")))
    adamw, root = table.rows
    assert adamw["optimizer"] == "optax.adamw" and adamw["collectives"] == "none"
    assert "all-" in root["collectives"]


@pytest.mark.parametrize("table", [optimizers.steps_table, optimizers.collectives_table])
def test_a_row_that_is_not_there_is_refused(table):
    with pytest.raises(UserError, match="'exadm' is not a row of this table; nearest: 'exadam'"):
        table(Options(preset="toy", only=("conda", "exadm")))
    with pytest.raises(UserError, match="nearest: 60M"):
        Options(preset="61M")


def test_tables_are_written_as_json(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert (
        bench.main(["spectra-model", "spectra-memory", "--preset", "toy", "--out", str(out)]) == 0
    )
    found = json.loads(out.read_text())
    assert found["environment"]["versions"]["jax"]
    rows = found["tables"]["spectra-model"]["rows"]
    assert [row["model"] for row in rows] == ["60M", "130M", "350M", "1B", "3B", "7B"]
    # The cost model of a sweep: far below a hundredth of the training between two sweeps.
    assert all(0 < row["sweep per 500 steps %"] < 0.1 for row in rows)
    assert "Workspace of AlphaDecay" in capsys.readouterr().out


def test_the_loader_is_measured(tmp_path):
    small = Options(
        preset="toy", rounds=1, megatokens=1, text=str(write_text(tmp_path)), tokenizer="bytes"
    )
    ceiling = loader.ceiling_table(small)
    store, cut, text, rows = ceiling.rows
    assert [row["tokens"].split(", ")[1] for row in (store, cut)] == ["packed", "documents"]
    assert "store" in store["tokens"] and "text.txt" in text["tokens"] + rows["tokens"]
    for row in ceiling.rows:
        seconds = 512 * 256 / (1e6 * row["Mtokens/s of a core"])
        assert row["ms a batch"] == pytest.approx(1e3 * seconds)
    step = loader.step_table(small)
    assert columns(step, "step") == ["the same batch", "a new batch"]
    # Of 2048 tokens.
    assert all(row["s"] * row["tokens/s"] == pytest.approx(2048) for row in step.rows)
    assert re.search(r"% of a step.*; \d of 2 steps ended", step.note)


def test_a_device_is_measured(monkeypatch):
    monkeypatch.setattr(device, "SIZES", {"cpu": (64, 1000)})
    device.ceilings.cache_clear()
    name = "xla attention, remat dots"
    options = Options(preset="toy", rounds=1, tokens=64, layout="stacked", only=(name,))
    limits = device.limits_table(options)
    copy, adamw = limits.rows[2:4]
    assert copy["what"] == "copy" and copy["/ copy"] == 1
    assert adamw["/ copy"] == pytest.approx(adamw["GB/s"] / copy["GB/s"])
    table = device.training_table(options)
    (row,) = table.rows
    model = families.PRESETS["toy"]
    # The count per token by hand: 6 per weight in products, and of attention 12 T D / 2 per layer.
    matrices = families.of(model).count(model) - model.vocab_size * model.width * (not model.tied)
    work = 6 * matrices + 6 * model.layers * 64 * model.width
    peak = device.ceilings(1)["bfloat16"]
    assert row["of bfloat16 products %"] == pytest.approx(100 * work * row["tokens/s"] / peak)
    assert "1 x 64 tokens" in table.title and row["of the data sheet %"] is None

    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room\nfor more")

    monkeypatch.setattr(device.training, "ours", refuse)
    table = device.training_table(options)
    assert table.rows[0]["tokens/s"] is None
    assert f"{name}: RESOURCE_EXHAUSTED: no room." in " ".join(str(table).split())
    device.ceilings.cache_clear()


def test_columns_stand_below_each_other():
    table = Table("t", [{"name": "a", "x": 1.23456}, {"name": "longer", "x": None}], "note")
    assert str(table).splitlines() == [
        "t",
        "name       x",
        "------ -----",
        "a      1.235",
        "longer     -",
        "note",
    ]
    columns = {"optimizer": "spectral_alpha_decay x", "CPU ms": 1234.5, "CPU / adamw": 0.98765}
    bytes_each = {f"{kind} B/weight": 12.3456 for kind in ("state", "moved", "least")}
    wide = Table("A title", [columns | {"compile s": 1.23456} | bytes_each], "words " * 30)
    assert max(map(len, str(wide).splitlines())) <= 80
    assert str(wide).splitlines()[1].split()[:4] == ["optimizer", "CPU", "CPU", "/"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collectives", "quantile"], "alone"),
        (["--preset", "61M"], "60M"),
        (["--preset", "deit-tiny"], "not a language model"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        bench.main(arguments)
