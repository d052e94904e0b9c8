"""Checkpoints and the run folder: what is found again, passed over or refused."""

import json
import os
import pathlib
import random
import re
import shutil
import threading

import jax
import numpy as np
import pytest

from tests.support.runs import flags, losses, program, write_text
from train import __main__ as command
from train import main
from train.cli import parse
from train.config.fields import Config, UserError
from train.config.tree import replace
from train.run import checkpoints, integrity, log
from train.run import records as recorded
from train.run.checkpoints import Checkpoints, describe, flat, structure
from train.run.folder import Folder
from train.torture import damage
from train.weights import params


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A toy run with checkpoints of steps 2, 4 and 6, in `saved / "run"`."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.figures, "draw", lambda *_: [])
        assert main.main(flags(folder)) == 0
    return folder


@pytest.fixture
def copied(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(main.figures, "draw", lambda *_: [])
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def forge(folder: pathlib.Path, edit) -> None:
    """Changes the meta of a checkpoint so that its seals hold, as a program would that wrote it so."""
    path = folder / "meta/metadata"
    meta = integrity.verify_digest(json.loads(path.read_text()))
    edit(meta)
    path.write_text(json.dumps(integrity.add_digest(meta)))
    integrity.seal(folder)


def again(folder: pathlib.Path, *more: str) -> list[str]:
    return flags(folder, "--run.folder", str(folder / "run"), *more)


def test_a_state_comes_back_as_it_was_on_any_mesh(tmp_path):
    ready = program(tmp_path)
    state, _ = ready.program.update(ready.program.init(jax.random.key(3)), ready.batch(0))
    meta = describe(Config(), "text", ready.program.shapes)
    before = jax.device_get(state)
    with Checkpoints(tmp_path / "checkpoints", 2) as checkpoints:
        checkpoints.save(state, meta, 1)
        # The save is still under way while the next step overwrites the state.
        ready.program.update(state, ready.batch(1))
        checkpoints.wait()
    split = program(tmp_path, *["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"])
    for other in (ready, split):
        with Checkpoints(tmp_path / "checkpoints", 2) as checkpoints:
            found = checkpoints.restore(other.program.placed_shapes(), meta, print)
        assert found is not None and found[1] == 1
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found[0]), before)
        same = jax.tree.map(lambda x, s: x.sharding == s, found[0], other.program.shardings)
        assert all(jax.tree.leaves(same))


def test_nothing_is_restored_from_nothing(tmp_path):
    with Checkpoints(tmp_path / "none", 2) as checkpoints:
        assert checkpoints.restore({}, {}, print) is None


def test_a_shared_folder_may_show_a_checkpoint_late(tmp_path, monkeypatch):
    """All processes take the steps that the first one sees, and wait for the rename to reach them."""
    with Checkpoints(tmp_path / "late", 9) as found:
        (found.folder / "3").mkdir(parents=True)
        monkeypatch.setattr(checkpoints.processes, "from_first", lambda work: "[3, 5]")
        shown = threading.Timer(0.5, (found.folder / "5").mkdir)
        shown.start()
        assert found._agreed_steps() == [3, 5] and not shown.is_alive()
        monkeypatch.setattr(checkpoints, "LATE", 0.3)
        monkeypatch.setattr(checkpoints.processes, "from_first", lambda work: "[3, 7]")
        with pytest.raises(UserError, match=r"does not see the checkpoint of step 7 in .*late"):
            found._agreed_steps()


def test_at_most_keep_are_kept(tmp_path):
    state = {"step": jax.numpy.zeros([], int)}
    with Checkpoints(tmp_path / "c", 2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(state, {}, step)
        checkpoints.wait()
        assert checkpoints.steps == [2, 3]


@pytest.mark.parametrize("part", ["state", "meta"])
def test_an_unreadable_checkpoint_is_set_aside_and_the_one_before_used(copied, part, capsys):
    damaged = copied / f"run/checkpoints/6/{part}"
    target = damaged / "metadata" if part == "meta" else largest_file(damaged)
    target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
    expected = losses(copied / "run")
    assert main.main(again(copied)) == 0
    said = capsys.readouterr().out
    assert "step 6 cannot be read" in said and "continued after step 4" in said
    assert (copied / "run/checkpoints/unreadable-6").is_dir()
    assert (copied / "run/checkpoints/6").is_dir()
    assert losses(copied / "run") == expected


def test_a_run_that_lost_its_checkpoints_starts_again_only_when_asked(copied, capsys):
    expected, metrics = losses(copied / "run"), copied / "run/metrics.jsonl"
    before = metrics.read_bytes()
    with pytest.raises(UserError, match=r"has a checkpoint of step 6, so --run.restart True would"):
        main.main(again(copied, "--run.restart", "True"))
    shutil.rmtree(copied / "run/checkpoints")
    for _ in range(2):  # and so it stays
        with pytest.raises(UserError, match=r"of step 6, but .* holds none.*--run.restart True"):
            main.main(again(copied))
    assert metrics.read_bytes() == before
    assert main.main(again(copied, "--run.restart", "True")) == 0
    said = capsys.readouterr().out
    assert "begins again at step 0" in said and "continued" not in said
    assert losses(copied / "run") == expected
    assert (copied / "run/earlier-metrics.jsonl").read_bytes() == before
    # It was allowed once: the config of the run does not hold it.
    assert json.loads((copied / "run/config.json").read_text())["run"]["restart"] is False


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(copied, capsys):
    shutil.rmtree(copied / "run/checkpoints")
    (copied / "run/saved.json").unlink()
    assert main.main(again(copied)) == 0
    said = capsys.readouterr().out
    assert "ended before its first checkpoint" in said and "earlier-metrics.jsonl" in said


def test_a_missing_newest_checkpoint_is_told(copied, capsys):
    shutil.rmtree(copied / "run/checkpoints/6")
    assert main.main(again(copied)) == 0
    said = capsys.readouterr().out
    assert "checkpoint of step 6, the newest that this run saved, is gone" in said
    assert "continued after step 4" in said


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "figures", "tokenizer", "lock"])
def test_a_run_begins_only_where_everything_has_its_place(copied, name):
    place = copied / "run" / name
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    place.symlink_to(copied / "nowhere")
    with pytest.raises(UserError, match=rf"{name} is a link to .*nowhere, which does not exist"):
        main.main(again(copied))
    assert not (copied / "nowhere").exists()
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(UserError, match=rf"{name} is a FIFO; it must be a f"):
        main.main(again(copied))
    place.unlink()
    place.write_text("") if "." not in name and name != "lock" else place.mkdir()
    with pytest.raises(UserError, match=rf"{name} is a f\w+; it must be a f"):
        main.main(again(copied))


def test_a_run_whose_checkpoints_are_all_unreadable_is_left_alone(copied):
    for step in (2, 4, 6):
        target = largest_file(copied / f"run/checkpoints/{step}/state")
        target.write_bytes(target.read_bytes()[:10])
    before = (copied / "run/metrics.jsonl").read_bytes()
    for _ in range(2):  # and so it stays
        with pytest.raises(UserError, match=r"No checkpoint in .* can be read"):
            main.main(again(copied))
    assert (copied / "run/metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_by_name_and_value(copied):
    with pytest.raises(UserError) as error:
        main.main(again(copied, "--decay.weight_decay", "0.3", "--run.seed", "5"))
    said = str(error.value)
    assert "decay.weight_decay: 0.1 -> 0.3" in said and "run.seed: 0 -> 5" in said
    assert "--resume" in said and len(re.findall(" -> ", said)) == 2
    # The same on the level of the checkpoint, should config.json have been edited by hand.
    path = copied / "run/config.json"
    path.write_text(path.read_text().replace('"weight_decay": 0.1', '"weight_decay": 0.3'))
    with pytest.raises(UserError, match=r"weight_decay: 0.1 -> 0.3"):
        main.main(["--resume", str(copied / "run")])


def test_the_weights_alone_are_written_where_asked(copied, tmp_path, capsys):
    out, run = tmp_path / "weights", copied / "run"
    damage.one(run / "checkpoints/6/state", random.Random(0), "cut")
    assert command.main(["params", str(run), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "step 6 cannot be read" in said and "of step 4" in said
    assert (run / "checkpoints/6").is_dir()  # reading changes nothing
    ready = program(copied)
    meta = describe(ready.config, "", ready.program.shapes)
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        whole, _ = checkpoints.parameters(4, ready.program.shardings["step"])
    host = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    found = params.load_params(out, host)
    assert structure({"params": found}).items() <= meta["structure"].items()
    for path, x in flat(found).items():
        np.testing.assert_array_equal(x, whole[path])
        assert x.sharding == host
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["step"] == 4 and manifest["config"]["model"]["width"] == 16
    manifest["weights"]["head/kernel"]["digest"] = "0" * 16
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    (out / "manifest.json").write_text(json.dumps(integrity.add_digest(rest)))
    with pytest.raises(integrity.Damaged, match="head/kernel"):
        params.load_params(out, host)
    assert command.main(["params", str(run), "--out", str(out)]) == 2
    assert command.main(["params", str(run), "--out", str(tmp_path / "x"), "--step", "5"]) == 2
    said = capsys.readouterr().err
    assert "is not empty" in said and "no checkpoint of step 5; nearest: 4" in said


def test_what_moves_no_weight_may_change(copied, capsys):
    changed = "--run.eval_every 4 --run.save_every 7 --run.log_every 2 --run.keep 1 --mesh.data 2"
    assert main.main(["--resume", str(copied / "run"), *changed.split(), "--run.steps", "8"]) == 0
    assert max(losses(copied / "run")) == 8
    assert json.loads((copied / "run/config.json").read_text())["run"]["eval_every"] == 4


def test_another_text_is_refused(copied):
    write_text(copied, seed=1)
    with pytest.raises(UserError, match="text to train on changed"):
        main.main(again(copied))


def test_other_arrays_are_refused_with_their_names(copied):
    def edit(meta):
        meta["structure"]["params/head/kernel"] = "float32[3, 5]"
        for table in ("structure", "names", "digests"):
            meta[table]["params/extra"] = "float32[2]"

    forge(copied / "run/checkpoints/6", edit)
    with pytest.raises(UserError, match=r"(?s)head/kernel: float32\[3, 5\] -> .*extra.*absent"):
        main.main(again(copied))


def test_a_folder_in_use_is_refused(saved):
    config = parse(again(saved))
    with Folder(config), pytest.raises(UserError, match=r"in use by another run \(process \d+\)"):
        Folder(config)
    with Folder(config):  # free again
        pass


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    config = replace(Config(), {"run.folder": str(tmp_path)})
    with pytest.raises(UserError, match="neither empty nor a run folder"):
        Folder(config)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_records_after_a_step_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        recorded.line({"kind": "train", "step": n, "loss": 1.0, "seconds": n}) for n in (1, 2, 3)
    ]
    path.write_text("".join(lines) + '{"kind": "train", "step": 4, "lo')
    assert [r["step"] for r in log.read_records(path)] == [1, 2, 3]
    recorder = log.Recorder(path, start=2, steps=9, per_step=5)
    with recorder:
        recorder.train(3, {"loss": 0.5})
        recorder.flush()
    found = log.read_records(path)
    assert [(r["step"], r["loss"]) for r in found] == [(1, 1.0), (2, 1.0), (3, 0.5)]
    assert found[-1]["tokens"] == 15 and found[-1]["seconds"] >= 2
    assert path.read_text().endswith("}\n")


def test_damaged_records_are_kept_aside(tmp_path, capsys):
    """What can be read goes on, and nothing that cannot is lost."""
    path = tmp_path / "metrics.jsonl"
    good = [{"kind": "train", "step": n, "loss": 1.0, "seconds": n} for n in (1, 2, 3, 4)]
    lines = [recorded.line(record).rstrip() for record in good]
    path.write_text("\n".join(lines) + '\n{"kind": "train", "st')
    with log.Recorder(path, start=4, steps=9, per_step=5):
        assert not [*tmp_path.glob("unreadable-*")]  # torn by a kill, and not damaged
    damages = (b"\xff\xfe\x00", b"[1]", b"7", b'{"step": 2}', b'{"kind": "train", "step": "2"}')
    damages = (*damages, lines[1].replace("2", "null", 1).encode(), b'{"a":' * 9999)
    for number, bad in enumerate(damages, 1):
        aside = path.with_name(f"unreadable-{path.name}" + (f"-{number}" if number > 1 else ""))
        content = b"\n".join([lines[0].encode(), bad, lines[2].encode(), lines[3].encode(), b""])
        path.write_bytes(content)
        with log.Recorder(path, start=3, steps=9, per_step=5):
            pass
        assert log.read_records(path) == [good[0], good[2]]
        assert aside.read_bytes() == content
        said = capsys.readouterr().out
        assert (
            "1 of 4 lines cannot be read or were changed, starting with line 2" in said
            and aside.name in said
        )
