"""Rows that go on from a common state and have read little since: what they read is kept, instead of a state for each.

Thirty questions about one picture start from the picture's SSM state h. After s tokens a row's own state would be

    h_s = exp(a_s) h + sum over i <= s of exp(a_s - a_i) w_i B_i^T          a: sums of log-decays since the fork, w: step times input

and all that is asked of it is C_s h_s = exp(a_s) (C_s h) + sum over i of exp(a_s - a_i) (C_s . B_i) w_i (Mamba-2 in its dual form, Dao and
Gu 2024, arXiv 2405.21060, section 3.2). The first term is one product for all rows with a state that stays in the cache; the second reads
what the row has read: H P + G N + H numbers a token, beside H P N to read and write again at every step for a state of its own. That is
less for some two hundred tokens; a tail of more than `capacity` is settled: its row gets its own state. `scan_step` is the reference.

Letters: R rows, H heads, P head width, G groups, N state, K capacity, r heads per group, s tokens of a tail, m the most of some rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .mixer import Mamba2Mixer

__all__ = ["Tail", "TailStep", "Tails", "pay_off", "tail_elements"]

CAPACITY = 64  # tokens: a question and its answer
LEAST_STATE_BYTES = 2**17  # of a row and layer; with smaller states calling more operations costs more than it saves


def pay_off(state_bytes: int) -> bool:
    """Whether rows of so large a state, in each layer, are to have tails."""
    return state_bytes >= LEAST_STATE_BYTES


def tail_elements(heads: int, width: int, groups: int, size: int) -> int:
    """Numbers that the tail of one row and layer takes."""
    return CAPACITY * (heads * width + groups * size + heads)


@dataclass(frozen=True)
class Tail:
    """Of some rows and one layer: fed (R, K, H, P), keys (R, G, K, N), decay (R, K, H)."""

    fed: Tensor
    keys: Tensor
    decay: Tensor

    def rows(self, rows: slice) -> "Tail":
        return Tail(self.fed[rows], self.keys[rows], self.decay[rows])

    def first(self, count: int) -> "Tail":
        return Tail(self.fed[:, :count], self.keys[:, :, :count], self.decay[:, :count])

    def empty(self, rows: int, length: int) -> "Tail":
        """Another one, of so many rows and places."""
        heads, width = self.fed.shape[2:]
        groups, size = self.keys.shape[1], self.keys.shape[3]
        shapes = (rows, length, heads, width), (rows, groups, length, size), (rows, length, heads)
        return Tail(*(self.fed.new_zeros(shape) for shape in shapes))

    def write(self, rows: Tensor, given: "Tail") -> None:
        """Put a tail of fewer places over the first places of these rows."""
        first = self.first(given.decay.shape[1])
        for mine, other in ((first.fed, given.fed), (first.keys, given.keys), (first.decay, given.decay)):
            mine.index_copy_(0, rows, other)

    def state(self, common: Tensor) -> Tensor:
        """The states (R, H, P, N) after all K tokens of these tails, from `common` (H, P, N)."""
        last = self.decay[:, -1:]
        fed = self.fed * (last - self.decay).exp()[..., None]  # R K H P
        added = torch.matmul(fed.unflatten(2, (self.keys.shape[1], -1)).flatten(3).permute(0, 2, 3, 1), self.keys)  # R G, r P, N
        return torch.addcmul(added.view(-1, *common.shape), common, last[:, 0, :, None, None].exp())


class Tails:
    """The tails of all rows of `Slots`, by layer."""

    def __init__(self, language_model: nn.Module, rows: int, *, like: Tensor):
        """`like` gives device and dtype, that of the SSM states."""
        self.capacity = capacity = CAPACITY
        self.layers: dict[int, Tail] = {}
        for block in language_model.model.layers:
            mixer = block.mixer
            if isinstance(mixer, Mamba2Mixer):
                self.layers[mixer.layer_idx] = Tail(
                    like.new_zeros(rows, capacity, mixer.num_heads, mixer.head_dim),
                    like.new_zeros(rows, mixer.n_groups, capacity, mixer.ssm_state_size),
                    like.new_zeros(rows, capacity, mixer.num_heads),
                )

    def grow(self, rows: int) -> None:
        """Exchange the buffers for ones of so many rows."""
        for layer, tail in self.layers.items():
            self.layers[layer] = new = tail.empty(rows, self.capacity)
            kept = slice(min(rows, len(tail.decay)))
            for part, old in ((new.fed, tail.fed), (new.keys, tail.keys), (new.decay, tail.decay)):
                part[kept] = old[kept]

    def move(self, origins: Tensor, targets: Tensor, longest: int) -> None:
        """Copy rows over others; `longest`: the most tokens any of them holds."""
        for tail in self.layers.values():
            used = tail.first(longest)
            tail.write(targets, Tail(*(part.index_select(0, origins) for part in (used.fed, used.keys, used.decay))))

    def scrub(self, rows: Tensor) -> None:
        """Set rows to zero."""
        for tail in self.layers.values():
            for part in (tail.fed, tail.keys, tail.decay):
                part.index_fill_(0, rows, 0.0)

    def size_bytes(self) -> int:
        parts = [part for tail in self.layers.values() for part in (tail.fed, tail.keys, tail.decay)]
        return sum(part.numel() * part.element_size() for part in parts)


CACHED_BYTES = 2**19  # of a product of a tail's columns that is summed up at once


@dataclass(frozen=True)
class TailStep:
    """One decoding step for neighbouring rows with the same common state: where each writes, and what each sees.

    rows: the stretch of rows; index: (R,) the same, and place: (R,) the first free place of each tail; longest: places that are looked at;
    visible: (R, longest, 1) or None when all tails are of one length."""

    rows: slice
    index: Tensor
    place: Tensor
    longest: int
    visible: Tensor | None

    @classmethod
    def of(cls, rows: slice, counts: list[int], device) -> "TailStep":
        place = torch.tensor(counts, device=device)
        longest = max(counts) + 1
        visible = None
        if min(counts) + 1 < longest:
            visible = (torch.arange(longest, device=device)[None] <= place[:, None])[..., None]
        return cls(rows, torch.arange(rows.start, rows.stop, device=device), place, longest, visible)

    def scan(self, x: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, tail: Tail, common: Tensor) -> Tensor:
        """`scan_step` for these rows: x (R, H, P), steps (R, H), B and C (R, G, N) -> y (R, H, P). The token is written to `tail`, that of
        all rows of the buffers; common (H, P, N)."""
        count, heads, width = x.shape
        groups, size = B.shape[1:]
        # 1. The token joins its row's tail.
        before = tail.decay[self.index, self.place - 1]  # R H; a row has read a token since its fork
        now = torch.addcmul(before, steps, A)
        tail.fed[self.index, self.place] = x * steps[..., None]
        tail.keys[self.index, :, self.place] = B
        tail.decay[self.index, self.place] = now
        seen = tail.rows(self.rows).first(self.longest)
        # 2. What the tail gives. Sums over the tokens by columns, not as products of a row with a matrix for each head: half the time.
        met = torch.bmm(C.reshape(-1, 1, size), seen.keys.flatten(0, 1).mT).view(count, groups, -1).transpose(1, 2)  # R m G
        mixing = now[:, None] - seen.decay  # R m H
        if self.visible is not None:
            mixing.masked_fill_(~self.visible, float("-inf"))
        mixing.exp_().view(count, -1, groups, heads // groups).mul_(met[..., None])
        y = torch.empty_like(x)
        together = max(1, CACHED_BYTES // (seen.fed[0].numel() * x.element_size()))
        product = torch.empty_like(seen.fed[:together])
        for start in range(0, count, together):
            some = slice(start, min(start + together, count))
            here = product[: some.stop - start]
            torch.sum(torch.mul(seen.fed[some], mixing[some, ..., None], out=here), 1, out=y[some])  # R H P
        # 3. What the common state gives, the same for all rows but for its decay.
        carried = torch.bmm(C.transpose(0, 1), common.view(groups, -1, size).mT).transpose(0, 1)  # R G, r P
        y.addcmul_(carried.reshape(y.shape), now.exp()[..., None])
        return y.addcmul_(x, D[:, None])
