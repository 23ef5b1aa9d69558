"""Where the sequences stand in a batch of positions: packed end to end, or one a row with padding.

Both kinds of mixer ask the same three questions - which positions belong together, which are padding, how long is each sequence - and
this is the one place that answers them.

Letters: B rows, T positions, S sequences.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .short_convolution import Borders
from .side_by_side import SideBySide

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Positions of a (B, T) batch. Use `packed`, `rows` or `from_mask`; all tensors on the model's device.

    seq_idx: (B, T) int32, the number of the sequence a position belongs to; only for packed rows (B = 1).
    lengths: S ints, on the host: sequence lengths, in order, of the packed row, or of each right-padded row.
    valid: (B, T) bool, False at padding; None when there is none.
    right_padded: padding, if any, stands behind the text of its row.
    """

    seq_idx: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    valid: Tensor | None = None
    right_padded: bool = True

    @classmethod
    def packed(cls, lengths, device=None) -> "Layout":
        """Sequences of these lengths one after the other in a single row. Raises ValueError when there is none, or an empty one."""
        lengths = tuple(int(length) for length in lengths)
        if not lengths or min(lengths) < 1:
            raise ValueError(f"found sequence lengths {lengths}; expected at least one, each of at least one token")
        counts = torch.tensor(lengths, device=device)
        numbers = torch.arange(len(lengths), dtype=torch.int32, device=device)
        return cls(seq_idx=numbers.repeat_interleave(counts)[None], lengths=lengths)

    @classmethod
    def rows(cls, lengths, width: int, device=None) -> "Layout":
        """One sequence a row, padded on the right to `width`. Raises ValueError when a length does not fit."""
        lengths = tuple(int(length) for length in lengths)
        if not lengths or min(lengths) < 1 or max(lengths) > width:
            raise ValueError(f"found row lengths {lengths}; expected each between 1 and the width {width}")
        if min(lengths) == width:
            return cls(lengths=lengths)
        valid = torch.arange(width, device=device)[None] < torch.tensor(lengths, device=device)[:, None]
        return cls(lengths=lengths, valid=valid)

    @classmethod
    def from_mask(cls, attention_mask: Tensor | None, batch: int, width: int) -> "Layout":
        """From a (B, T) 0/1 mask with padding on the left or the right. Raises ValueError for another shape or holes in the text."""
        if attention_mask is None:
            return cls(lengths=(width,) * batch)
        if attention_mask.shape != (batch, width):
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; expected (B, T) = {(batch, width)}")
        valid = attention_mask.bool()
        counts = valid.sum(-1)
        lengths = tuple(counts.tolist())
        if min(lengths) == width:
            return cls(lengths=lengths)
        if min(lengths) < 1:
            raise ValueError(f"row {lengths.index(0)} of attention_mask has no token; every row needs at least one")
        positions = torch.arange(width, device=valid.device)[None]
        if torch.equal(valid, positions < counts[:, None]):
            return cls(lengths=lengths, valid=valid)
        if torch.equal(valid, positions >= width - counts[:, None]):
            return cls(lengths=lengths, valid=valid, right_padded=False)
        raise ValueError("attention_mask has padding inside a row; a recurrent state cannot skip it: pad on the left or the right only")

    @cached_property
    def _borders(self) -> dict[tuple, Borders]:
        return {}

    def borders(self, taps: int, batch: int, width: int, device: torch.device) -> Borders:
        """Of (B, T) = (batch, width) positions laid end to end, where a convolution of `taps` may not reach over: those of the packed
        sequences, or of the rows, padding and all."""
        key = taps, batch, width, device
        if key not in self._borders:
            self._borders[key] = Borders(self.lengths if self.is_packed else (width,) * batch, taps, device)
        return self._borders[key]

    @property
    def is_packed(self) -> bool:
        return self.seq_idx is not None

    @cached_property
    def side_by_side(self) -> SideBySide:
        """Of a packed row: its sequences, those of similar length side by side."""
        return SideBySide.of(self.lengths, self.seq_idx.device)
