"""One run in several processes: the same numbers, one voice, one folder, and a stop that all take at the same step."""

import signal
import sys

import jax
import numpy as np
import pytest

from tests.support import two_processes
from tests.support.runs import flags, losses, program, records
from train import processes
from train.config.fields import UserError
from train.run.checkpoints import Checkpoints, describe

HERE: dict[str, str] = {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--coordinator localhost:1 --process 0", "also needs --processes"),
        ("--coordinator localhost:1 --processes 2 --process 2", "0 to N - 1"),
        ("--coordinator localhost:1 --processes two --process 0", "0 to N - 1"),
        ("--coordinator localhost --processes 2 --process=0", "must be HOST:PORT"),
        ("--coordinator :99 --processes 2 --process 0", "must be HOST:PORT"),
        ("--process", "needs a value"),
        ("--connect_seconds soon", "allowed are 1 to 86400"),
        ("--connect_seconds 0", "allowed are 1 to 86400"),
    ],
)
def test_wrong_flags_are_rejected(flags, message):
    with pytest.raises(UserError, match=message):
        processes.join(flags.split(), HERE)


class Quiet:
    """A meeting of which nothing is heard."""

    over, peers = True, ()

    def watch(self, ended):
        pass


def test_clusters_are_detected(monkeypatch):
    called, met = [], []
    monkeypatch.setattr(processes, "_meetings", [])
    monkeypatch.setattr(processes.sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(processes.atexit, "register", lambda function: None)
    monkeypatch.setattr(processes.meeting, "meet", lambda *how: met.append(how) or Quiet())
    wait = {"initialization_timeout": 120}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: called.append(how))
    monkeypatch.setattr(processes.display, "silence", pytest.fail)
    for found in (
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "7"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"MEGASCALE_COORDINATOR_ADDRESS": "a"},
        {"JAX_COORDINATOR_ADDRESS": "a:1"},
    ):
        assert processes.join(["toy"], found) == ["toy"] and called.pop() == wait
        assert processes.join(["--processes", "1", "toy"], found) == ["toy"] and not called
    for alone in ({}, {"SLURM_STEP_NUM_TASKS": "1"}, {"TPU_WORKER_HOSTNAMES": "a"}):
        assert processes.join(["toy"], alone) == ["toy"] and not called
    assert processes.join(["toy", "--processes=auto"], HERE) == ["toy"] and called.pop() == wait
    how = {"coordinator_address": "a:1", "num_processes": 3, "process_id": 0}
    joined = processes.join(
        ["--coordinator", "a:1", "--processes", "3", "toy", "--process", "0"], HERE
    )
    assert joined == ["toy"] and called == [how | wait] and met == [("a:1", 3, 0, 120.0)]
    called.clear()
    assert processes.join(["--connect_seconds", "7.6", "toy"], {"OMPI_COMM_WORLD_SIZE": "2"}) == [
        "toy"
    ]
    assert called == [{"initialization_timeout": 8}] and len(met) == 1

    def refuse(**how):
        raise RuntimeError("connection refused")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(
        UserError, match=r"a step of SLURM, but .*connection refused.*--processes 1"
    ):
        processes.join([], {"SLURM_STEP_NUM_TASKS": "4"})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of six steps of Adam on one device."""
    ready = program(tmp_path_factory.mktemp("alone"), *two_processes.SPARE)
    state, seen = ready.program.init(jax.random.key(0)), {}
    for i in range(two_processes.STEPS):
        state, noted = ready.program.update(state, ready.batch(i))
        seen[i + 1] = float(noted["loss"])
    return seen


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder of all runs in two processes, and what each process has seen of them."""
    folder = tmp_path_factory.mktemp("both")
    (folder / "taken").mkdir()
    (folder / "taken/something").write_text("else")
    flags(folder)  # writes the text, before two would
    return folder, two_processes.start(folder)


def test_two_processes_are_one_run(alone, both):
    """Stopped by a signal to the second of them, and read by one."""
    folder, seen = both
    (code, said), (other, silent) = (own["stopped"] for own in seen)
    # What the second hears after step 4 all know one step later.
    last = two_processes.STOP + 1
    assert "Traceback" not in said + silent and not silent.strip(), silent
    assert code == 0 and other == 128 + signal.SIGTERM
    assert f"stopped after step {last} of 1000; everything is saved" in said
    assert "in 2 processes" in said
    first = losses(folder / "stopped")
    assert list(first) == list(range(1, last + 1))
    # The bound; sums in another order move a loss of 5 by about 1e-6.
    np.testing.assert_allclose(list(first.values()), [alone[i] for i in first], rtol=1e-5)

    # What eight devices of two processes have saved, eight of one read.
    ready = program(folder, *two_processes.SPARE, *two_processes.GRID)
    meta = describe(ready.config, ready.data.digest, ready.program.shapes)
    with Checkpoints(folder / "stopped/checkpoints", 9) as checkpoints:
        found = checkpoints.restore(ready.program.placed_shapes(), meta, pytest.fail)
    assert found is not None and found[1] == int(found[0]["step"]) == last


def test_what_the_first_process_refuses_ends_all(both):
    ends = [own["refused"] for own in both[1]]
    assert [code for code, _ in ends] == [2, 2]
    assert all("is neither empty nor a run folder" in said for _, said in ends)
    assert len(ends[1][1].strip().splitlines()) == 1  # why it ends, and nothing else


def test_one_bit_adam_with_a_process_for_each_worker(alone, both):
    folder, seen = both
    assert [[own[name][0] for own in seen] for name in ("whole", "resumed")] == [[0, 0], [0, 0]]
    ours = losses(folder / "whole")
    # Three plain means; step 4 is the first with signs, and step 5 the first to see its weights.
    np.testing.assert_allclose(
        [ours[i] for i in range(1, 5)], [alone[i] for i in range(1, 5)], rtol=1e-5
    )
    assert all(1e-4 < abs(ours[i] - alone[i]) / alone[i] < 0.1 for i in (5, 6))

    # From a checkpoint between: momentum, errors and text go on bit for bit.
    assert "continued after step 4" in seen[0]["resumed"][1]
    assert records(folder / "resumed") == records(folder / "whole")
