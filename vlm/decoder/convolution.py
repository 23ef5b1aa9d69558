"""The short causal depthwise convolution in front of the scan, for packed rows, padded rows and continued sequences.

A window must not reach into the neighbour of a packed row, nor into padding. Packed sequences are spread out with K - 1 zeros between
them, so that the plain sum over taps is right everywhere.

Letters: B batch, T positions, K taps, F channels (in shapes), S sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Layout

__all__ = ["causal_convolution"]


def _sum_over_taps(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """padded (B, T + K - 1, F), weight (F, K): the valid outputs (B, T, F)."""
    return F.conv1d(padded.transpose(1, 2), weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, state: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x (B, T, F), weight (F, K), bias (F,) -> y (B, T, F) and the last K - 1 inputs of each row (B, K - 1, F).

    `state` (B, K - 1, F) holds the inputs before the first position (zeros when None). For a packed layout no state is taken or given.
    """
    taps = weight.shape[1]
    batch, _, channels = x.shape
    if layout.is_packed:
        if state is not None:
            raise ValueError("a packed row cannot continue a kept state; use one sequence a row")
        rows = torch.arange(x.shape[1], device=x.device) + (layout.seq_idx[0] + 1).long() * (taps - 1)  # place of each position
        spread = x.new_zeros(1, x.shape[1] + len(layout.lengths) * (taps - 1), channels).index_copy(1, rows, x)
        return _sum_over_taps(spread, weight, bias).index_select(1, rows - (taps - 1)), None
    before = x.new_zeros(batch, taps - 1, channels) if state is None else state.to(x.dtype)
    padded = torch.cat([before, x], dim=1)  # B, K - 1 + T, F
    y = _sum_over_taps(padded, weight, bias)
    if layout.valid is None or not layout.right_padded:
        return y, padded[:, x.shape[1] :]
    ends = torch.tensor(layout.lengths, device=x.device)[:, None] + torch.arange(taps - 1, device=x.device)  # B K-1
    return y, padded.gather(1, ends[..., None].expand(-1, -1, channels))
