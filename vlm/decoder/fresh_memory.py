"""Memory for large results that is not yet the process's own, asked for in large pages.

The system hands out fresh memory four kilobytes at a time, at the first touch, and clears each page: the result of one scan at the 8B
layer's shape, 67 MB, took 22 to 28 ms to fill on two cores; 5 ms in pages of two megabytes, and 2 to 3 ms where the pages are there
already. Where large pages are given on request only (the usual setting of Linux), this is the request; anywhere else nothing happens.
"""

import ctypes
import sys
from functools import cache

import torch
from torch import Tensor

__all__ = ["fresh"]

MADV_HUGEPAGE = 14
PAGE_BYTES, WORTHWHILE_BYTES = 4096, 4 * 2**20


@cache
def _madvise():
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def fresh(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape)`, uninitialised, of `like`'s device and of its dtype unless another is given."""
    made = like.new_empty(shape, dtype=dtype)
    if torch.compiler.is_compiling():  # a tensor that is only traced has no address
        return made
    if made.device.type == "cpu" and made.nbytes >= WORTHWHILE_BYTES and (advise := _madvise()):
        start = -(-made.data_ptr() // PAGE_BYTES) * PAGE_BYTES
        stop = (made.data_ptr() + made.nbytes) // PAGE_BYTES * PAGE_BYTES
        advise(start, stop - start, MADV_HUGEPAGE)  # a hint: what it answers changes nothing
    return made
