"""Processes that read samples, pictures and shards for another one: how they are started, what they leave to it, and how they end.

They are forked by torch's DataLoader: what they read with cannot be pickled, which other ways of starting a process, Python's default from
3.14 on, would do; they touch no GPU.

What asks all processes of a run to end (Ctrl-C, a launcher's SIGTERM to a whole process tree) must not take the samples from the step that
is under way, so they do not listen. But then Python, which ends its children by SIGTERM and waits for them for ever, cannot end them
either: they end with their parent, by the kernel (Linux) and at its exit.
"""

import atexit
import multiprocessing
import multiprocessing.util  # noqa: F401 (its own handler at exit, which waits for children, must be older than ours: it runs later)
import os
import signal

from train_vlm.ending_together import tied_to_parent

__all__ = ["reader_settings"]

IGNORED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))


def _kill_readers() -> None:
    readers = [child for child in multiprocessing.active_children() if child.daemon]
    if readers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would tell of an error
    for reader in readers:
        reader.kill()


def reader_settings(count: int) -> dict:
    """What a DataLoader is told of its `count` reading processes; 0: none, this one reads."""
    if not count:
        return {"num_workers": 0}
    atexit.unregister(_kill_readers)
    atexit.register(_kill_readers)
    parent = os.getpid()

    def begin(worker: int) -> None:
        tied_to_parent(parent)
        signal.set_wakeup_fd(-1)  # forked: its parent's
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)

    return {"num_workers": count, "multiprocessing_context": "fork", "worker_init_fn": begin}
