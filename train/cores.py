"""How many cores of the machine this process may use."""

import os


def usable() -> int:
    """At least 1. macOS and Windows know no affinity, so there it is all cores."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
