"""The sum over taps of the causal depthwise convolution and its activation, forwards and backwards, over sequences laid end to end.

torch's convolution wants the transposed layout, copies to it and back, and is several times slower. Here the sum is K shifted
multiply-adds over positions of channels, some positions at a time in memory that stays in cache, float32 inside whatever the dtype
outside. Only the first K - 1 positions of a sequence are made apart, because only their windows reach over its border.

Letters: T positions (of all sequences together), K taps, F channels (in shapes), S sequences.
"""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fresh_memory import fresh

__all__ = ["Borders", "ShortConvolution"]

BLOCK_ELEMENTS = 262144
"""Positions times channels of one block: 1 MB of float32."""


class Borders:
    """For each offset below K - 1 the positions that are so far behind the start of their sequence, ascending, on host and device. Made
    once for all layers of a pack: on a GPU each making waits for what runs there."""

    def __init__(self, lengths: tuple[int, ...], taps: int, device):
        starts = list(accumulate(lengths, initial=0))[:-1]
        self.places = [[s + offset for s, length in zip(starts, lengths, strict=True) if length > offset] for offset in range(taps - 1)]
        self.where = [torch.tensor(places, dtype=torch.long, device=device) for places in self.places]

    def within(self, offset: int, start: int, stop: int) -> tuple[slice, Tensor]:
        """Which of the positions of this offset lie in the block, and where in it."""
        inside = slice(bisect_left(self.places[offset], start), bisect_left(self.places[offset], stop))
        return inside, self.where[offset][inside] - start


class _Taps:
    """One convolution over x (T, F): its weights in the dtype of the computation, and the right sums near borders."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, borders: Borders):
        self.x = x
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.taps = weight.to(self.dtype).t().flip(0).contiguous().unbind(0)  # newest position first, (F,) each
        self.bias = None if bias is None else bias.to(self.dtype)
        self.borders = borders
        self.near = [self._sums(where, offset + 1) for offset, where in enumerate(self.borders.where)]
        self.rows = min(len(x), max(32, BLOCK_ELEMENTS // x.shape[1])) if x.device.type == "cpu" else len(x)

    def _sums(self, where: Tensor, count: int) -> Tensor:
        """(places, F): sums over the newest `count` taps only."""
        sums = sum(self.x[where - back].to(self.dtype) * self.taps[back] for back in range(count))
        return sums if self.bias is None else sums + self.bias

    def buffer(self) -> Tensor:
        return self.x.new_empty(self.rows, self.x.shape[1], dtype=self.dtype)

    def blocks(self, out: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yields start, stop, x from K - 1 positions before start (or from 0) to stop, and their sums, which stand in `out`."""
        for start in range(0, len(self.x), self.rows):
            stop = min(start + self.rows, len(self.x))
            first = max(start - len(self.taps) + 1, 0)
            x, sums = self.x[first:stop].to(self.dtype), out[: stop - start]
            newest = x[start - first :]
            torch.mul(newest, self.taps[0], out=sums) if self.bias is None else torch.addcmul(self.bias, newest, self.taps[0], out=sums)
            for back in range(1, len(self.taps)):
                missing = max(back - start, 0)  # positions of the first block with nothing so far back
                sums[missing:].addcmul_(x[start - first - back + missing : len(x) - back], self.taps[back])
            for offset, near in enumerate(self.near):
                inside, rows = self.borders.within(offset, start, stop)
                sums.index_copy_(0, rows, near[inside])
            yield start, stop, x, sums


class ShortConvolution(torch.autograd.Function):
    """apply(x, weight, bias, borders, silu) -> y (T, F), with silu of the sum if asked.

    x (T, F): sequences end to end, whose `Borders` these are; weight (F, K); bias (F,) or None. y has x's dtype.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, borders, silu):
        ctx.save_for_backward(x, weight, bias)
        ctx.borders, ctx.silu = borders, silu
        convolution = _Taps(x, weight, bias, borders)
        y = fresh(x, *x.shape)
        for start, stop, _, sums in convolution.blocks(convolution.buffer()):
            y[start:stop] = sums.mul_(torch.sigmoid(sums)) if silu else sums
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, weight, bias = ctx.saved_tensors
        convolution = _Taps(x, weight, bias, ctx.borders)
        taps, dtype = convolution.taps, convolution.dtype
        grad_x = fresh(grad_y, *x.shape, dtype=dtype)
        grad_taps, grad_bias = grad_x.new_zeros(len(taps), x.shape[1]), grad_x.new_zeros(x.shape[1])
        product = convolution.buffer()
        for start, stop, x_block, grad in convolution.blocks(convolution.buffer()):
            given = grad_y[start:stop].to(dtype)
            if ctx.silu:
                torch.ops.aten.silu_backward.grad_input(given, grad, grad_input=grad)
            else:
                grad.copy_(given)
            if bias is not None:
                grad_bias += grad.sum(0)
            before = len(x_block) - len(grad)
            for back, tap in enumerate(taps):
                if back:
                    # A window that starts inside its sequence does not go so far back. Offsets come in turn: zeros set before stay.
                    grad.index_fill_(0, convolution.borders.within(back - 1, start, stop)[1], 0.0)
                missing = max(back - start, 0)
                reached = slice(start - back + missing, stop - back)
                if back:
                    grad_x[reached].addcmul_(grad[missing:], tap)
                else:
                    torch.mul(grad, tap, out=grad_x[reached])
                partial = torch.mul(
                    grad[missing:], x_block[before - back + missing : len(x_block) - back], out=product[: len(grad) - missing]
                )
                grad_taps[back] += partial.sum(0)
        grad_weight = grad_taps.flip(0).t().to(weight.dtype)
        return grad_x.to(x.dtype), grad_weight, None if bias is None else grad_bias.to(bias.dtype), None, None
