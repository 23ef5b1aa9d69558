"""Rows for words that are added to a trained decoder's vocabulary, made from the rows it has.

Input embeddings: the mean of all rows plus noise of each column's own standard deviation, so that a new word is as large as a trained one
and no two tile tags look alike to a frozen decoder. Output head: the mean row, so that a new word starts with the average logit and
never above the words that were trained.

The weights may be larger than the memory at hand: they come as blocks of rows, and the same blocks give the same rows on disk and in
memory, bit for bit.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["BLOCK_ROWS", "added_rows", "padded_rows", "row_blocks"]

BLOCK_ROWS = 4096
ROW_MULTIPLE = 64  # matrix sizes that GPUs like


def padded_rows(vocabulary: int) -> int:
    """Rows of an embedding for so many words."""
    return -(-vocabulary // ROW_MULTIPLE) * ROW_MULTIPLE


def row_blocks(rows: int, read: Callable[[int, int], Tensor]) -> Iterator[Tensor]:
    """`read(start, stop)` for each block of rows in turn."""
    for start in range(0, rows, BLOCK_ROWS):
        yield read(start, min(start + BLOCK_ROWS, rows))


def added_rows(blocks: Iterator[Tensor], count: int, *, scattered: bool, seed: int) -> Tensor:
    """Blocks (rows, D) of a trained weight -> `count` new rows (count, D) in its dtype: scattered (inputs) or the mean (outputs)."""
    rows, total, squares, dtype = 0, 0.0, 0.0, None
    for block in blocks:
        rows, dtype = rows + len(block), block.dtype
        block = block.double()
        total, squares = total + block.sum(0), squares + block.square().sum(0)
    mean = total / rows
    new = mean.repeat(count, 1)
    if scattered:
        deviation = (squares / rows - mean.square()).clamp(min=0.0).sqrt()
        new += deviation * torch.randn(new.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return new.to(dtype)
