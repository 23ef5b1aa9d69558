"""Memory for large results: in large pages, and kept for the next result when one is gone.

The system hands out fresh memory four kilobytes at a time, at the first touch, and clears each page: the result of one scan at the 8B
layer's shape, 67 MB, took 22 to 28 ms to fill on two cores; 5 ms in pages of two megabytes. On a virtual machine even those came dear:
forward and backward of that scan took 720 to 900 ms where other work had freed and taken memory in between, and 480 ms in memory that was
there already. So large pieces are not given back when their tensor is gone, up to a limit.

On Linux's processors only; anywhere else, and for small results, `fresh` is `new_empty`.
"""

import contextlib
import ctypes
import mmap
import sys
from functools import cache

import torch
from torch import Tensor

__all__ = ["fresh"]

PAGE_BYTES = 2 * 2**20
WORTHWHILE_BYTES = 4 * 2**20
MOST_IDLE_BYTES = 2**29
"""What waits for another use at most: above it the oldest pieces go back to the system."""
MOST_SLACK = 1.5
"""A piece serves for a result that it is at most so many times too large for."""


class _Idle:
    """Pieces whose tensors are gone, oldest first.

    A piece comes back from whatever thread drops the last tensor over it, in the middle of anything, this class's own methods among them. A
    lock would wait for itself; so every change is one call on a list, which nothing comes between.
    """

    def __init__(self):
        self.pieces: list[mmap.mmap] = []

    def take(self, size: int) -> mmap.mmap | None:
        """The smallest that fits."""
        for piece in sorted((piece for piece in self.pieces[:] if size <= len(piece) <= MOST_SLACK * size), key=len):
            try:
                self.pieces.remove(piece)
            except ValueError:  # another thread was faster
                continue
            return piece
        return None

    def put(self, piece: mmap.mmap) -> None:
        self.pieces.append(piece)
        while sum(len(each) for each in self.pieces[:]) > MOST_IDLE_BYTES:
            try:
                self.pieces.pop(0)  # with its last reference it goes back to the system
            except IndexError:
                return


IDLE = _Idle()


def _given_back(self) -> None:
    if IDLE is not None:  # at the end of the program names are gone before objects
        IDLE.put(self.piece)


@cache
def _holder(size: int) -> type:
    """A kind of buffer of this size that puts its piece back when nobody holds it any more."""
    return type("Holder", (ctypes.c_uint8 * size,), {"__del__": _given_back})


def _rounded(size: int) -> int:
    """Up to an eighth more, so that results of nearly the same size can follow each other."""
    step = max(PAGE_BYTES, 1 << max(size.bit_length() - 4, 0))
    return -(-size // step) * step


def _piece(size: int) -> mmap.mmap:
    """From those that wait, or new, asked for in large pages. Raises OSError when there is no memory."""
    found = IDLE.take(size)
    if found is None:
        found = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # a system without large pages
            found.madvise(mmap.MADV_HUGEPAGE)
    return found


def _pooled(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
    room = _rounded(size)
    piece = _piece(room + PAGE_BYTES)  # so that it can begin where a page does
    start = -ctypes.addressof(ctypes.c_uint8.from_buffer(piece)) % PAGE_BYTES
    holder = _holder(room).from_buffer(piece, start)
    holder.piece = piece
    storage = torch.frombuffer(holder, dtype=torch.uint8, count=size).untyped_storage()  # which holds the holder
    made = like.new_empty(0, dtype=dtype)
    with torch.no_grad():
        made.set_(storage, 0, shape)  # not a view: what autograd returns may be changed in place
    return made


def _can_pool(like: Tensor) -> bool:
    """Plain memory of a processor; what is only traced has none."""
    is_plain = type(like) in (Tensor, torch.nn.Parameter) and like.device.type == "cpu"
    return is_plain and sys.platform.startswith("linux") and not torch.compiler.is_compiling()


def fresh(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape)`, uninitialised, of `like`'s device and of its dtype unless another is given."""
    dtype = dtype or like.dtype
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    if size >= WORTHWHILE_BYTES and _can_pool(like):
        try:
            return _pooled(like, shape, dtype, size)
        except OSError:  # no memory: torch says so in its own words
            IDLE.pieces.clear()
    return like.new_empty(shape, dtype=dtype)
