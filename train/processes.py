"""A run of several processes: how they find each other, which of them speaks, and what all must agree on.

    python -m train --coordinator HOST:PORT --processes N --process I ...      on each of N machines, I = 0 ... N-1
    srun python -m train ...                                                   found by itself

Found by itself are the steps of SLURM, Open MPI, TPU slices (on Cloud TPU, GKE and over several slices) and JAX's own
variable JAX_COORDINATOR_ADDRESS; `--processes auto` asks JAX to look further (Kubernetes), `--processes 1` forbids it.
These flags say where a run happens, not what it is, and are not part of its config. All processes are given the same
config and see the same folder; the first alone logs, draws and prints, but for why a process ends; all of them save.
"""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from train import display
from train.config.fields import UserError

FLAGS = ("--coordinator", "--processes", "--process")


def join(arguments: list[str], variables: Mapping[str, str] = os.environ) -> list[str]:
    """Connects this process with the others of its run; returns the arguments without the flags that say how.

    Raises:
        UserError: flags that are incomplete or out of range, or no connection.
    """
    given, rest = _take(arguments)
    how = _explicit(given) if given.get("--processes") != "auto" else {}
    cluster = _cluster(variables)
    if how is None or not (given or cluster):
        return rest
    # Its handler would swallow the signals that end a run before training begins; later `Agreement` hears them.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**how)
    except (RuntimeError, ValueError) as error:
        found = f"This looks like {cluster}, but" if cluster and not given else "With these flags"
        raise UserError(
            f"{found} the processes of the run do not find each other: {error}. To say it: --coordinator HOST:PORT"
            " --processes N --process I; to run alone: --processes 1."
        ) from None
    if not first():
        display.silence()
    return rest


def _take(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    given, rest, words = {}, [], iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in FLAGS:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value:
            raise UserError(f"{name} needs a value.")
        given[name] = value
    return given, rest


def _explicit(given: dict[str, str]) -> dict[str, Any] | None:
    """The arguments of `jax.distributed.initialize`; None: run alone."""
    if not given or given == {"--processes": "1"}:
        return None if given else {}
    missing = [flag for flag in FLAGS if flag not in given]
    if missing:
        raise UserError(
            f"{' and '.join(given)} without {' and '.join(missing)}: give all three, or none."
        )
    numbers = [int(given[flag]) if given[flag].isdecimal() else -1 for flag in FLAGS[1:]]
    host, _, port = given["--coordinator"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator {given['--coordinator']} is not HOST:PORT, such as 10.0.0.1:8476; it is the same in every"
            " process, and a free port of the first one's machine."
        )
    if numbers[0] < 1 or not 0 <= numbers[1] < numbers[0]:
        raise UserError(
            f"--processes {given['--processes']} --process {given['--process']}: allowed are a number N of 1 or more,"
            " and 0 to N - 1."
        )
    return dict(
        coordinator_address=given["--coordinator"], num_processes=numbers[0], process_id=numbers[1]
    )


def _cluster(variables: Mapping[str, str]) -> str | None:
    """What several processes of this environment would have been started by."""
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
    return next((name for name, seen in signs.items() if seen), None)


def _several(text: str | None) -> bool:
    return text is not None and text.isdecimal() and int(text) > 1


def first() -> bool:
    """Whether this process speaks for all."""
    return jax.process_index() == 0


def from_first(work: Callable[[], str]) -> str:
    """What `work` returns in the first process, in every one. Where it fails, it fails in all."""
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


def together(work: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
    """(result, None) if the work succeeded in every process, (None, error) in each if not; raises UserError."""
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
            error = RuntimeError("it failed in another process")
    return (None, error) if error is not None else (result, None)


def wait_for_all(what: str) -> None:
    """Until every process is here; `what` names the place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


class Agreement:
    """Whether any process wants something, known to all after the same step.

    With several processes the answer is that of one step before, so that nobody waits for it. A signal to any process,
    as schedulers send before they take a machine away, thus makes all of them save the same step. This stands in for
    JAX's preemption service (and Orbax's `reached_preemption` on top of it), which would take SIGTERM for itself.
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
