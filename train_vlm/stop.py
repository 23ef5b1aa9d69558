"""Ask a run to end: it finishes its step, saves, and ends with exit code 4 (stopping.py).

    python -m train_vlm.stop OUT [--wait SECONDS]      OUT: the `out` of its recipe; on the machine of its first rank

One rank is asked, and tells the others. So the launcher hears of it from its ranks alone and passes their exit code on, which it does not
when it is signalled itself. Exit code 0: asked, and with --wait ended; 1: still there after SECONDS; 2: no run there, or elsewhere.
"""

import argparse
import os
import signal
import socket
import sys
import time

from train_vlm.run_lock import holder_of, is_gone

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train_vlm.stop", description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT", help="output folder of the run")
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="until the run has ended, at most so long (default: not)"
    )
    options = parser.parse_args(arguments)
    try:
        holder = holder_of(options.out)
    except OSError as error:
        print(f"stop: it cannot be asked who writes to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    if holder is None:
        print(f"stop: no run writes to {options.out}", file=sys.stderr)
        return 2
    process, host = holder
    if host != socket.gethostname():
        print(f"stop: the run's first rank is process {process} on {host}; give the command there", file=sys.stderr)
        return 2
    try:
        os.kill(process, signal.SIGUSR1)  # as often as one likes: a second SIGTERM would end it at once
    except OSError as error:
        print(f"stop: process {process} of {options.out} cannot be asked: {error.strerror}", file=sys.stderr)
        return 2
    print(f"asked process {process} to end", flush=True)
    until = time.monotonic() + options.wait
    while options.wait and not (holder_of(options.out) != holder and is_gone(holder)):
        if time.monotonic() > until:
            print(f"stop: process {process} is still there after {options.wait:g} s", file=sys.stderr)
            return 1
        time.sleep(0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
