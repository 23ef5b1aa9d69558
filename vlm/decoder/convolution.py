"""The short causal depthwise convolution in front of the scan, with its activation, for packed rows, padded rows and continued sequences.

A window must not reach into the neighbour of a packed row, nor into padding. Here is said which positions make up a sequence and what is
kept for the next call; the arithmetic is in short_convolution.py.

Letters: B batch, T positions, K taps, F channels (in shapes), S sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Layout
from .short_convolution import ShortConvolution

__all__ = ["causal_convolution"]


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout, state: Tensor | None = None, *, silu: bool = False
) -> tuple[Tensor, Tensor | None]:
    """x (B, T, F), weight (F, K), bias (F,) -> y (B, T, F), its silu if asked, and the last K - 1 inputs of each row (B, K - 1, F).

    `state` (B, K - 1, F) holds the inputs before the first position (zeros when None). For a packed layout no state is taken or given.
    Raises ValueError when a packed row is to continue a state.
    """
    taps = weight.shape[1]
    batch, length, channels = x.shape
    if layout.is_packed:
        if state is not None:
            raise ValueError("a packed row cannot continue a kept state; use one sequence a row")
        return ShortConvolution.apply(x[0], weight, bias, layout.borders(taps, batch, length, x.device), silu)[None], None
    if state is None:
        borders = layout.borders(taps, batch, length, x.device)
        y = ShortConvolution.apply(x.reshape(-1, channels), weight, bias, borders, silu).view(x.shape)
        if length >= taps - 1 and (layout.valid is None or not layout.right_padded):
            return y, x[:, length - taps + 1 :].contiguous()
        padded = F.pad(x, (0, 0, taps - 1, 0))  # B, K - 1 + T, F
    else:
        padded = torch.cat([state.to(x.dtype), x], dim=1)
        y = F.conv1d(padded.transpose(1, 2), weight[:, None], bias, groups=channels).transpose(1, 2)
        y = F.silu(y) if silu else y
    if layout.valid is None or not layout.right_padded:
        return y, padded[:, length:]
    ends = torch.tensor(layout.lengths, device=x.device)[:, None] + torch.arange(taps - 1, device=x.device)  # B K-1
    return y, padded.gather(1, ends[..., None].expand(-1, -1, channels))
