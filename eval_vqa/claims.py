"""Which images of a run are being answered, and by which of its processes.

Any number of processes may work on one folder: ranks of a launcher, several machines on a shared disk, or the same command started twice.
Each image is claimed with a lock on one byte of OUT/claims.lock before its questions are asked. The kernel releases a lock when its
process ends, however it ends, so a claim is never stale: what a killed process had begun is free at once, for the others or for the
next start, with another number of processes too. Nothing is exchanged over a network and nobody waits for a process that died.

The locks are POSIX record locks: a process must open the file only once (closing any handle of it drops them all), and the folder must
lie on a file system that has them (local disks, NFS, Lustre mounted with flock).
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Claims"]

ALIVE, WRITING, FIRST_IMAGE = 0, 1, 2  # bytes of the file: shared by all that run; held while a line is written; one an image


class Claims:
    """The locks of one process on the run in `out`. Use it as a context manager, or call close().

    Raises OSError where the file system has no locks.
    """

    def __init__(self, out: Path):
        self.path = out / "claims.lock"
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self.alone = self._lock(ALIVE)  # nobody else runs at this moment; what needs that is done before join()
        except OSError as error:
            os.close(self._file)
            raise OSError(f"{self.path} cannot be locked ({error}); choose an --out on a file system with file locks") from None

    def join(self) -> None:
        """Count as one of those that run: from here on no other process finds itself alone."""
        fcntl.lockf(self._file, fcntl.LOCK_SH, 1, ALIVE)

    def claim(self, image: int, *, wait: bool = False) -> bool:
        """Take the image with this number if no other process has it; with `wait`, once it has let go."""
        return self._lock(FIRST_IMAGE + image, wait=wait)

    def release(self, image: int) -> None:
        """Let go of an image."""
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, FIRST_IMAGE + image)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Held by one process at a time, for as long as it takes to write a line."""
        self._lock(WRITING, wait=True)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, WRITING)

    def close(self) -> None:
        """Let go of everything."""
        os.close(self._file)

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _lock(self, byte: int, *, wait: bool = False) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: another process has it
            return False
        return True
