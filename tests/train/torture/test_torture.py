"""The torture program at its smallest: it finds what it claims to find, and fails where something is lost."""

import json
import types

import jax
import pytest

from train import __main__ as command
from train import main
from train.run import integrity
from train.torture import in_process, layouts, runs
from train.torture import main as torture

STEPS = 15


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the run that nothing disturbs, made in this process."""
    found = runs.Workspace(tmp_path_factory.mktemp("torture"))
    found.write_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.figures, "draw", lambda *_: [])
        assert main.main(found.flags("clean", STEPS, "--mesh.data", "1")) == 0
    return found


def test_a_killed_run_loses_no_more_than_is_promised(workspace):
    options = types.SimpleNamespace(kills=1, seed=3)
    found, rows = torture.measure_kills(workspace, STEPS, options, print)
    assert found["killed"] == 1 and found["runs"] == 1
    assert found["wrong_losses"] == found["failed_restarts"] == 0
    assert rows[1][-1] and found["steps_lost_most"] <= 2 * runs.INTERVAL
    assert runs.losses(workspace.run("kills-1")) == runs.losses(workspace.run("clean"))


def test_damages_are_counted_and_none_is_missed(workspace, monkeypatch):
    # What is drawn follows from the sizes of the files too: among 27 no kind is missing but once in 19000 times.
    options = types.SimpleNamespace(damages=27, seed=1)
    found, (row,) = torture.measure_damages(workspace, STEPS, options, print)
    assert row[-1] and sum(found["kinds"].values()) == 27 and min(found["kinds"].values()) > 0
    # A program that compares nothing is told apart.
    monkeypatch.setattr(integrity, "check_seal", lambda folder: None)
    monkeypatch.setattr(integrity, "compare_digests", lambda *digests: None)
    monkeypatch.setattr(in_process.damage, "one", flip_a_digest)
    said, options.damages = [], 9
    blind, (row,) = torture.measure_damages(workspace, STEPS, options, said.append)
    assert not row[-1] and blind["silent"] == 9 and "not detected: flip" in said[0]


def flip_a_digest(folder, generator, kind):
    """Another array under the name of the newest step, with nothing to tell but its digest."""
    older = sorted(int(p.name) for p in folder.parent.iterdir())[0]
    (folder / "state").rename(folder.parent.parent / f"old-{generator.random()}")
    (folder.parent / str(older) / "state").rename(folder / "state")
    return "flip state"


def test_edits_and_broken_batches(workspace, tmp_path):
    options = types.SimpleNamespace()
    assert "numbers" in torture.FIGURES
    found = in_process.broken_batches(workspace.run("clean"), 24)
    assert found == {"injected": 24, "skipped": 24, "arrays_changed": 0, "not_finite": 0}
    apart = runs.Workspace(tmp_path)
    results, (row,) = torture.measure_edits(apart, STEPS, options, print)
    assert row[-1] and set(results.values()) == {"kept by name"} and len(results) == 9


def test_layouts_are_told_apart(workspace, monkeypatch):
    monkeypatch.setattr(layouts, "GRIDS", {1: ((1, 1, 1), (2, 2, 1))})
    monkeypatch.setattr(layouts, "SETTINGS", {"l2": layouts.DECAYS["l2"]})
    layouts.work(workspace.folder, layouts.SETTINGS | {"none": layouts.NOTHING})
    seen = json.loads((workspace.folder / "layouts-1.json").read_text())
    found = layouts.compared(seen)
    worst = found["largest"].pop("2x2x1 in 1")
    assert 0 < worst["difference"] <= 1e-5 and worst["of"] in ("l2", "none")
    assert found["orders_of_data"] == 1 and found["least_effect_of_a_decay"] > 1e-4
    # A loss that is off, other data, and a decay that does nothing.
    seen["2x2x1 in 1"]["l2"]["losses"][5] *= 1.01
    seen["2x2x1 in 1"]["none"]["batches"] = "other"
    seen["1x1x1 in 1"]["l2"]["losses"] = seen["1x1x1 in 1"]["none"]["losses"]
    off = layouts.compared(seen)
    assert off["largest"]["2x2x1 in 1"]["of"] == "l2" and off["orders_of_data"] == 2
    assert off["least_effect_of_a_decay"] == 0


def test_the_command_writes_a_table_and_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "clean", lambda *_: {})
    out = tmp_path / "out"
    good = [("a figure", "1 of 1", "1", True)]
    monkeypatch.setitem(torture.FIGURES, "cost", lambda *_: ({"x": 1}, good))
    monkeypatch.setitem(torture.FIGURES, "edits", lambda *_: ({}, [("b", "2", "1", False)]))
    assert command.main(["torture", "--only", "cost", "--out", str(out)]) == 0
    report = json.loads((out / "results.json").read_text())
    assert report["reached"] and report["results"] == {"cost": {"x": 1}}
    assert report["environment"]["devices"]["count"] == len(jax.devices())
    both = ["--only", "cost", "--only", "edits"]
    assert command.main(["torture", *both, "--out", str(tmp_path / "b")]) == 1
    assert "| b | 2 | 1 | NO |" in capsys.readouterr().out
    assert command.main(["torture", "--out", str(out)]) == 2
    assert command.main(["torture", "--kills", "-1"]) == 2
    said = capsys.readouterr().err
    assert "exists; name a new folder" in said and "--kills -1 is negative; nearest: 0" in said


def test_killed_and_missing_processes_are_judged(workspace, monkeypatch):
    """Judged by message, code, time and the absence of a stack; the processes themselves are in test_meeting.py."""
    good = {"code": 2, "seconds": 3.0, "named": True, "stack": False}
    monkeypatch.setattr(torture.two_processes, "absent", lambda *_: good)
    for other, reached in (
        (good, True),
        (good | {"code": -6}, False),
        (good | {"stack": True}, False),
        (good | {"seconds": 88.0}, False),
        (good | {"named": False}, False),
    ):
        monkeypatch.setattr(torture.two_processes, "survivor", lambda *_, other=other: other)
        _, rows = torture.measure_peers(workspace, STEPS, None, print)
        assert [row[-1] for row in rows] == [reached, True]


def test_a_missing_process_is_named_for_real(workspace):
    found = torture.two_processes.absent(workspace, 1)
    assert found["named"] and found["code"] == 2 and not found["stack"]


def test_a_stop_on_an_accelerator_is_compared_bit_for_bit(workspace, monkeypatch):
    assert not torture.accelerator.present("nothing-of-this-name")
    monkeypatch.setattr(torture.accelerator, "present", lambda platform: False)
    _, (row,) = torture.measure_gpu(workspace, STEPS, None, print)
    assert row[-1] and "no GPU here" in row[2]
    monkeypatch.setattr(torture.accelerator, "present", lambda platform: True)
    for wrong, reached in ((0, True), (1, False)):
        result = {"stopped": True, "losses": 30, "wrong_losses": wrong}
        monkeypatch.setattr(torture.accelerator, "stop_and_go_on", lambda *_, r=result: r)
        _, (row,) = torture.measure_gpu(workspace, STEPS, None, print)
        assert row[-1] == reached
