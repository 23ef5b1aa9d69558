"""Processes that end with the one that started them, also when that one is killed: what nobody waits for must not go on writing.

    python train_vlm/ending_together.py PARENT COMMAND ...      COMMAND, killed by the kernel when its parent, process PARENT, ends

A program started by us is tied to its parent by the kernel (Linux; elsewhere nothing happens). A rank has DeepSpeed's or torch's launcher
above it, two processes deep, and those tie nothing: it keeps an eye on them itself, and on the quickstart that started them. When one of
them ends, the rank is asked to end (SIGTERM; in the middle of training it saves first, see stopping.py), and killed if it is still there
after GRACE_SECONDS. A user's shell is no launcher: what ends with a terminal is decided by SIGHUP, which nohup takes away.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

__all__ = ["GRACE_SECONDS", "STARTED_BY", "end_with_launchers", "is_there", "launchers_above", "tied", "tied_to_parent"]

STARTED_BY = "TRAIN_VLM_STARTED_BY"  # process id of the quickstart, for ranks below launchers
PR_SET_PDEATHSIG = 1
LOOK_SECONDS = 0.5
GRACE_SECONDS = 60.0
LAUNCHERS = ("deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "torch.distributed.launch")


def tied_to_parent(parent: int) -> None:
    """From now on the kernel kills this process when `parent`, which started it, ends. Exits when it has ended already."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # kept by exec, not by children
    if os.getppid() != parent:
        sys.exit(1)


def tied(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command, to be started by this process, that ends with it."""
    if not sys.platform.startswith("linux"):
        return command
    return (sys.executable, "-S", os.path.abspath(__file__), str(os.getpid()), *command)


def launchers_above() -> list:
    """The launchers that started this rank, the nearest first, as psutil's processes."""
    try:
        import psutil
    except ImportError:  # DeepSpeed brings it: without both there is a plan at most, or an error with the command that installs them
        return []

    found = []
    with contextlib.suppress(psutil.Error):  # gone while it was asked
        for above in psutil.Process().parents():
            if not any(os.path.basename(word) in LAUNCHERS for word in above.cmdline()[:8]):
                break
            found.append(above)
    return found


def _quickstart_above() -> list:
    """The quickstart that this rank belongs to, if any, as psutil's process. Exits when it is gone already."""
    if not (parent := os.environ.get(STARTED_BY)):
        return []
    import psutil

    try:
        return [psutil.Process(int(parent))]
    except psutil.NoSuchProcess:
        sys.exit(1)


def is_there(process) -> bool:
    """Whether one of psutil's processes still runs."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _look_after(launchers: list) -> None:
    while all(map(is_there, launchers)):
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def end_with_launchers() -> None:
    """Called by a rank before anything slow is imported: a thread ends this process soon after one of its launchers has ended."""
    if launchers := [*_quickstart_above(), *launchers_above()]:
        threading.Thread(target=_look_after, args=(launchers,), daemon=True).start()


if __name__ == "__main__":
    tied_to_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
