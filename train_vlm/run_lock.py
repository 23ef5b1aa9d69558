"""One process at a time for what a run writes: a second one on the same folder would remove checkpoints under the first one's hands.

The lock is the kernel's (POSIX record lock) on a hidden file beside the folder: it ends with its process, however that ends, and reading
processes forked from it do not hold it on. The file says who holds it; one left by a kill is only a name on disk.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["lock_file", "only_one"]

LONGEST_WAIT_SECONDS = 15.0  # for a process that is dying


def lock_file(out: str | Path) -> Path:
    return Path(out).with_name(f".{Path(out).name}.lock")


def _take(path: Path) -> int | None:
    """The opened and locked file, or None while another process holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == os.stat(path).st_ino:  # else its holder removed it since it was opened
            return handle
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            os.close(handle)
            raise
    os.close(handle)
    return None


@contextlib.contextmanager
def only_one(out: str | Path, *, wait_seconds: float = LONGEST_WAIT_SECONDS) -> Iterator[None]:
    """Within the block no other process has `out`. Does nothing, and says so, where the file system knows no locks.

    Raises ValueError, naming the process, when another one still has it after `wait_seconds`.
    """
    path = lock_file(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    until, handle = time.monotonic() + wait_seconds, None
    while handle is None:
        try:
            handle = _take(path)
        except OSError as error:
            print(f"no lock on {out} ({error.strerror}): see to it that no second run writes there", flush=True)
            break
        if handle is None and time.monotonic() > until:
            process, _, host = (path.read_text(encoding="utf-8").strip() if path.is_file() else "").partition(" on ")
            elsewhere = host not in ("", socket.gethostname())
            raise ValueError(
                f"{out} belongs to a run that is still going on (process {process or 'unknown'}{f' on {host}' if elsewhere else ''}); wait "
                f"for it, end it{f' (kill {process})' if process.isdigit() and not elsewhere else ''}, or give another out"
                f"{'; after a crash of that machine its lock goes within minutes' if elsewhere else ''}"
            )
        if handle is None:
            time.sleep(0.1)
    try:
        if handle is not None:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)  # while it is held: nobody else can have it
            os.close(handle)
