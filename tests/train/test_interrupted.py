"""Whatever happens to a run, nothing is lost but steps since the last checkpoint, and it says so."""

import contextlib
import errno
import functools
import os
import resource
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from tests.support.runs import flags, interrupt_after, losses, records
from train import __main__ as command
from train import main
from train.config.fields import Config, UserError
from train.data import batches
from train.run import integrity, log, signals, watchdog
from train.run.checkpoints import Checkpoints, describe
from train.step import update as step


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


# Where a signal arrives: what is called there, at which call since the start, and the step that must be saved.
PHASES = {
    "restore": (Checkpoints, "restore", 1, 0),
    "first evaluation": (batches.TokenBatches, "held_out", 1, 0),
    "compile": (step, "advance", 1, 1),
    "evaluation": (batches.TokenBatches, "held_out", 1, 2),
    "save": (integrity, "digests", 2, 4),  # the first are those of what is restored
}


def test_signals_in_every_phase_of_one_run_lose_nothing(whole, tmp_path, monkeypatch, capfd):
    start, run = flags(tmp_path), tmp_path / "run"
    for phase, (owner, name, at, saved) in PHASES.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, with_signal(getattr(owner, name), at))
            assert main.main(start) == 128 + signal.SIGTERM, phase
        said = capfd.readouterr()
        assert "stopping after this step" in said.err
        assert f"stopped after step {saved} of 6; everything is saved" in said.out, phase
        assert max(int(p.name) for p in (run / "checkpoints").iterdir()) == saved, phase
        start = ["--resume", str(run)]
    assert main.main(start) == 0
    assert records(run) == records(whole / "run")


@contextlib.contextmanager
def files_of_at_most(size):
    """The system refuses larger ones; the compilation cache, which would keep torn ones, is not written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(whole, tmp_path, capsys):
    """Metrics fit, checkpoints do not."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 3)
        assert command.main(flags(tmp_path)) == 128 + signal.SIGINT
    with files_of_at_most(16_000):
        code = command.main(["--resume", str(tmp_path / "run")])
    said = capsys.readouterr()
    assert code == 2
    assert "step 4 could not be written: File too large. Training continues" in said.out
    assert (
        "step 6 could not be written: File too large; step 3 is the last that is safe" in said.err
    )
    assert "Make room" in said.err and "Traceback" not in said.err
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["2", "3"]
    assert command.main(["--resume", str(tmp_path / "run")]) == 0
    assert losses(tmp_path / "run") == losses(whole / "run")


def test_the_next_checkpoint_is_written_once_there_is_room(tmp_path):
    state = {"params": {"w": jnp.arange(600.0)}, "step": jnp.asarray(0)}
    meta, said = describe(Config(), "text", state), []
    with Checkpoints(tmp_path, 3) as checkpoints:
        with files_of_at_most(200):
            checkpoints.save(state, meta, 1, said.append)
            with pytest.raises(OSError, match="step 1 could not be written: File too large"):
                checkpoints.wait()
            checkpoints.save(state, meta, 2, said.append)
            checkpoints._thread.join()
        checkpoints.save(state, meta, 3, said.append)
        checkpoints.wait()
        assert checkpoints.steps == [3]
    (text,) = said
    assert "step 2 could not be written" in text and "Training continues" in text


@pytest.mark.parametrize("for_good", [False, True])
def test_metrics_wait_for_room_and_then_stop_the_run_with_advice(tmp_path, monkeypatch, for_good):
    class Full:
        """Takes some bytes; then there is room for no more until somebody makes some, or for good."""

        def __init__(self, file):
            self.file, self.calls = file, 0

        def write(self, data):
            self.calls += 1
            if self.calls > 1 and (for_good or self.calls < 4):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data[:7])

        def close(self):
            self.file.close()

    pauses = []
    monkeypatch.setattr(log.time, "sleep", pauses.append)
    path = tmp_path / "metrics.jsonl"
    with log.Recorder(path, 0, 9, 5) as recorder:
        recorder._file = full = Full(recorder._file)
        recorder.train(1, {"loss": 0.5})
        if for_good:
            with pytest.raises(UserError, match=r"step 1 .*No space left.*--resume"):
                recorder.flush()
        else:
            recorder.flush()
            assert [r["loss"] for r in log.read_records(path)] == [0.5]
            assert path.read_bytes().count(b"\n") == 1 and full.calls > 4
    assert pauses == list(log.RETRY_AFTER if for_good else log.RETRY_AFTER[:2])


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_one_paragraph(
    whole, tmp_path, monkeypatch, capsys, code
):
    shutil.copytree(whole / "run", tmp_path / "run")

    def refuse(path, text):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr("train.run.folder.write", refuse)
    assert command.main(["--resume", str(tmp_path / "run"), "--run.steps", "8"]) == 2
    said = capsys.readouterr().err.strip()
    assert os.strerror(code) in said and "Traceback" not in said and "\n\n" not in said


def poisoned(monkeypatch, folder, indices) -> None:
    """From here on, the batches of some steps give a loss and a gradient that are not numbers."""
    data = main.read_data(main.parse(flags(folder)))
    marks = jnp.asarray([int(data.batch(i, slice(None)).sum()) for i in indices])
    plain = step.loss_and_gradient

    def broken(forward, params, tokens, micro_batches):
        bad = jnp.any(jnp.sum(tokens) == marks)
        found = plain(forward, params, tokens, micro_batches)
        return jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), found)

    monkeypatch.setattr(step, "loss_and_gradient", broken)


def test_broken_batches_are_left_out_and_counted_and_many_stop_the_run(
    whole, tmp_path, monkeypatch, capsys
):
    poisoned(monkeypatch, tmp_path, [1, 3, 4, 5])
    assert command.main(flags(tmp_path, "--run.max_skipped", "3")) == 2
    said = capsys.readouterr().err
    assert "the last 3 steps up to 6 were skipped" in said
    for number in (4, 5, 6):
        assert f"step {number}: loss nan, gradient norm nan" in said
    # Steps 2, 4 and 6 were due to be saved, but weights that may be to blame must not push out others: 3 was saved.
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["3"]

    found = [r for r in records(tmp_path / "run") if r["kind"] == "train"]
    assert [r["skipped"] for r in found] == [0, 1, 1, 2, 3, 4]
    assert [r["loss"] is None for r in found] == [n in (2, 4, 5, 6) for n in range(1, 7)]
    assert [r["gradient_norm"] is None for r in found] == [r["loss"] is None for r in found]
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    assert "NaN" not in lines and "Infinity" not in lines


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


def test_the_loop_tells_the_watchdog_what_it_does(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(watchdog.Watchdog, "_begin", lambda self, *what: begun.append(what))
    assert main.main(flags(tmp_path)) == 0
    said = [what for what, _ in begun]
    assert [s for s in said if s.startswith("step")] == [f"step {n}" for n in range(1, 7)]
    assert "the evaluation after step 4" in said and "saving after step 4" in said
    limits = {what: seconds for what, seconds in begun}
    assert limits["step 1"] == watchdog.OTHER  # which compiles
    assert 30 < limits["step 6"] < 60


def test_accumulation_does_not_multiply_refreshes(tmp_path):
    """F24: the basis of Conda is renewed once per due step, however many parts a batch has."""
    from tests.support.runs import program

    conda = ["--optimizer.name", "conda", "--optimizer.refresh_every", "3"]
    counts = {}
    for parts in ("1", "4"):
        ready = program(tmp_path, *conda, "--run.micro_batches", parts)
        text = str(ready.program.update.trace(ready.program.placed_shapes(), ready.batch(0)).jaxpr)
        counts[parts] = (text.count("svd["), text.count("eigh["), text.count("qr["))
    assert sum(counts["1"]) > 0 and counts["4"] == counts["1"]


def test_only_a_second_ctrl_c_stops_at_once(monkeypatch):
    """Schedulers and terminals send SIGTERM and SIGHUP several times; nohup has SIGHUP ignored."""
    with signals.signals() as arrived:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert arrived == [signal.SIGHUP]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.signals() as arrived:
            os.kill(os.getpid(), signal.SIGHUP)
        assert arrived == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_taken_where_nothing_can_be_printed(monkeypatch):
    def closed(descriptor, text):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(signals.os, "write", closed)
    with signals.signals() as arrived:
        os.kill(os.getpid(), signal.SIGHUP)
    assert arrived == [signal.SIGHUP]
