"""Segments of several sequences packed end to end, each going on from its own kept row: where every token stands.

The projections of a block run on the packed row as it is. Only the scan and the attention want one sequence a row; for them segments of
similar length stand side by side in groups, padded on the right.

Letters: T packed positions, G segments of a group, L longest of a group, K taps.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .side_by_side import groups_of_similar_length
from .slots import Common

__all__ = ["Borders", "Group", "Packing"]


@dataclass(frozen=True)
class Group:
    """Segments of similar length. rows: (G,) their rows in the buffers, row_slice: the same when they stand side by side; span: keys
    each may see at most, its past included. common: where the SSM states before stand, and the keys and values of all that was read before,
    the same for all of them, or None; as_tails: what they read becomes tails on it.

    places: (G L) their positions in the pack (padding repeats the last one), or a slice when nothing needs to be moved;
    valid: (G, L) bool, or None without padding; kept: which of the G L are real, targets: their places in the pack.
    """

    rows: Tensor
    row_slice: slice | None
    longest: int
    span: int
    past: Tensor  # (G,) tokens read before
    is_fresh: bool  # nothing was read before, by any
    common: Common | None
    as_tails: bool
    places: Tensor | slice
    valid: Tensor | None
    kept: Tensor | None
    targets: Tensor | None

    @property
    def size(self) -> int:
        return self.rows.shape[0]

    def take(self, packed: Tensor) -> Tensor:
        """(T, ...) -> (G, L, ...)."""
        chosen = packed[self.places] if isinstance(self.places, slice) else packed.index_select(0, self.places)
        return chosen.unflatten(0, (self.size, self.longest))

    def put(self, values: Tensor, packed: Tensor) -> None:
        """(G, L, ...) back into (T, ...), padding left out."""
        flat = values.flatten(0, 1)
        if isinstance(self.places, slice):
            packed[self.places] = flat
        else:
            packed.index_copy_(0, self.targets, flat if self.kept is None else flat.index_select(0, self.kept))


@dataclass(frozen=True)
class Borders:
    """heads: (segments (K - 1),) places of the first K - 1 tokens of each segment, its last one repeated where it is shorter; kept: which
    of them are tokens, places: where those stand in the pack.

    tails: (segments (K - 1),) places of the last K - 1 tokens of each segment; of one that is shorter, what is missing comes from the
    window before it: from_window (segments, K - 1, 1) says which, window_places (segments (K - 1),) where in the windows laid end to end.
    Both are None when no segment is shorter.
    """

    taps: int
    heads: Tensor
    kept: Tensor | None
    places: Tensor
    tails: Tensor
    from_window: Tensor | None
    window_places: Tensor | None

    @classmethod
    def of(cls, packing: "Packing", taps: int) -> "Borders":
        before = taps - 1
        starts, counts = packing._tensor(packing.starts)[:, None], packing._tensor(packing.lengths)[:, None]
        steps = torch.arange(before, device=packing.device)[None]
        heads = (starts + steps.minimum(counts - 1)).flatten()
        tails = starts + counts - before + steps
        if min(packing.lengths) >= before:
            return cls(taps, heads, None, heads, tails.flatten(), None, None)
        kept = (steps < counts).flatten().nonzero().squeeze(-1)
        numbers = torch.arange(len(packing.lengths), device=packing.device)[:, None]
        window_places = (numbers * before + (counts + steps).clamp_max(before - 1)).flatten()
        return cls(taps, heads, kept, heads[kept], tails.clamp_min(0).flatten(), (counts + steps < before)[..., None], window_places)


class Packing:
    """lengths: tokens of each segment, in the order of the pack; rows: its row in the buffers; past: tokens that row has read before;
    commons: of each where its SSM state before stands, or None: in its row; as_tails: which become tails on that."""

    def __init__(
        self,
        lengths: list[int],
        rows: list[int],
        past: list[int],
        device,
        commons: list[Common | None] | None = None,
        as_tails: list[bool] | None = None,
    ):
        if not lengths or min(lengths) < 1 or not len(lengths) == len(rows) == len(past) or len(set(rows)) != len(rows):
            raise ValueError(f"found segments of {lengths} tokens for the rows {rows}; expected one or more tokens for different rows")
        self.lengths, self.rows, self.past, self.device = lengths, rows, past, device
        self.commons, self.as_tails = commons or [None] * len(rows), as_tails or [False] * len(rows)
        self._borders: Borders | None = None
        self.total = sum(lengths)
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        self.starts = starts[:-1]

    def _tensor(self, values) -> Tensor:
        return torch.tensor(values, device=self.device)

    @cached_property
    def row_index(self) -> Tensor:
        return self._tensor(self.rows)

    @cached_property
    def last(self) -> Tensor:
        """Places of the last token of each segment."""
        return self._tensor([start + length - 1 for start, length in zip(self.starts, self.lengths, strict=True)])

    @cached_property
    def positions(self) -> tuple[Tensor, Tensor]:
        """For each packed token: its row in the buffers, and its slot there."""
        counts = self._tensor(self.lengths)
        within = torch.arange(self.total, device=self.device) - self._tensor(self.starts).repeat_interleave(counts)
        return self.row_index.repeat_interleave(counts), within + self._tensor(self.past).repeat_interleave(counts)

    def borders(self, taps: int) -> Borders:
        """Where a convolution of so many taps reaches over the borders of segments."""
        if self._borders is None or self._borders.taps != taps:
            self._borders = Borders.of(self, taps)
        return self._borders

    @cached_property
    def groups(self) -> list[Group]:
        """Segments of similar length, and of one common state."""
        kinds: dict[tuple[Common | None, bool], list[int]] = {}
        for index, kind in enumerate(zip(self.commons, self.as_tails, strict=True)):
            kinds.setdefault(kind, []).append(index)
        return [
            self._group([indices[place] for place in members], *kind)
            for kind, indices in kinds.items()
            for members in groups_of_similar_length(tuple(self.lengths[index] for index in indices))
        ]

    def _group(self, members: list[int], shared: Common | None, as_tails: bool) -> Group:
        members = sorted(members)
        longest = max(self.lengths[index] for index in members)
        even = all(self.lengths[index] == longest for index in members)
        past = [self.past[index] for index in members]
        rows = [self.rows[index] for index in members]
        common = {
            "rows": self._tensor(rows),
            "row_slice": slice(rows[0], rows[0] + len(rows)) if rows == list(range(rows[0], rows[0] + len(rows))) else None,
            "longest": longest,
            "span": max(self.past[index] + self.lengths[index] for index in members),
            "past": self._tensor(past),
            "is_fresh": not any(past),
            "common": shared,
            "as_tails": as_tails,
        }
        if even and members == list(range(members[0], members[0] + len(members))):
            first = self.starts[members[0]]
            return Group(**common, places=slice(first, first + longest * len(members)), valid=None, kept=None, targets=None)
        sizes = self._tensor([self.lengths[index] for index in members])[:, None]
        steps = torch.arange(longest, device=self.device)[None]
        places = self._tensor([self.starts[index] for index in members])[:, None] + steps.minimum(sizes - 1)
        if even:
            return Group(**common, places=places.flatten(), valid=None, kept=None, targets=places.flatten())
        valid = steps < sizes
        kept = valid.flatten().nonzero().squeeze(-1)
        return Group(**common, places=places.flatten(), valid=valid, kept=kept, targets=places.flatten()[kept])
