"""Messages between the processes of one host, through pages of memory that all of them see.

gloo sends through sockets, by threads of its own. Where every core computes, those threads wait for their turn: a gather of 1.6 kB amid
products takes 1 to 2 ms on two cores, 0.1 to 0.4 ms here (benchmarks/gather.py). BatchNorm over ranks asks for some thirty in a step.

Every rank has a number, how many messages it has left, and two places for them. It writes a message into one place, then its number, and
reads the others' places once their numbers have come as far. The next message goes into the other place; before the first place is
written again, everybody has left that next message, so has read this one. That a number is never seen before its message holds on x86,
where stores keep their order; elsewhere there are no pages.
"""

import mmap
import os
import platform
import secrets
import select
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["SharedPages", "open_pages"]

LINE = 64
"""Bytes that processors pass around together: one for each rank's number, so that nobody's writing holds up another's reading."""
AWAKE_SECONDS, NAP_SECONDS = 0.02, 0.0002
"""Who waits gives its core away at every look; only after a while it sleeps between looks, for being woken takes longer than a message."""
PATIENCE_SECONDS = 1800.0
"""As torch.distributed's own."""


class SharedPages:
    """The pages of one process group, on one of its ranks.

    memory: (LINE + R * LINE + 2 * R * capacity) bytes shared by R ranks; capacity: bytes of the longest message, a multiple of LINE;
    processes: of each rank a descriptor that can be read once it has ended, or None.
    """

    def __init__(self, memory: mmap.mmap, rank: int, ranks: int, capacity: int, processes: list[int | None]):
        self.rank, self.ranks, self.capacity, self.processes = rank, ranks, capacity, processes
        self.sent = 0
        # One step of eight bytes each: a number is never seen half written.
        self._numbers = memoryview(memory).cast("q")[LINE // 8 : LINE // 8 * (ranks + 1) : LINE // 8]
        places = torch.frombuffer(memory, dtype=torch.uint8, offset=LINE * (ranks + 1), count=2 * ranks * capacity)
        self._places = places.view(2, ranks, capacity)

    def gather(self, own: Tensor) -> Tensor:
        """own (n,), on the CPU, as long and of the same dtype on every rank -> (R, n), the same on every rank, in the order of the ranks.

        Every rank calls it, as often. Raises RuntimeError when another rank has ended or has not come within half an hour.
        """
        self.sent += 1
        places = self._places[self.sent % 2].view(own.dtype)[:, : len(own)]
        places[self.rank] = own.detach()
        self._numbers[self.rank] = self.sent
        for other in range(self.ranks):
            self._wait_for(other)
        return places.clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Look at the other processes no more; the pages go when nothing refers to them."""
        for process in self.processes:
            if process is not None:
                os.close(process)
        self.processes = [None] * self.ranks

    def _wait_for(self, other: int) -> None:
        begun, looked = time.monotonic(), 0.0
        while self._numbers[other] < self.sent:
            waited = time.monotonic() - begun
            if waited < AWAKE_SECONDS:
                os.sched_yield()
                continue
            time.sleep(NAP_SECONDS)
            if waited - looked < 1.0:
                continue
            looked, process = waited, self.processes[other]
            if process is not None and select.select([process], [], [], 0)[0] and self._numbers[other] < self.sent:
                raise RuntimeError(f"rank {other} has ended; rank {self.rank} was waiting for its message {self.sent}")
            if waited > PATIENCE_SECONDS:
                raise RuntimeError(f"rank {other} has sent no message {self.sent} within {PATIENCE_SECONDS / 60:.0f} minutes")


def open_pages(capacity: int) -> SharedPages | None:
    """Pages for messages of `capacity` bytes between all ranks of the default process group, or None, on every rank, where they are not
    all processes of one Linux host with x86 processors that may look at each other. Every rank calls it.

    The pages have no name and go with the last process that has them: a killed run leaves nothing behind.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    capacity = -(-capacity // LINE) * LINE
    size = LINE * (ranks + 1) + 2 * ranks * capacity
    descriptor, memory, told = None, None, [None]
    is_suited = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
    try:
        if rank == 0 and is_suited:
            descriptor = os.memfd_create("nemotron-h-vision ranks")
            os.posix_fallocate(descriptor, 0, size)  # too little memory is an error here, not a crash at the first write
            memory, seal = mmap.mmap(descriptor, size), secrets.token_bytes(16)
            memory[: len(seal)] = seal
            told = [(os.getpid(), descriptor, seal)]
    except (OSError, AttributeError):
        memory = None
    dist.broadcast_object_list(told, 0)
    try:
        if told[0] is not None and rank and is_suited:
            process, number, seal = told[0]
            descriptor = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
            memory = mmap.mmap(descriptor, size)
            if memory[: len(seal)] != seal:  # the same numbers on another host
                memory = None
    except (OSError, ValueError):
        memory = None
    everyone: list[int | None] = [None] * ranks
    dist.all_gather_object(everyone, None if memory is None else os.getpid())
    if descriptor is not None:
        os.close(descriptor)
    if None in everyone:
        return None
    return SharedPages(memory, rank, ranks, capacity, [_process(number) for number in everyone])


def _process(number: int) -> int | None:
    try:
        return os.pidfd_open(number)
    except (OSError, AttributeError):
        return None
