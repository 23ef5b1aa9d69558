"""How many cores this process may use: of a machine, a container or a job that has some of them."""

import os

__all__ = ["usable_cores"]


def usable_cores() -> int:
    """At least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
