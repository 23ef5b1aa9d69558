"""One process at a time for what a run writes: a second one on the same folder would remove checkpoints under the first one's hands.

The lock is the kernel's (POSIX record lock) on a hidden file beside the folder: it ends with its process, however that ends, and reading
processes forked from it do not hold it on. The file says who holds it; one left by a kill is only a name on disk.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["holder_of", "is_gone", "lock_file", "only_one", "wait_while_held"]

LONGEST_WAIT_SECONDS = 15.0  # for a process that is dying
FLOCK = "@hhqqi"  # struct flock of 64-bit Linux: kind, whence, start, length, owner


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


def _named(text: str) -> tuple[str, str]:
    """(process, machine) of a lock file's text."""
    process, _, host = text.strip().partition(" on ")
    return process, host


def _taken_words(out: str | Path, process: str, host: str) -> str:
    elsewhere = host not in ("", socket.gethostname())
    return (
        f"{out} belongs to a run that is still going on (process {process or 'unknown'}{f' on {host}' if elsewhere else ''}); wait "
        f"for it, end it{f' (kill {process})' if process.isdigit() and not elsewhere else ''}, or give another out"
        f"{'; after a crash of that machine its lock goes within minutes' if elsewhere else ''}"
    )


def holder_of(out: str | Path) -> tuple[int, str] | None:
    """(process, machine) that has `out`, or None. Asks and takes nothing, but is not for a process that has it itself: closing the file it
    would lose it. Raises OSError where it cannot be asked (another user's folder, a file system without locks)."""
    try:
        handle = os.open(lock_file(out), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, owner = struct.unpack(FLOCK, fcntl.fcntl(handle, fcntl.F_GETLK, asked))
        if kind == fcntl.F_UNLCK:
            return None
        process, host = _named(os.pread(handle, 1000, 0).decode(errors="replace"))
    finally:
        os.close(handle)
    if host in ("", socket.gethostname()):  # the kernel knows better than the file, which is written after the lock is taken
        return owner, socket.gethostname()
    return (int(process), host) if process.isdigit() else None


def is_gone(holder: tuple[int, str]) -> bool:
    """Whether a process that had a folder is over, as far as can be known here: it lets go of it some moments before."""
    process, host = holder
    if host != socket.gethostname():
        return True
    try:
        os.kill(process, 0)
    except OSError:
        return True
    stat = Path(f"/proc/{process}/stat")  # one that nobody has waited for is over, too
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_while_held(out: str | Path, seconds: float) -> None:
    """Let a run that is ending, and may still have its ranks' meeting point, end first. To be called before the ranks meet, so that whoever
    has `out` is another run's. Raises ValueError, naming the process, when it still has it after `seconds`."""
    until, is_told, before = time.monotonic() + seconds, os.environ.get("RANK", "0") != "0", None
    while True:
        try:
            holder = holder_of(out)
        except OSError:  # `only_one` tells
            return
        if holder is None and before is not None and not is_gone(before):
            holder = before
        if holder is None:
            return
        before = holder
        if time.monotonic() > until:
            raise ValueError(_taken_words(out, str(holder[0]), holder[1]))
        if not is_told:
            print(f"waiting up to {seconds:.0f} s for process {holder[0]} on {holder[1]}, which still has {out}", flush=True)
            is_told = True
        time.sleep(0.2)


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
            process, host = _named(path.read_text(encoding="utf-8") if path.is_file() else "")
            raise ValueError(_taken_words(out, process, host))
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
