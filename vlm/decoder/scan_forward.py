"""The SSD scan forwards, block by block. What is computed stands in chunked_scan.py.

Letters: B rows, T positions, H heads, G groups, R = H / G, P head width, N state; c chunks, k chunks of a block, L positions of a chunk.
"""

import torch
from torch import Tensor

from .fresh_memory import fresh
from .scan_blocks import Buffers, blocks_of, by_group, chunks_per_block, decay_of, per_position, pieces_of

__all__ = ["scan_forward"]


def scan_forward(x, steps, A, B, C, D, initial, segments, span: int, keep: bool):
    """Arguments as ChunkedScan. Returns y (B, T, H, P), the final state (B, H, P, N) and, for the backward pass, for each piece its decay
    and the states before its chunks and after the last one (B, G, c + 1, R, P N), if they are to be kept."""
    (batch, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    ratio, buffer = heads // groups, Buffers(steps)
    y = fresh(x, *x.shape)
    state = steps.new_zeros(batch, groups, ratio, width * size)
    if initial is not None:
        state.copy_(initial.reshape(state.shape))
    D = per_position(D, heads, width)
    kept = []
    for piece in pieces_of(length, span):
        decay = decay_of(piece, steps, A, segments)
        at_once = chunks_per_block(piece, ratio, width, x.device)
        # Not to be kept, one group's states of one block are enough.
        slots = (batch, groups, piece.count + 1) if keep else (1, 1, at_once + 1)
        states = fresh(steps, *slots, ratio, width * size).expand(batch, groups, -1, -1, -1)
        xs, ys = piece.chunked(x), piece.chunked(y)
        Bs, Cs = by_group(piece, B, steps.dtype), by_group(piece, C, steps.dtype)
        for block in blocks_of(piece, batch, groups, ratio, at_once):
            row, group, chunks, own, k, L = block.row, block.group, block.chunks, block.heads, block.count, piece.span
            x_block = buffer.load("x", xs[row, chunks, :, own]).transpose(1, 2)  # k R L P
            B_block, C_block = Bs[row, group, chunks], Cs[row, group, chunks]  # k L N
            # 1. Within the chunks.
            weighted = torch.mul(x_block, decay.weights[row, chunks, own, :, None], out=buffer("weighted", k, ratio, L, width))
            scores = torch.bmm(C_block, B_block.transpose(1, 2), out=buffer("scores", k, L, L))
            mixing = decay.matrix(row, chunks, own, buffer("mixing", k, ratio, L, L)).mul_(scores[:, None])
            result = buffer("result", k, ratio, L, width)
            torch.bmm(mixing.view(-1, L, L), weighted.view(-1, L, width), out=result.view(-1, L, width))
            # 2. From chunk to chunk.
            to_end = decay.to_end[row, chunks, own].transpose(1, 2)[..., None]
            fed = torch.mul(weighted.transpose(1, 2), to_end, out=buffer("fed", k, L, ratio, width))
            first = chunks.start if keep else 0
            places = states[row, group, first : first + k + 1]
            if chunks.start == 0:
                places[0] = state[row, group]
            torch.bmm(fed.view(k, L, -1).transpose(1, 2), B_block, out=places[1:].view(k, ratio * width, size))
            _follow(places, decay.through[row, chunks, own])
            entering = places[:k].view(k, ratio * width, size)
            carried = torch.bmm(C_block, entering.transpose(1, 2), out=buffer("carried", k, L, ratio * width)).view(fed.shape)
            if chunks.stop == piece.count:
                state[row, group] = places[k]
            elif not keep:
                places[0] = places[k]
            # 3. Together.
            result.addcmul_(carried.transpose(1, 2), decay.from_start[row, chunks, own, :, None])
            y_block = ys[row, chunks, :, own].transpose(1, 2)
            if D is not None:
                result = torch.addcmul(result, x_block, D[own], out=y_block if y.dtype == result.dtype else result)
            if D is None or y.dtype != result.dtype:
                y_block.copy_(result)
        kept.append((decay, states))
    return y, state.view(batch, heads, width, size), kept


def _follow(states: Tensor, through: Tensor) -> None:
    """states (k + 1, R, P N), each but the first what its chunk adds: each gets through (k, R) times the one before on top."""
    places = states.unbind(0)
    for before, after, factor in zip(places, places[1:], through[..., None].unbind(0), strict=False):
        after.addcmul_(before, factor)
