"""The training program. Importing it gives several CPU devices of one process enough threads to wait for each other.

A device that waits in a collective holds a thread, of a pool that the devices of a process share. XLA makes it as large
as the machine has cores, or one for each device; where a step has several collectives at once (Sophia's curvature, on
2 x 2 x 2 devices and 2 cores) all threads then wait for good, until XLA ends the process. NPROC is the size it reads.
"""

import os
import re

_THREADS = 8  # for each device


def _devices() -> int:
    """CPU devices that the environment asks for."""
    forced = r"--xla_force_host_platform_device_count=(\d+)"
    found = re.findall(forced, os.environ.get("XLA_FLAGS", ""))
    asked = [*found[-1:], os.environ.get("JAX_NUM_CPU_DEVICES", "")]
    return max((int(number) for number in asked if number.isdecimal()), default=1)


if _devices() > 1:
    os.environ.setdefault("NPROC", str(_THREADS * _devices()))
