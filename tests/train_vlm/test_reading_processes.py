"""Processes that read for another one: they leave signals to it, and are gone when it is, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
# Items of a size that fills the pipe to the parent, which reads but the first ones.
PARENT = """
import sys, time
sys.path.insert(0, {root!r})
import torch
from train_vlm.reading_processes import reader_settings

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, number):
        if number == 20 and sys.argv[1] == "fails":
            raise OSError(5, "a disk that fails")
        return bytes(300_000)

items = iter(torch.utils.data.DataLoader(Items(), batch_size=None, collate_fn=lambda item: item, prefetch_factor=16, **reader_settings(2)))
next(items), next(items)  # one of each
print("ready", flush=True)
if sys.argv[1] == "waits":
    time.sleep(60)
count = 2 + sum(len(item) == 300_000 for item in items)
print(count, flush=True)
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are tied to their parents on Linux only")


def started(how: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """A process, and its readers, once it has read something."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(root=str(ROOT)), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True)  # fmt: skip
    assert parent.stdout.readline() == "ready\n", parent.stderr.read()
    readers = psutil.Process(parent.pid).children()
    assert len(readers) == 2
    return parent, readers


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_readers_are_gone_when_their_parent_is_killed(number):
    """Torch's see it, and then wait to hand over what nobody takes any more; SIGTERM did not end them."""
    parent, readers = started("waits")
    time.sleep(1.0)  # until the pipe is full
    parent.send_signal(number)
    parent.wait()
    gone, alive = psutil.wait_procs(readers, timeout=5)
    for reader in alive:
        reader.kill()
    parent.communicate()
    assert not alive and len(gone) == 2


def test_a_parent_with_an_error_ends():
    """Its error holds its reader fast, and Python, at its exit, asks children to end and waits for them for ever."""
    parent, readers = started("fails")
    try:
        output, error = parent.communicate(timeout=30)
    finally:
        parent.kill()
    assert (parent.returncode, output) == (1, "") and "a disk that fails" in error
    assert not psutil.wait_procs(readers, timeout=5)[1]


def test_what_asks_all_processes_to_end_takes_no_sample_away():
    parent, readers = started("reads")
    for reader in readers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(reader.pid, number)
    output, error = parent.communicate(timeout=60)
    assert (parent.returncode, output) == (0, "1000\n"), error
