"""Whatever happens to a run, nothing is lost but steps since the last checkpoint, and it says so."""

import functools
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.runs import flags, losses, records
from train import __main__ as command
from train import data as data_lib
from train import main, step, watchdog


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.figures, "draw", lambda *_: [])
        assert main.main(flags(folder)) == 0
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(main.figures, "draw", lambda *_: [])


def with_signal(plain, at: int = 1):
    """The function, during whose `at`-th call a request to end arrives."""
    calls = []

    @functools.wraps(plain)
    def wrapped(*args, **more):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **more)

    return wrapped


# Where the signal arrives: what is called there, and the step that must be saved.
PHASES = {
    "first evaluation": (data_lib.Data, "held_out", 1, 0),
    "evaluation": (data_lib.Data, "held_out", 2, 2),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_saves_and_loses_nothing(whole, tmp_path, monkeypatch, phase, capfd):
    owner, name, at, saved = PHASES[phase]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, with_signal(getattr(owner, name), at))
        assert main.main(flags(tmp_path)) == 128 + signal.SIGTERM
    said = capfd.readouterr()
    assert "stopping after this step" in said.err
    assert f"stopped after step {saved} of 6; everything is saved" in said.out
    kept = [int(p.name) for p in (tmp_path / "run/checkpoints").iterdir()]
    assert max(kept) == saved
    assert main.main(["--resume", str(tmp_path / "run")]) == 0
    assert records(tmp_path / "run") == records(whole / "run")


def poisoned(monkeypatch, folder, indices) -> None:
    """From here on, the batches of some steps give a loss and a gradient that are not numbers."""
    data = main.load(main.resolved(main.parse(flags(folder))))
    marks = jnp.asarray([int(data.batch(i, slice(None)).sum()) for i in indices])
    plain = step.loss_and_gradient

    def broken(forward, params, tokens, micro_batches):
        bad = jnp.any(jnp.sum(tokens) == marks)
        found = plain(forward, params, tokens, micro_batches)
        return jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), found)

    monkeypatch.setattr(step, "loss_and_gradient", broken)


def test_a_broken_batch_is_left_out_and_counted(whole, tmp_path, monkeypatch):
    poisoned(monkeypatch, tmp_path, [2])
    assert main.main(flags(tmp_path)) == 0
    found = [r for r in records(tmp_path / "run") if r["kind"] == "train"]
    assert [r["skipped"] for r in found] == [0, 0, 1, 1, 1, 1]
    assert found[2]["loss"] is None and found[2]["gradient_norm"] is None
    before = losses(whole / "run")
    after = losses(tmp_path / "run")
    assert [after[n] == before[n] for n in (1, 2)] == [True, True]
    assert np.isfinite([after[n] for n in (4, 5, 6)]).all()
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    assert "NaN" not in lines and "Infinity" not in lines


def test_many_broken_batches_stop_the_run_with_a_report(tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, tmp_path, [2, 3, 4, 5])
    assert command.main(flags(tmp_path, "--run.max_skipped", "3")) == 2
    said = capsys.readouterr().err
    assert "the last 3 steps up to 5 were left out" in said
    for index in (3, 4, 5):
        assert f"step {index}: loss nan, gradient norm nan" in said
    # Step 4 was due to be saved, but the weights that may be to blame must not push out others.
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["2"]


def test_a_step_that_hangs_is_reported_once_with_all_stacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watchdog, "GRACE", 0.2)
    release = threading.Event()

    def a_thread_that_waits_for_data():
        release.wait()

    helper = threading.Thread(target=a_thread_that_waits_for_data)
    helper.start()
    path = tmp_path / "stuck.txt"
    with watchdog.Watchdog(path) as watch:
        for number in (1, 2, 3):  # none of which takes long
            watch.step(number, 0.05)
            time.sleep(0.1)
        assert not path.exists()
        watch.step(4, 0.05)
        deadline = time.monotonic() + 20
        while "has not ended" not in capsys.readouterr().out:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.4)
        watch.step(5, None)  # compiling again, which may take long
        time.sleep(0.4)
    release.set()
    helper.join()
    text = path.read_text()
    assert text.count("has not ended") == 1 and "step 4 has not ended" in text
    assert "a_thread_that_waits_for_data" in text
    assert "test_a_step_that_hangs_is_reported_once_with_all_stacks" in text
    assert 2 * 0.05 + watchdog.GRACE < 1  # what is promised: twice the usual time and the grace
