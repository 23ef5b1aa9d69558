"""The SSD scan over chunks with a backward pass written by hand.

Autograd would keep every intermediate of the scan, the L x L decay matrices of all heads among them, and walk through some thirty small
operations a layer. Here only the inputs, the cumulative decay and the state before each chunk are kept; the matrices are made again in the
backward pass.

Mamba-2 (arXiv 2405.21060), section 6, with w_s = dt_s x_s, a_l the sum of dt A up to l within the chunk, H the state before the chunk:
    y_l  = sum_{s <= l} exp(a_l - a_s) (C_l . B_s) w_s  +  exp(a_l) C_l H
    H'   = exp(a_L) H + sum_s exp(a_L - a_s) w_s B_s^T
where a sequence border (`segments` changes) cuts each of the four terms.

Letters: b batch, c chunks, l and s positions of a chunk, h heads, g groups, r heads per group, p head width, n state.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["ChunkedScan"]


@dataclass
class _Borders:
    """What a position may see: visible (.. l s) bool; ends, starts (b c 1 l) and passes (b c 1) as 0/1 factors, None without borders."""

    visible: Tensor
    ends: Tensor | None
    starts: Tensor | None
    passes: Tensor | None


def _borders(segments: Tensor | None, span: int, device, dtype) -> _Borders:
    visible = torch.ones(span, span, dtype=torch.bool, device=device).tril()
    if segments is None:
        return _Borders(visible, None, None, None)
    before = torch.cat([segments[:, :1, 0], segments[:, :-1, -1]], dim=1)  # b c: segment of the position before the chunk
    return _Borders(
        (visible & (segments[..., :, None] == segments[..., None, :]))[:, :, None],
        (segments == segments[..., -1:])[:, :, None].to(dtype),
        (segments == before[..., None])[:, :, None].to(dtype),
        (before == segments[..., -1])[..., None].to(dtype),
    )


def _times(values: Tensor, factor: Tensor | None) -> Tensor:
    return values if factor is None else values * factor


def _decay_matrix(decay: Tensor, visible: Tensor) -> Tensor:
    """(b c h l s): exp(a_l - a_s) where s may be seen from l, else 0."""
    return (decay[..., :, None] - decay[..., None, :]).masked_fill_(~visible, float("-inf")).exp_()


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """(b c h l p) -> (b c g l (r p)), so that one product serves all heads of a group."""
    return rearrange(tensor, "b c (g r) l p -> b c g l (r p)", g=groups)


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    groups = tensor.shape[2]
    return rearrange(tensor, "b c g l (r p) -> b c (g r) l p", r=heads // groups)


class ChunkedScan(torch.autograd.Function):
    """apply(x, steps, A, B, C, initial, segments) -> y, final state.

    x (b c h l p), steps (b c h l), A (h,), B and C (b c g l n), initial (b h p n), all of one floating dtype; segments (b c l) integers or
    None. y (b c h l p), final (b h p n).
    """

    @staticmethod
    def forward(ctx, x, steps, A, B, C, initial, segments):
        heads, span = x.shape[2], x.shape[3]
        groups = B.shape[2]
        borders = _borders(segments, span, x.device, x.dtype)
        decay = (steps * A[:, None]).cumsum(-1)
        weighted = x * steps[..., None]
        mixing = _decay_matrix(decay, borders.visible)
        scores = C @ B.transpose(-1, -2)  # b c g l s
        rearrange(mixing, "b c (g r) l s -> b c g r l s", g=groups).mul_(scores[:, :, :, None])
        y = mixing @ weighted

        to_end = _times((decay[..., -1:] - decay).exp_(), borders.ends)
        fed = _by_group(weighted * to_end[..., None], groups)
        added = rearrange(fed.transpose(-1, -2) @ B, "b c g (r p) n -> b c (g r) p n", r=heads // groups)
        through = _times(decay[..., -1].exp(), borders.passes)  # b c h

        current, entering = initial, []
        for factor, addition in zip(through[..., None, None].unbind(1), added.unbind(1), strict=True):
            entering.append(current)
            current = torch.addcmul(addition, current, factor)
        entering = torch.stack(entering, dim=1)  # b c h p n

        from_start = _times(decay.exp(), borders.starts)
        carried = C @ rearrange(entering, "b c (g r) p n -> b c g n (r p)", g=groups)
        y.addcmul_(_by_head(carried, heads), from_start[..., None])
        ctx.save_for_backward(x, steps, A, B, C, decay, entering, segments)
        return y, current

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        x, steps, A, B, C, decay, entering, segments = ctx.saved_tensors
        heads, span = x.shape[2], x.shape[3]
        groups = B.shape[2]
        borders = _borders(segments, span, x.device, x.dtype)
        grad_y = grad_y.contiguous()
        weighted = x * steps[..., None]
        to_end = _times((decay[..., -1:] - decay).exp_(), borders.ends)
        from_start = _times(decay.exp(), borders.starts)
        through = _times(decay[..., -1].exp(), borders.passes)

        # 1. The state after each chunk, from the last one back.
        scaled = _by_group(grad_y * from_start[..., None], groups)  # b c g l (r p)
        given = rearrange(scaled.transpose(-1, -2) @ C, "b c g (r p) n -> b c (g r) p n", r=heads // groups)
        current, leaving = grad_final, []
        for factor, addition in zip(reversed(through[..., None, None].unbind(1)), reversed(given.unbind(1)), strict=True):
            leaving.append(current)
            current = torch.addcmul(addition, current, factor)
        grad_initial = current
        leaving = torch.stack(leaving[::-1], dim=1)  # b c h p n: gradient of the state after the chunk

        # 2. Within the chunk.
        mixing = _decay_matrix(decay, borders.visible)  # decay only
        scores = C @ B.transpose(-1, -2)
        grad_mixing = grad_y @ weighted.transpose(-1, -2)  # b c h l s
        grad_mixing *= mixing
        grad_scores = rearrange(grad_mixing, "b c (g r) l s -> b c g r l s", g=groups).sum(3)
        by_score = scores[:, :, :, None]
        rearrange(grad_mixing, "b c (g r) l s -> b c g r l s", g=groups).mul_(by_score)  # now the gradient of a_l - a_s
        grad_decay = grad_mixing.sum(-1) - grad_mixing.sum(-2)  # b c h l
        rearrange(mixing, "b c (g r) l s -> b c g r l s", g=groups).mul_(by_score)
        grad_weighted = mixing.transpose(-1, -2) @ grad_y  # b c h s p
        grad_C = grad_scores @ B
        grad_B = grad_scores.transpose(-1, -2) @ C

        # 3. From the state before the chunk to its positions.
        state_by_group = rearrange(entering, "b c (g r) p n -> b c g (r p) n", g=groups)
        grad_C += scaled @ state_by_group
        carried = _by_head(C @ state_by_group.transpose(-1, -2), heads)
        grad_decay += (grad_y * carried).sum(-1) * from_start

        # 4. From the positions to the state after the chunk.
        leaving_by_group = rearrange(leaving, "b c (g r) p n -> b c g (r p) n", g=groups)
        fed = _by_group(weighted * to_end[..., None], groups)
        grad_B += fed @ leaving_by_group
        into_state = _by_head(B @ leaving_by_group.transpose(-1, -2), heads) * to_end[..., None]  # b c h l p
        grad_weighted += into_state
        grad_gap = (weighted * into_state).sum(-1)  # gradient of a_L - a_l
        grad_decay -= grad_gap
        grad_decay[..., -1] += grad_gap.sum(-1) + (leaving * entering).sum((-1, -2)) * through

        # 5. Back through the cumulative sum and the discretisation.
        grad_log = grad_decay.flip(-1).cumsum(-1).flip(-1)
        grad_x = grad_weighted * steps[..., None]
        grad_steps = (grad_weighted * x).sum(-1) + grad_log * A[:, None]
        grad_A = (grad_log * steps).sum((0, 1, 3))
        return grad_x, grad_steps, grad_A, grad_B, grad_C, grad_initial, None
