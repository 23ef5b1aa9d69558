"""What the layers of one decoding step have in common: where rows write, what they see, and which of them share a past.

Letters: R rows, S slots looked at.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .slots import Common, Slots
from .tails import TailStep

__all__ = ["Step"]

LEAST_SHARED_ELEMENTS = 2**18
"""Keys and values that one attention layer reads once instead of once a row, below which reading them together saves nothing."""


@dataclass(frozen=True)
class Step:
    """rows: how many go on; index: (R,) 0 to R - 1; lengths: (R,) the slot each writes to; even: all of them see all S.
    tails: stretches of rows, each with the state and the step of its tails, or with None where states stand in the rows.
    sharing: stretches of rows, each with the row whose first slots all of them hold copies of, or None."""

    rows: int
    span: int
    index: Tensor
    lengths: Tensor
    even: bool
    tails: list[tuple[slice, Common | None, TailStep | None]]
    sharing: list[tuple[slice, Common | None]]

    @classmethod
    def of(cls, slots: Slots, rows: int, span: int, *, even: bool) -> "Step":
        device = slots.lengths.device
        lengths = slots.lengths[:rows]
        tails = []
        for some, common in slots.stretches(rows, of_tails=True):
            counts = None if common is None else [slots.tail_length(row) for row in range(some.start, some.stop)]
            tails.append((some, common, None if counts is None else TailStep.of(some, counts, device)))
        return cls(rows, span, torch.arange(rows, device=device), lengths, even, tails, cls._sharing(slots, rows))

    @cached_property
    def visible(self) -> Tensor | None:
        """(R, 1, 1, S) bool, or None when all see all S. The attention layers alone ask for it."""
        if self.even:
            return None
        return (torch.arange(self.span, device=self.lengths.device)[None] <= self.lengths[:, None])[:, None, None]

    @staticmethod
    def _sharing(slots: Slots, rows: int) -> list[tuple[slice, Common | None]]:
        """On a GPU a captured step may not depend on who shares what; there a kernel reads every row's copy."""
        if slots.lengths.is_cuda or not slots.keys:
            return [(slice(0, rows), None)]
        _, heads, _, width = next(iter(slots.keys.values())).shape
        found: list[tuple[slice, Common | None]] = []
        for some, common in slots.stretches(rows, of_tails=False):
            if common is not None and (some.stop - some.start - 1) * common.tokens * heads * width * 2 < LEAST_SHARED_ELEMENTS:
                common = None
            if common is None and found and found[-1][1] is None:
                found[-1] = slice(found[-1][0].start, some.stop), None
            else:
                found.append((some, common))
        return found
