"""One run in several processes: the same numbers, one voice, one folder, and a stop that all take at the same step."""

import signal
import time

import jax
import numpy as np
import pytest

from tests import several
from tests.runs import flags, losses, program, records
from train import checkpoint, processes
from train.config import UserError

HERE: dict[str, str] = {}
STEPS = ["--run.steps", "4", "--optimizer.schedule_steps", "6"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--coordinator localhost:1 --process 0", "without --processes"),
        ("--coordinator localhost:1 --processes 2 --process 2", "0 to N - 1"),
        ("--coordinator localhost:1 --processes two --process 0", "0 to N - 1"),
        ("--coordinator localhost --processes 2 --process=0", "is not HOST:PORT"),
        ("--coordinator :99 --processes 2 --process 0", "is not HOST:PORT"),
        ("--process", "needs a value"),
    ],
)
def test_flags_that_cannot_be_meant(asked, said):
    with pytest.raises(UserError, match=said):
        processes.join(asked.split(), HERE)


def test_what_is_found_by_itself(monkeypatch):
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: called.append(how))
    monkeypatch.setattr(processes.display, "silence", pytest.fail)
    for found in (
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_ID": "7"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"MEGASCALE_COORDINATOR_ADDRESS": "a"},
        {"JAX_COORDINATOR_ADDRESS": "a:1"},
    ):
        assert processes.join(["toy"], found) == ["toy"] and called.pop() == {}
        assert processes.join(["--processes", "1", "toy"], found) == ["toy"] and not called
    for alone in ({}, {"SLURM_STEP_NUM_TASKS": "1"}, {"TPU_WORKER_HOSTNAMES": "a"}):
        assert processes.join(["toy"], alone) == ["toy"] and not called
    assert processes.join(["toy", "--processes=auto"], HERE) == ["toy"] and called.pop() == {}
    how = {"coordinator_address": "a:1", "num_processes": 3, "process_id": 0}
    joined = processes.join(
        ["--coordinator", "a:1", "--processes", "3", "toy", "--process", "0"], HERE
    )
    assert joined == ["toy"] and called == [how]

    def refuse(**how):
        raise RuntimeError("connection refused")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(
        UserError, match=r"a step of SLURM, but .*connection refused.*--processes 1"
    ):
        processes.join([], {"SLURM_STEP_NUM_TASKS": "4"})


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of four steps on one device."""
    ready = program(tmp_path_factory.mktemp("alone"), *STEPS)
    state, seen = ready.init(jax.random.key(0)), {}
    for i in range(4):
        state, noted = ready.update(state, ready.batch(i))
        seen[i + 1] = float(noted["loss"])
    return seen


def test_two_processes_are_one_run(alone, tmp_path):
    """Stopped by a signal to the second of them, continued in both, and read by one."""
    grid = ["--mesh.data", "2", "--mesh.fsdp", "4"]
    long = flags(tmp_path, *grid, *STEPS, "--run.steps", "100000", "--run.eval_every", "100000")
    both = several.start(2, 4, long)
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count('"train"') >= len(alone)):
        assert time.monotonic() < deadline and both[0].poll() is None, several.finish(both, 1)
        time.sleep(0.1)
    both[1].send_signal(signal.SIGTERM)
    (code, said), (other, silent) = several.finish(both)
    assert "Traceback" not in said + silent and not silent.strip(), silent
    assert code == 0 and other == 128 + signal.SIGTERM
    assert "everything is saved" in said and "in 2 processes" in said
    seen = losses(tmp_path / "run")
    first = {step: seen[step] for step in alone}
    # The bound; sums in another order move a loss of 5 by about 1e-6.
    np.testing.assert_allclose(list(first.values()), list(alone.values()), rtol=1e-5)
    assert sorted(r["step"] for r in records(tmp_path / "run") if r["kind"] == "train") == list(
        seen
    )

    # What eight devices of two processes have saved, eight of one read.
    ready = program(tmp_path, *grid, *STEPS)
    meta = checkpoint.describe(ready.config, ready.data.digest, ready.shapes)
    with checkpoint.Checkpoints(tmp_path / "run/checkpoints", 9) as checkpoints:
        found = checkpoints.restore(ready.placed_shapes(), meta, pytest.fail)
    assert found is not None and found[1] == int(found[0]["step"]) == max(seen)


def test_what_the_first_process_refuses_ends_all(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/something").write_text("else")
    ends = several.finish(several.start(2, 4, flags(tmp_path, "--mesh.data", "8")), 120)
    assert [code for code, _ in ends] == [2, 2]
    assert all("is not empty and not a run folder" in said for _, said in ends)
    assert len(ends[1][1].strip().splitlines()) == 1  # why it ends, and nothing else
