"""Runs in several processes: how they connect, which of them prints, and how they agree.

    python -m train --coordinator HOST:PORT --processes N --process I ...      on each of N machines, I = 0 ... N-1
    srun python -m train ...                                                   detected automatically

Detected automatically are SLURM, Open MPI, TPU slices (on Cloud TPU, on GKE and across slices), and the variable
JAX_COORDINATOR_ADDRESS. `--processes auto` makes JAX try its other detectors, such as Kubernetes; `--processes 1`
disables detection. These flags are not part of the config of a run, since they do not change its result. All processes
need the same config and a shared folder, and all of them save. Only the first process logs, draws and prints; the
others print only the error that ends them.

`--connect_seconds` (120) is how long processes wait for each other at the start. With --coordinator, those
that are missing then are named, and the end of one process ends the others with a message (`train/meeting.py`).
"""

import atexit
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # there is no public way to leave in two steps
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from train import display, meeting
from train.errors import UserError

FLAGS = ("--coordinator", "--processes", "--process")
WAIT = "--connect_seconds"
CONNECT_SECONDS = 120.0

_meetings: list[meeting.Meeting] = []  # that of this process, if it has met others


def join(arguments: list[str], variables: Mapping[str, str] = os.environ) -> list[str]:
    """Connects this process with the others of its run.

    Args:
        arguments: of the command line.
        variables: of the environment.

    Returns:
        The arguments without the flags for the connection.

    Raises:
        UserError: a flag is missing or out of range, or the connection failed.
    """
    given, rest = _take(arguments)
    seconds = _seconds(given.pop(WAIT, None))
    how = _explicit(given) if given.get("--processes") != "auto" else {}
    cluster = _cluster(variables)
    if how is None or not (given or cluster):
        return rest
    # JAX's preemption service would swallow signals before training begins; afterwards `Agreement` handles them.
    jax.config.update("jax_enable_preemption_service", False)
    if how:
        met = meeting.meet(
            how["coordinator_address"], how["num_processes"], how["process_id"], seconds
        )
        _meetings.append(met)
    try:
        jax.distributed.initialize(initialization_timeout=max(1, round(seconds)), **how)
    except (RuntimeError, ValueError) as error:
        where = f"This looks like {cluster}, but" if cluster and not given else "With these flags"
        raise UserError(
            f"{where} the processes of the run cannot connect: {error}. Set the connection with --coordinator"
            " HOST:PORT --processes N --process I, or train in this process alone with --processes 1."
        ) from None
    for met in _meetings:
        met.watch(meeting.end_at_once)
    atexit.register(leave)  # runs before JAX's own, which was registered earlier
    sys.excepthook = _end_on_error
    if not first():
        display.silence()
    return rest


def finished() -> None:
    """Says that the work of this process is done; until then its end ends the others."""
    for met in _meetings:
        met.finish()


def end(code: int) -> int:
    """The exit code of this process, which it has just printed an error for. With others around it ends here.

    JAX would wait for them at its exit, and they for this process in their next collective operation.
    """
    if any(not met.over for met in _meetings):
        for met in _meetings:
            met.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _end_on_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    # The end of another process may have caused this error, and is the better message.
    time.sleep(2 * meeting.GRACE if any(met.peers for met in _meetings) else 0)
    sys.__excepthook__(kind, error, trace)
    end(1)


def leave() -> None:
    """Disconnects this process from the others, at its end.

    JAX stops the coordinator in the first process as soon as all processes have said that they leave. A request that
    is still on its way then aborts the first process, although its work is done (gRPC: "Check failed: queue.Pop()").
    So the first process waits a moment between the two.
    """
    state = distributed.global_state
    if state.service is not None and state.client is not None:
        state.client.shutdown()
        state.client = None
        time.sleep(1.0)
    jax.distributed.shutdown()


def _take(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    given, rest, words = {}, [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in (*FLAGS, WAIT):
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value:
            raise UserError(f"{name} needs a value.")
        given[name] = value
    return given, rest


def _seconds(text: str | None) -> float:
    try:
        seconds = CONNECT_SECONDS if text is None else float(text)
    except ValueError:
        seconds = -1.0
    if not 1 <= seconds <= 86400:
        raise UserError(f"{WAIT} {text}: allowed are 1 to 86400 seconds.")
    return seconds


def _explicit(given: dict[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`; None for a single process."""
    if not given or given == {"--processes": "1"}:
        return None if given else {}
    missing = [flag for flag in FLAGS if flag not in given]
    if missing:
        raise UserError(
            f"{' and '.join(given)} also needs {' and '.join(missing)}; give all three flags, or none."
        )
    numbers = [int(given[flag]) if given[flag].isdecimal() else -1 for flag in FLAGS[1:]]
    host, _, port = given["--coordinator"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator {given['--coordinator']} must be HOST:PORT, such as 10.0.0.1:8476: the machine of process"
            " 0 and a free port on it, the same in every process."
        )
    if numbers[0] < 1 or not 0 <= numbers[1] < numbers[0]:
        raise UserError(
            f"--processes {given['--processes']} --process {given['--process']}: allowed are --processes N with N of 1"
            " or more, and --process from 0 to N - 1."
        )
    return dict(
        coordinator_address=given["--coordinator"], num_processes=numbers[0], process_id=numbers[1]
    )


def _cluster(variables: Mapping[str, str]) -> str | None:
    """The launcher that started several processes in this environment; None if there is none."""
    hosts = variables.get("TPU_PROCESS_ADDRESSES") or variables.get("TPU_WORKER_HOSTNAMES", "")
    tpu = any(pathlib.Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    signs = {
        "JAX_COORDINATOR_ADDRESS": "JAX_COORDINATOR_ADDRESS" in variables,
        "a step of SLURM": _several(variables.get("SLURM_STEP_NUM_TASKS")),
        "Open MPI": _several(variables.get("OMPI_COMM_WORLD_SIZE")),
        "a TPU slice of several hosts": "," in hosts
        or "MEGASCALE_COORDINATOR_ADDRESS" in variables,
        "a Cloud TPU": tpu and not hosts and "TPU_SKIP_MDS_QUERY" not in variables,
    }
    return next((name for name, present in signs.items() if present), None)


def _several(text: str | None) -> bool:
    return text is not None and text.isdecimal() and int(text) > 1


def first() -> bool:
    """Whether this is the first process, which prints and logs for all."""
    return jax.process_index() == 0


def from_first(work: Callable[[], str]) -> str:
    """Calls `work` in the first process, and returns its result in every process. An error is raised in all of them."""
    if jax.process_count() == 1:
        return work()
    text, error = "", None
    if first():
        try:
            text = work()
        except Exception as caught:
            text, error = str(caught), caught
    data = np.frombuffer(text.encode(), np.uint8)
    failed, size = multihost_utils.broadcast_one_to_all(np.array([error is not None, data.size]))
    room = data if first() else np.zeros(int(size), np.uint8)
    text = np.asarray(multihost_utils.broadcast_one_to_all(room)).tobytes().decode()
    if error is not None:
        raise error
    if failed:
        raise UserError(text)
    return text


def in_all_processes(work: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
    """Calls `work` in every process, which must all succeed.

    Returns:
        (result, None) if all calls succeeded; (None, error), in every process, if one failed.

    Raises:
        UserError: if `work` raises it.
    """
    result, error = None, None
    try:
        result = work(*arguments)
    except UserError:
        raise
    except Exception as caught:
        error = caught
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(np.array(error is not None))
        if failed.any() and error is None:
            error = RuntimeError("another process failed")
    return (None, error) if error is not None else (result, None)


def wait_for_all(what: str) -> None:
    """Waits until every process has called this; `what` names the point in the program."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


class Agreement:
    """Tells all processes, after the same step, whether any of them has a request.

    With several processes the answer is the one from the previous step, so that no process waits for it. Schedulers
    send a signal to one process before they take its machine away; through this class, all processes then save the
    same step. It replaces JAX's preemption service (and Orbax's `reached_preemption`), which would take over SIGTERM.
    """

    def __init__(self) -> None:
        self._pending: jax.Array | None = None
        if jax.process_count() > 1:
            mesh = jax.make_mesh((jax.device_count(),), ("all",), (jax.sharding.AxisType.Auto,))
            self._each = NamedSharding(mesh, jax.P("all"))
            self._any = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, jax.P()))

    def ask(self, mine: bool) -> bool:
        if jax.process_count() == 1:
            return mine
        own = jax.make_array_from_callback(
            (jax.device_count(),), self._each, lambda index: np.full(1, mine, np.int32)
        )
        before, self._pending = self._pending, self._any(own)
        return before is not None and bool(before)
