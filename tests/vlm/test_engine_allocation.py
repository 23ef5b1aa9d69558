"""Freed memory is kept for the next step: counted by page faults, in a process of its own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from vlm.engine.allocation import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        buffers = [torch.ones(size * 2**18) for size in [6] * 10]  # MiB
        del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults()
as_it_comes = faults()
told = keep_freed_memory()
faults()
print(int(told), as_it_comes, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's allocator")
def test_buffers_of_megabytes_are_not_mapped_again():
    # glibc raises its threshold by itself when a large buffer is freed, which some imports do and some do not; unless it is told one.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=True, env=environment)
    told, as_it_comes, kept = map(int, done.stdout.split())
    if not told:
        pytest.skip("another allocator than glibc's")
    assert as_it_comes > 500 and kept < as_it_comes / 10


def test_another_allocator_is_left_alone(monkeypatch):
    import vlm.engine.allocation as allocation

    monkeypatch.setattr(allocation.sys, "platform", "darwin")
    assert allocation.keep_freed_memory() is False
    monkeypatch.setattr(allocation.sys, "platform", "linux")
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: object())
    assert allocation.keep_freed_memory() is False
