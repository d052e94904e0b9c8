"""The benchmarks run, at toy size, and hold what they say they hold."""

import json
import re

import jax
import pytest

import optax_decay
from tests.support.runs import write_text
from train.bench import device as bench_device
from train.bench import loader as bench_loader
from train.bench import main as bench
from train.bench import optimizers as bench_optimizers
from train.bench.table import Options, Table
from train.config.fields import UserError
from train.step import families


def columns(table, name):
    return [row[name] for row in table.rows]


def test_steps_are_compared_with_adamw():
    options = Options(preset="toy", rounds=1, only=("adam_huber_decay fixed", "root"))
    table = bench_optimizers.steps_table(options)
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
    names = {name.split(" ")[0] for name in bench_optimizers.contract_rows()}
    assert names > {"huber_decay", "spectral_alpha_decay", "conda", "one_bit_adam", "sophia_h"}
    assert all(hasattr(optax_decay, name) for name in names - {"optax.adamw"})


def test_a_row_of_the_contract_has_the_models_axes():
    options = Options(preset="toy", rounds=1, only=("awd_decay",))
    table = bench_optimizers.contract_table(options)
    assert columns(table, "optimizer") == ["optax.adamw", "awd_decay"]


@pytest.mark.parametrize(
    "table", [bench_optimizers.steps_table, bench_optimizers.collectives_table]
)
def test_a_row_that_is_not_there_is_refused(table):
    with pytest.raises(UserError, match="'exadm' is no row of this table; nearest: 'exadam'"):
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
    ceiling = bench_loader.ceiling_table(small)
    store, cut, text, rows = ceiling.rows
    assert [row["tokens"].split(", ")[1] for row in (store, cut)] == ["packed", "documents"]
    assert "store" in store["tokens"] and "text.txt" in text["tokens"] + rows["tokens"]
    for row in ceiling.rows:
        seconds = 512 * 256 / (1e6 * row["Mtokens/s of a core"])
        assert row["ms a batch"] == pytest.approx(1e3 * seconds)
    step = bench_loader.step_table(small)
    assert columns(step, "step") == ["one batch, kept", "a batch each"]
    # Of 2048 tokens.
    assert all(row["s"] * row["tokens/s"] == pytest.approx(2048) for row in step.rows)
    assert re.search(r"% of a step.*; \d of 2 steps ended", step.note)


def test_a_device_is_measured(monkeypatch):
    monkeypatch.setattr(bench_device, "SIZES", {"cpu": (64, 1000)})
    bench_device.ceilings.cache_clear()
    name = "xla attention, remat dots"
    options = Options(preset="toy", rounds=1, tokens=64, layout="stacked", only=(name,))
    limits = bench_device.limits_table(options)
    copy, adamw = limits.rows[2:4]
    assert copy["what"] == "copy" and copy["/ copy"] == 1
    assert adamw["/ copy"] == pytest.approx(adamw["GB/s"] / copy["GB/s"])
    table = bench_device.training_table(options)
    (row,) = table.rows
    toy = families.PRESETS["toy"]
    # The count per token by hand: 6 per weight in products, and of attention 12 T D / 2 per layer.
    matrices = families.of(toy).count(toy) - toy.vocab_size * toy.width * (not toy.tied)
    work = 6 * matrices + 6 * toy.layers * 64 * toy.width
    peak = bench_device.ceilings(1)["bfloat16"]
    assert row["of bfloat16 products %"] == pytest.approx(100 * work * row["tokens/s"] / peak)
    assert "1 x 64 tokens" in table.title and row["of the data sheet %"] is None

    def refuse(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room\nfor more")

    monkeypatch.setattr(bench_device.bench_training, "ours", refuse)
    table = bench_device.training_table(options)
    assert table.rows[0]["tokens/s"] is None
    assert f"{name}: RESOURCE_EXHAUSTED: no room." in " ".join(str(table).split())
    bench_device.ceilings.cache_clear()


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
        (["--preset", "deit-tiny"], "language model"),
        (["--rounds", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        bench.main(arguments)
