"""The SSD scan for many short sequences, each from its own state, and for one token each: in place, a few rows at a time.

A question is some thirty tokens long, and a hundred of them may be read together. One chunk holds such a sequence, so nothing has to go
from chunk to chunk; what costs is carrying the states (half a megabyte a row and layer in a small model, four in a large one) through the
processor's cache. So all that is done to a row's state is done before the next rows' states are touched. `chunk_scan` and `recurrent_scan`
(ssd.py) are the reference.

Letters: R rows, L positions, H heads, P head width, G groups, N state; r heads per group.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .tails import Tail

__all__ = ["CACHED_BYTES", "LONGEST_SHORT", "scan_step", "short_scan"]

LONGEST_SHORT = 128  # positions; the work within a chunk grows with their square
CACHED_BYTES = 2**21  # touched together on a CPU


def _blocks(states: Tensor) -> Iterator[slice]:
    """Rows in slices whose states stay in the cache; all at once on a GPU, which has no such cache but pays for each call."""
    rows = states.shape[0]
    step = rows if states.is_cuda else max(1, CACHED_BYTES // (states[0].numel() * states.element_size()))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def short_scan(
    x: Tensor,
    steps: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    states: Tensor,
    *,
    is_fresh: bool = False,
    common: Tensor | None = None,
    tail: Tail | None = None,
) -> Tensor:
    """x (R, L, H, P), steps (R, L, H) with 0 at padding, A (H,) negative, B and C (R, L, G, N), D (H,); -> y (R, L, H, P) in x's dtype.

    `states` (R, H, P, N), float32 or float64, hold the states after the last position afterwards. The states before are what stands there,
    or all zero (`is_fresh`), or for every row `common` (H, P, N), of the same dtype. Sums are made in their dtype. With `common` and a
    `tail` of these rows and of L places what is read is written there, and the states are left as they are.
    """
    rows, length, heads, width = x.shape
    groups, size = B.shape[2:]
    wide = states.dtype
    y = torch.empty_like(x)
    visible = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
    for block in _blocks(states):
        state = None if tail is not None else states[block].view(-1, heads // groups * width, size)  # R G, r P, N
        count = block.stop - block.start
        decay = (steps[block] * A).transpose(1, 2).cumsum(-1)  # R H L
        inner = x[block].to(wide).transpose(1, 2).contiguous()  # R H L P
        b, c = (part[block].to(wide).transpose(1, 2).reshape(-1, length, size) for part in (B, C))  # R G, L, N
        weighted = inner * steps[block].transpose(1, 2)[..., None]  # R H L P
        # 1. Within the sequence: exp(a_l - a_s) (C_l . B_s) for s up to l.
        mixing = (decay[..., :, None] - decay[..., None, :]).masked_fill_(~visible, float("-inf")).exp_()  # R H L L
        mixing.view(count, groups, -1, length, length).mul_(torch.bmm(c, b.mT).view(count, groups, 1, length, length))
        out = torch.matmul(mixing, weighted)  # R H L P
        # 2. From the state before: exp(a_l) C_l h.
        if not is_fresh:
            carried = torch.bmm(c, state.mT) if common is None else _carried(c.view(count, groups, length, size), common)  # R G, L, r P
            carried = carried.view(count, groups, length, -1, width).transpose(2, 3)  # R G r L P
            out.view(carried.shape).addcmul_(carried, decay.exp().view(count, groups, -1, length, 1))
        out.addcmul_(inner, D[:, None, None])
        y[block] = out.transpose(1, 2)
        if tail is not None:
            tail.fed[block], tail.decay[block] = weighted.transpose(1, 2), decay.transpose(1, 2)
            tail.keys[block] = b.view(count, groups, length, size)
            continue
        # 3. The state after: exp(a_L) h + sum over s of exp(a_L - a_s) w_s B_s.
        weighted.mul_((decay[..., -1:] - decay).exp_()[..., None])
        fed = weighted.view(count * groups, -1, length, width).transpose(2, 3).reshape(count * groups, -1, length)  # R G, r P, L
        if is_fresh:
            torch.bmm(fed, b, out=state)
        else:
            torch.mul(states[block] if common is None else common, decay[..., -1].exp()[..., None, None], out=states[block])
            state.baddbmm_(fed, b)
    return y


def _carried(c: Tensor, common: Tensor) -> Tensor:
    """c (R, G, L, N) on one state (H, P, N), which stays in the cache for all rows -> (R G, L, r P)."""
    rows, groups, length, size = c.shape
    state = common.view(groups, -1, size)
    together = torch.bmm(c.transpose(0, 1).reshape(groups, -1, size), state.mT)  # G, R L, r P
    return together.view(groups, rows, length, -1).transpose(0, 1).reshape(rows * groups, length, -1)


def scan_step(x: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, states: Tensor) -> Tensor:
    """One position: x (R, H, P), steps (R, H), B and C (R, G, N) -> y (R, H, P), all in the dtype of `states`, which go on in place."""
    rows, heads, width = x.shape
    groups, size = B.shape[1:]
    decay = torch.exp(steps * A)[..., None, None]
    fed = (x * steps[..., None]).view(rows, groups, -1, 1)  # R G r P
    y = x * D[:, None]
    by_group = y.view(rows, groups, -1)
    for block in _blocks(states):
        state = states[block].mul_(decay[block]).view(block.stop - block.start, groups, -1, size)  # R G, r P, N
        state.addcmul_(fed[block], B[block, :, None])
        # five times faster on a processor than state @ C
        by_group[block] += torch.matmul(C[block, :, None], state.mT)[:, :, 0]
    return y
