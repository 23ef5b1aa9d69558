"""The causal depthwise convolution over kept windows, activated: packed segments, and one token for each running row.

A sum of shifted products, some positions at a time in memory that stays in cache. In a pack the sum runs over the borders of segments as if
there were none; the first K - 1 positions of each are then made apart, from the window that was kept. short_convolution.py is the same for
training, where there is no window.

Letters: T packed positions, R rows, S segments, F convolution channels, K taps.
"""

import torch
from torch import Tensor

from .mixer import Mamba2Mixer
from .packing import Borders
from .short_scan import CACHED_BYTES

__all__ = ["ServingConvolution"]


class ServingConvolution:
    """The convolution of one Mamba-2 layer."""

    def __init__(self, mixer: Mamba2Mixer):
        self.mixer = mixer

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        """(K, F), oldest position first, and bias (F,)."""
        return self.mixer.conv1d.weight.squeeze(1).t().contiguous(), self.mixer.conv1d.bias

    def _activated(self, y: Tensor, out: Tensor) -> None:
        if self.mixer.has_silu:
            torch.ops.aten.silu.out(y, out=out)
        else:
            out.copy_(self.mixer.act(y))

    def rows(self, padded: Tensor) -> Tensor:
        """(R, K - 1 + L, F), windows in front -> (R, L, F)."""
        weight, bias = self._weights()
        length = padded.shape[1] - len(weight) + 1
        y = padded[:, :length] * weight[0] if bias is None else torch.addcmul(bias, padded[:, :length], weight[0])
        for tap in range(1, len(weight)):
            y.addcmul_(padded[:, tap : tap + length], weight[tap])
        result = torch.empty_like(y)
        self._activated(y, result)
        return result

    def packed(self, fed: Tensor, before: Tensor, borders: Borders) -> tuple[Tensor, Tensor]:
        """fed (T, F), windows before (S, K - 1, F) -> (T, F), and the windows after."""
        weight, bias = self._weights()
        taps, total = len(weight), len(fed)
        result = fed.new_empty(total, fed.shape[1])
        stretch = total if fed.is_cuda else max(1, CACHED_BYTES // (fed.shape[1] * fed.element_size()))
        for start in range(0, total, stretch):
            stop = min(start + stretch, total)
            y = fed[start:stop] * weight[-1] if bias is None else torch.addcmul(bias, fed[start:stop], weight[-1])
            for back in range(1, min(taps, stop)):
                first = max(start - back, 0)
                y[first + back - start :].addcmul_(fed[first : stop - back], weight[-1 - back])
            self._activated(y, result[start:stop])
        heads = fed.index_select(0, borders.heads).view_as(before)
        near = self.rows(torch.cat([before, heads], dim=1)).flatten(0, 1)
        result.index_copy_(0, borders.places, near if borders.kept is None else near.index_select(0, borders.kept))
        after = fed.index_select(0, borders.tails).view_as(before)
        if borders.from_window is not None:
            older = before.flatten(0, 1).index_select(0, borders.window_places).view_as(before)
            after = torch.where(borders.from_window, older, after)
        return result, after
