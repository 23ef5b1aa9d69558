"""The SSD scan backwards, block by block from the last one. What is computed stands in chunked_scan.py; matrices are made again, not kept.

Letters: B rows, T positions, H heads, G groups, R = H / G, P head width, N state; c chunks, k chunks of a block, L positions of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan_blocks import Buffers, blocks_of, by_group, chunks_per_block, per_position, pieces_of

__all__ = ["scan_backward"]


def scan_backward(x, steps, A, B, C, D, segments, span: int, kept, grad_y, grad_final, grad_x, grad_B, grad_C):
    """Arguments as ChunkedScan, what scan_forward kept, grad_y (B, T, H, P) and grad_final (B, H, P, N). Writes grad_x, grad_B, grad_C.

    Returns the gradients of steps (B, T, H), A (H,), D (H, P) (None without D) and the initial state (B, H, P, N).
    """
    (batch, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    ratio, buffer = heads // groups, Buffers(steps)
    grad_state = steps.new_empty(batch, groups, ratio, width * size).copy_(grad_final.reshape(batch, groups, ratio, -1))
    grad_steps, grad_A = torch.empty_like(steps), torch.zeros_like(A, dtype=torch.float64)
    grad_D = None if D is None else steps.new_zeros(heads, width)
    D = per_position(D, heads, width)
    for piece, (decay, states) in zip(reversed(pieces_of(length, span)), reversed(kept), strict=True):
        at_once = chunks_per_block(piece, ratio, width, x.device)
        xs, gys, gxs, gBs, gCs = (piece.chunked(tensor) for tensor in (x, grad_y, grad_x, grad_B, grad_C))
        Bs, Cs = by_group(piece, B, steps.dtype), by_group(piece, C, steps.dtype)
        # Gradients of the running sum, kept apart by what they are summed over: `until` counts for its position and all before it in the
        # chunk, `since` for all behind it. In one sum of differences large terms would drown the small ones that are the result. Within
        # a chunk a pair of positions stands in both sums and has to cancel exactly where both count: hence float64.
        since, direct = torch.empty_like(decay.coarse), torch.empty_like(decay.coarse)  # B c H L
        until = torch.empty_like(since, dtype=torch.float64)
        throughout = torch.empty_like(decay.through)  # B c H
        for block in blocks_of(piece, batch, groups, ratio, at_once, backwards=True):
            row, group, chunks, own, k, L = block.row, block.group, block.chunks, block.heads, block.count, piece.span
            x_block = buffer.load("x", xs[row, chunks, :, own]).transpose(1, 2)  # k R L P
            B_block, C_block = Bs[row, group, chunks], Cs[row, group, chunks]  # k L N
            entering = states[row, group, chunks]  # k R PN
            weights, from_start, to_end = (t[row, chunks, own, :, None] for t in (decay.weights, decay.from_start, decay.to_end))
            given = buffer("given", k, ratio, L, width).copy_(gys[row, chunks, :, own].transpose(1, 2))
            weighted = torch.mul(x_block, weights, out=buffer("weighted", k, ratio, L, width))
            product = buffer("product", k, ratio, L, width)
            if D is not None:
                grad_D[own] += torch.mul(given, x_block, out=product).sum((0, 2))
            # 1. Within the chunks.
            scores = torch.bmm(C_block, B_block.transpose(1, 2), out=buffer("scores", k, L, L))[:, None]
            mixing = decay.matrix(row, chunks, own, buffer("mixing", k, ratio, L, L))
            grad_mixing = buffer("grad_mixing", k, ratio, L, L)
            torch.bmm(given.view(-1, L, width), weighted.view(-1, L, width).transpose(1, 2), out=grad_mixing.view(-1, L, L))
            grad_scores = grad_mixing.mul_(mixing).sum(1)  # k L L
            grad_mixing.mul_(scores).diagonal(dim1=-2, dim2=-1).zero_()  # now the gradient of a_l - a_s
            grad_weighted = buffer("grad_weighted", k, ratio, L, width)
            torch.bmm(mixing.mul_(scores).view(-1, L, L).transpose(1, 2), given.view(-1, L, width), out=grad_weighted.view(-1, L, width))
            # 2. From the state before the chunk to its positions.
            flat = entering.view(k, ratio * width, size)
            scaled = torch.mul(given.transpose(1, 2), from_start.transpose(1, 2), out=buffer("scaled", k, L, ratio, width))
            carried = torch.bmm(C_block, flat.transpose(1, 2), out=buffer("carried", k, L, ratio * width)).view(scaled.shape)
            by_pairs = grad_mixing.sum(-1, dtype=torch.float64).sub_(grad_mixing.sum(-2, dtype=torch.float64))
            until[row, chunks, own] = by_pairs.add_(carried.mul_(scaled).sum(-1).transpose(1, 2))
            grad_C_block = torch.bmm(scaled.view(k, L, -1), flat, out=buffer("grad_C", k, L, size))
            gCs[row, chunks, :, group] = grad_C_block.baddbmm_(grad_scores, B_block)
            # 3. The state after each chunk, from the last one back.
            places = buffer("leaving", k + 1, ratio, width * size)
            places[k] = grad_state[row, group]
            torch.bmm(scaled.view(k, L, -1).transpose(1, 2), C_block, out=places[:k].view(k, ratio * width, size))
            _follow_back(places, decay.through[row, chunks, own])
            grad_state[row, group] = places[0]
            leaving = places[1:]
            # 4. From the positions to the state after the chunk.
            flat = leaving.view(k, ratio * width, size)
            fed = torch.mul(weighted.transpose(1, 2), to_end.transpose(1, 2), out=scaled)
            into = torch.bmm(B_block, flat.transpose(1, 2), out=carried.view(k, L, -1)).view(fed.shape)
            grad_weighted.addcmul_(into.transpose(1, 2), to_end)
            since[row, chunks, own] = into.mul_(fed).sum(-1).transpose(1, 2)
            grad_B_block = torch.bmm(fed.view(k, L, -1), flat, out=grad_C_block)
            gBs[row, chunks, :, group] = grad_B_block.baddbmm_(grad_scores.transpose(1, 2), C_block)
            throughout[row, chunks, own] = torch.mul(leaving, entering, out=buffer("met", *leaving.shape)).sum(-1)
            # 5. Back through the weighting.
            direct[row, chunks, own] = torch.mul(grad_weighted, x_block, out=product).sum(-1)
            grad_weighted.mul_(weights)
            gx_block = gxs[row, chunks, :, own].transpose(1, 2)
            if D is not None:
                out = gx_block if grad_x.dtype == given.dtype else grad_weighted
                grad_weighted = torch.addcmul(grad_weighted, given, D[own], out=out)
            if D is None or grad_x.dtype != given.dtype:
                gx_block.copy_(grad_weighted)
        behind = F.pad(since[..., :-1].cumsum(-1), (1, 0))
        grad_log = decay.sum_behind(until) + behind + (throughout * decay.through)[..., None]
        piece.chunked(grad_steps).copy_((direct * decay.unfine + grad_log * A[:, None]).transpose(2, 3))
        grad_A += (grad_log * decay.steps).sum((0, 1, 3))
    return grad_steps, grad_A.to(A.dtype), grad_D, grad_state.view(batch, heads, width, size)


def _follow_back(states: Tensor, through: Tensor) -> None:
    """states (k + 1, R, P N), each but the last what its chunk adds: each gets through (k, R) times the one behind it on top."""
    places = states.unbind(0)
    for before, after, factor in reversed(list(zip(places, places[1:], through[..., None].unbind(0), strict=False))):
        before.addcmul_(after, factor)
