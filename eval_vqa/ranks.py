"""One process of several: which one this is, and starting them without a launcher.

torchrun, deepspeed and `--ranks N` all say by environment variables who is who. Nothing else is shared: the processes divide the work by
claims on files (`eval_vqa.claims`), so they need no network, may start and stop at any time, and may be of any number.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

__all__ = ["Rank", "start_ranks", "tell", "this_rank"]

PARENT = "NEMOTRON_H_VISION_EVAL_PARENT"  # process id of the one that started the ranks; they end when it is gone
POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class Rank:
    """number 0 shows progress and completes the run; local: number on this machine, for the choice of a GPU."""

    number: int = 0
    world: int = 1
    local: int = 0
    parent: int | None = None

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def check_parent(self) -> None:
        """Raises KeyboardInterrupt when the process that started this rank is gone."""
        if self.parent is not None and os.getppid() != self.parent:
            raise KeyboardInterrupt

    def device(self, wanted: str | None) -> str:
        """Where this rank computes: what was asked for, else the GPU there is; of several processes on GPUs each has its own."""
        if wanted not in (None, "cuda"):
            return wanted
        import torch

        from vlm.device import default_device

        device = wanted or default_device()
        gpus = torch.cuda.device_count() if device == "cuda" and self.world > 1 else 0
        return f"cuda:{self.local % gpus}" if gpus else device


def tell(line: str) -> None:
    """`line` to standard error in one write: print() can make two of it, and another rank's line comes between."""
    sys.stderr.write(line + "\n")


def this_rank() -> Rank:
    """Read from RANK, WORLD_SIZE and LOCAL_RANK; alone without them. Raises ValueError for values that are no such numbers."""
    values = {}
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = os.environ.get(name, str(default))
        if not text.isdigit():
            raise ValueError(f"the environment variable {name} is {text!r}; expected a whole number, as torchrun and deepspeed set it")
        values[name] = int(text)
    parent = os.environ.get(PARENT)
    return Rank(values["RANK"], max(1, values["WORLD_SIZE"]), values["LOCAL_RANK"], int(parent) if parent else None)


def start_ranks(count: int, command: list[str]) -> int:
    """Runs `command` in `count` processes and returns the exit code of the run: that of the first rank, or of the first that failed.

    When one fails, or on Ctrl-C (KeyboardInterrupt goes on), the others are ended; what they answered stays. A processor's cores are
    divided among them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // count)), **os.environ, "WORLD_SIZE": str(count), PARENT: str(os.getpid())}
    ranks: list[subprocess.Popen] = []
    try:
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is this process's affair, and one line, not one a rank
        for number in range(count):
            ranks.append(subprocess.Popen([sys.executable, *command], env={**environment, "RANK": str(number), "LOCAL_RANK": str(number)}))
        signal.signal(signal.SIGINT, usual)
        while any(rank.poll() is None for rank in ranks) and not _failures(ranks):
            time.sleep(POLL_SECONDS)
        failed = next(iter(_failures(ranks)), None)
        code = ranks[0].returncode if failed is None else failed
        return code if code >= 0 else 128 - code  # a killed process, as a shell says it
    finally:
        _end(ranks)


def _failures(ranks: list[subprocess.Popen]) -> list[int]:
    """Exit codes of those that ended without having done their part."""
    return [rank.returncode for rank in ranks if rank.poll() not in (None, 0, 1)]


def _end(ranks: list[subprocess.Popen]) -> None:
    """Ends those that still run, in whatever they are; a line that was begun is cut off by the next writer."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    end = time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        try:
            rank.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
