"""Keep freed memory for the next step, of the engine or of training, instead of handing it to the system and getting it back page by page.

A layer's activations are some megabytes. glibc maps buffers of that size afresh and unmaps them when they are freed; each page is then
cleared by the kernel at its first touch. That was 17 % of the processor time of 60 questions about 60 pictures on the tiny model, and some
6 % of its training step.
"""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # names of mallopt's parameters in malloc.h
LARGEST_KEPT_BYTES = 2**25  # the most that glibc allows: larger buffers are mapped as before
MOST_FREE_BYTES = 2**28  # free memory at the end of the heap beyond this goes back to the system


def keep_freed_memory() -> bool:
    """Tell glibc's allocator, for the whole process; False where it is another one (other systems, or another allocator preloaded)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST_KEPT_BYTES)) and bool(mallopt(TRIM_THRESHOLD, MOST_FREE_BYTES))
