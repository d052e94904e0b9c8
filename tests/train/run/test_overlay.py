"""Several runs in one picture: which losses are drawn, and how runs are told apart."""

import dataclasses

import numpy as np
import pytest
from matplotlib import pyplot

from train import __main__ as command
from train.config.experiments import EXPERIMENTS
from train.config.saved import to_json
from train.config.tree import replace
from train.run import overlay, records


@pytest.fixture
def runs(tmp_path):
    """Three runs of other decays and lengths; the last had no evaluation but the first."""
    plain = EXPERIMENTS["small"]()
    made = []
    for name, decay, steps in (("one", 0.1, 40), ("two", 0.3, 60), ("three", 0.3, 8)):
        folder = tmp_path / name
        folder.mkdir()
        changes = {"decay.weight_decay": decay, "run.steps": steps, "run.name": name}
        (folder / "config.json").write_text(to_json(replace(plain, changes)))
        rows = [{"kind": "train", "step": n, "loss": 5 - n / 20} for n in range(1, steps + 1)]
        rows[3]["loss"] = None  # a skipped step
        rows += [{"kind": "held_out", "step": n, "loss": 6 - n / 30} for n in range(0, steps, 10)]
        lines = "".join(map(records.line, rows))
        (folder / "metrics.jsonl").write_text(lines + "{torn")
        made.append(folder)
    return made


@pytest.mark.parametrize("over", ["steps", "tokens"])
def test_runs_are_laid_over_each_other(runs, tmp_path, monkeypatch, capsys, over):
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    out = tmp_path / "new/picture.png"
    asked = ["figures", *map(str, runs), "--out", str(out), "--over", over]
    assert command.main(asked) == 0
    assert pyplot.imread(out).shape[0] > 500
    said = capsys.readouterr().out
    assert "one  weight_decay 0.1    loss 5.0000 nats (held out) after step 30" in said
    assert f"picture   {out}" in said
    held, train = kept[0].axes
    assert held.get_ylabel() == train.get_ylabel() == "loss [nats per token]"
    assert len(held.lines) == len(train.lines) == 3
    config = EXPERIMENTS["small"]()
    per_step = 1 if over == "steps" else config.data.batch_size * config.data.length
    np.testing.assert_allclose(held.lines[0].get_xdata(), per_step * np.arange(0, 40, 10))
    np.testing.assert_allclose(held.lines[1].get_ydata(), 6 - np.arange(0, 60, 10) / 30)
    assert len(train.lines[0].get_xdata()) == 39  # without the skipped step
    shown = {(line.get_color(), line.get_linestyle()) for line in held.lines}
    assert len(shown) == 3


def test_names_show_what_differs_and_moves_weights(runs):
    found = [overlay.read(folder) for folder in runs]
    assert [name.split() for name in overlay.names(found)] == [
        ["one", "weight_decay", "0.1"],
        ["two", "weight_decay", "0.3"],
        ["three", "weight_decay", "0.3"],
    ]
    assert overlay.names(found[1:]) == ["two", "three"]
    other = replace(found[0].config, {"decay.name": "l2", "optimizer.learning_rate": 0.5})
    named = overlay.names([found[0], found[0]._replace(name="four", config=other)])
    assert "learning_rate 0.5" in named[1] and "l2" in named[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["nowhere"], "is not a run folder"),
        (["--over", "epochs"], "steps, tokens, images; nearest: steps"),
        (["--over", "images"], "these runs count tokens"),
        (["--out", "x.pdf"], "must end in .png"),
        (["--from_step", "50"], "--from_step 50: one ends with step 40"),
    ],
)
def test_what_cannot_be_drawn(runs, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    assert command.main(["figures", *map(str, runs[:2]), *more]) == 2
    assert said in capsys.readouterr().err


def test_runs_without_losses_or_of_another_kind(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (runs[0] / "metrics.jsonl").write_text("")
    assert command.main(["figures", *map(str, runs)]) == 2
    assert "has no losses yet" in capsys.readouterr().err
    images = dataclasses.replace(EXPERIMENTS["small"]())
    images = replace(images, {"model.preset": "vit-toy"})
    (runs[2] / "config.json").write_text(to_json(images))
    assert command.main(["figures", *map(str, runs[1:])]) == 2
    assert "draw them apart" in capsys.readouterr().err
