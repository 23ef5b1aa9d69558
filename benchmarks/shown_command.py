"""The command that stands beside a result: what was measured, not where it was put."""

import sys

__all__ = ["shown_command"]

FOLDERS = ("--work", "--out")


def shown_command(program: str) -> str:
    """`python benchmarks/PROGRAM` with this process's arguments, but for folders, which another machine does not have."""
    shown = sys.argv[1:]
    for option in FOLDERS:
        if option in shown:
            del shown[(place := shown.index(option)) : place + 2]
    return " ".join([f"python benchmarks/{program}", *shown])
