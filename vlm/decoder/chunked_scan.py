"""The SSD scan over chunks with a backward pass written by hand.

Autograd would keep every intermediate of the scan, the L x L decay matrices of all heads among them, and walk through some thirty small
operations a layer, each on fresh memory; fresh memory costs more than the arithmetic in it. Here the work goes block by block - a few
chunks of one group of heads - through a handful of buffers that stay in the processor's cache. Kept for the backward pass: the inputs, the
small decays, and the state before each chunk. The matrices are made again.

Mamba-2 (arXiv 2405.21060), section 6, with w_s = dt_s x_s, a_l the sum of dt A up to l within the chunk, S the state before the chunk:
    y_l  = sum_{s <= l} exp(a_l - a_s) (C_l . B_s) w_s  +  exp(a_l) C_l S  +  D x_l
    S'   = exp(a_L) S + sum_s exp(a_L - a_s) w_s B_s^T
where a sequence border cuts each of the first terms (scan_decay.py).

Letters: B rows, T positions, H heads, G groups, R = H / G, P head width, N state; c chunks, k chunks of a block, L positions of a chunk.
"""

import torch
from torch.autograd.function import once_differentiable

from .fresh_memory import fresh
from .scan_backward import scan_backward
from .scan_decay import Decay
from .scan_forward import scan_forward

__all__ = ["ChunkedScan"]


class ChunkedScan(torch.autograd.Function):
    """apply(x, steps, A, B, C, D, initial, segments, span, keep) -> y, final state.

    x (B, T, H, P), B and C (B, T, G, N), D (H,), (H, P) or None; steps (B, T, H), A (H,), initial (B, H, P, N) or None, all of the dtype
    the sums are made in; segments (B, T) integers or None; span, positions of a chunk; keep, whether a backward pass may follow. y has x's
    dtype, the final state that of steps.
    """

    @staticmethod
    def forward(ctx, x, steps, A, B, C, D, initial, segments, span, keep):
        y, final, kept = scan_forward(x, steps, A, B, C, D, initial, segments, span, keep)
        ctx.span, ctx.has_initial = span, initial is not None
        if keep:
            # All of it through save_for_backward: what hangs on ctx itself, activation checkpointing cannot drop.
            tensors = [tensor for decay, states in kept for tensor in (*decay.tensors(), states)]
            ctx.save_for_backward(x, steps, A, B, C, D, segments, *tensors)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_final):
        x, steps, A, B, C, D, segments, *tensors = ctx.saved_tensors
        pieces = zip(*[iter(tensors)] * (Decay.count() + 1), strict=True)
        kept = [(Decay(*decay), states) for *decay, states in pieces]
        grad_x, grad_B, grad_C = (fresh(tensor, *tensor.shape) for tensor in (x, B, C))
        grad_steps, grad_A, grad_D, grad_initial = scan_backward(
            x, steps, A, B, C, D, segments, ctx.span, kept, grad_y, grad_final, grad_x, grad_B, grad_C
        )
        if D is not None:
            grad_D = (grad_D.sum(-1) if D.ndim == 1 else grad_D).to(D.dtype)
        return grad_x, grad_steps, grad_A, grad_B, grad_C, grad_D, grad_initial if ctx.has_initial else None, None, None, None
