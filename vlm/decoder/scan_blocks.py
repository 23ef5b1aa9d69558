"""How the scan's work is cut up: pieces of equal chunks, blocks of some chunks of one group of heads, buffers that serve block after block.

Fresh memory costs more than the arithmetic in it: the system has to find and clear every page, and nothing of it is in cache. So all
intermediates live in buffers of the size of one block.

Letters: B rows, T positions, H heads, G groups, R = H / G, P head width; c chunks, k chunks of a block, L positions of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .fresh_memory import fresh
from .scan_decay import Decay

__all__ = ["Block", "Buffers", "Piece", "blocks_of", "by_group", "chunks_per_block", "decay_of", "per_position", "pieces_of"]

BLOCK_ELEMENTS = 262144
"""Size of a buffer: 1 MB of float32. Smaller ones lie closer to the core, but then the calls count."""


@dataclass(frozen=True)
class Piece:
    """Positions [start, start + count * span): `count` chunks of `span`. A length has at most two: whole chunks, and the rest."""

    start: int
    count: int
    span: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.span

    def chunked(self, tensor: Tensor) -> Tensor:
        """(B, T, ...) -> (B, c, L, ...)"""
        return tensor[:, self.start : self.stop].unflatten(1, (self.count, self.span))


@dataclass(frozen=True)
class Block:
    row: int
    group: int
    chunks: slice
    heads: slice

    @property
    def count(self) -> int:
        return self.chunks.stop - self.chunks.start


def pieces_of(length: int, span: int) -> list[Piece]:
    whole, rest = divmod(length, span)
    pieces = [Piece(0, whole, span)] if whole else []
    return pieces + ([Piece(whole * span, 1, rest)] if rest else [])


def by_group(piece: Piece, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, G, N) -> (B, G, c, L, N) of this dtype, contiguous: a group's rows lie a page apart otherwise, which no cache likes."""
    chunked = piece.chunked(tensor)  # B c L G N
    batch, count, span, groups, size = chunked.shape
    return fresh(tensor, batch, groups, count, span, size, dtype=dtype).copy_(chunked.movedim(3, 1))


def chunks_per_block(piece: Piece, per_group: int, width: int, device: torch.device) -> int:
    """On a processor what fits a buffer; elsewhere all at once, since a launch costs more than memory."""
    if device.type != "cpu":
        return piece.count
    return min(piece.count, max(1, BLOCK_ELEMENTS // (per_group * piece.span * max(piece.span, width))))


def blocks_of(piece: Piece, batch: int, groups: int, per_group: int, at_once: int, backwards: bool = False) -> Iterator[Block]:
    starts = range(0, piece.count, at_once)
    for row in range(batch):
        for group in range(groups):
            for first in reversed(starts) if backwards else starts:
                chunks = slice(first, min(first + at_once, piece.count))
                yield Block(row, group, chunks, slice(group * per_group, (group + 1) * per_group))


def decay_of(piece: Piece, steps: Tensor, A: Tensor, segments: Tensor | None) -> Decay:
    chunked = piece.chunked(steps).transpose(2, 3).contiguous()  # B c H L
    if segments is None:
        return Decay.within(chunked, A, None, None)
    return Decay.within(chunked, A, piece.chunked(segments), segments[:, max(piece.start - 1, 0)])


class Buffers:
    """Named pieces of memory that are used again from block to block."""

    def __init__(self, like: Tensor):
        self.like, self.kept = like, {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = 1
        for extent in shape:
            size *= extent
        kept = self.kept.get(name)
        if kept is None or kept.numel() < size:
            kept = self.kept[name] = self.like.new_empty(size)
        return kept[:size].view(shape)

    def load(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in the dtype of the computation: itself, or a copy in a buffer."""
        return tensor if tensor.dtype == self.like.dtype else self(name, *tensor.shape).copy_(tensor)


def per_position(D: Tensor | None, heads: int, width: int) -> Tensor | None:
    """D (H,) or (H, P) -> (H, 1, P)"""
    return None if D is None else (D if D.ndim == 2 else D[:, None].expand(heads, width))[:, None]
