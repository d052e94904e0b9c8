"""The training program. Importing it enlarges XLA's thread pool if one process has several CPU devices.

A device that waits in a collective blocks a thread of a pool, which the devices of a process share. By default the pool
has as many threads as the machine has cores, or one for each device. If a step runs several collectives at once, such
as Sophia's curvature on 2 x 2 x 2 devices and 2 cores, all threads block forever, and XLA ends the process. XLA reads
the size of the pool from NPROC.
"""

import os
import re

_THREADS = 8  # for each device


def _devices() -> int:
    """Number of CPU devices that the environment variables set."""
    flag = r"--xla_force_host_platform_device_count=(\d+)"
    forced = re.findall(flag, os.environ.get("XLA_FLAGS", ""))
    counts = [*forced[-1:], os.environ.get("JAX_NUM_CPU_DEVICES", "")]
    return max((int(number) for number in counts if number.isdecimal()), default=1)


if _devices() > 1:
    os.environ.setdefault("NPROC", str(_THREADS * _devices()))
