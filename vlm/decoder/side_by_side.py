"""Sequences of a packed row laid side by side, and back: what attention computes on.

Sequences of similar length form a group and are padded on the right to its longest, where a causal mask already hides the padding. One
gather lays out all groups, whatever their number, and one brings the results back. Backward is the other gather: padding is seen by padding
alone, whose results nobody reads, so its gradient is zero and nothing has to be added up.

Letters: T packed positions, P positions of all groups with padding, S sequences of a group, L its longest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["SideBySide", "groups_of_similar_length"]

PADDING_LIMIT = 1.35  # longest over shortest sequence in one attention call


def groups_of_similar_length(lengths: tuple[int, ...]) -> list[list[int]]:
    """Indices of `lengths`, in groups whose longest is at most 1.35 times the shortest; shortest first."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and lengths[index] <= PADDING_LIMIT * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


class _Gather(torch.autograd.Function):
    """x (T, ..) by `there` (P,); a position's gradient is that of its place `back` (T,), for padding has none."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.save_for_backward(back)
        return x.index_select(0, there)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


class _GatherBack(torch.autograd.Function):
    """The way back: x (P, ..) by `there` (T,); the places that nobody reads get a gradient of zero."""

    @staticmethod
    def forward(ctx, x, there):
        ctx.save_for_backward(there)
        ctx.places = x.shape[0]
        return x.index_select(0, there)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (there,) = ctx.saved_tensors
        return grad.new_zeros(ctx.places, *grad.shape[1:]).index_copy_(0, there, grad), None


@dataclass(frozen=True)
class SideBySide:
    """groups: (S, L) of each, in the order in which they stand; source: (P,) the packed position of each place, padding repeats the last of
    its sequence; place: (T,) where each packed position stands."""

    groups: tuple[tuple[int, int], ...]
    source: Tensor
    place: Tensor

    @classmethod
    def of(cls, lengths: tuple[int, ...], device=None) -> "SideBySide":
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        shapes, source = [], torch.empty(0, dtype=torch.long)
        place = torch.empty(starts[-1], dtype=torch.long)
        for members in groups_of_similar_length(lengths):
            longest = lengths[members[-1]]
            sizes = torch.tensor([lengths[index] for index in members])[:, None]
            steps = torch.arange(longest)[None]
            positions = (torch.tensor([starts[index] for index in members])[:, None] + steps.minimum(sizes - 1)).flatten()
            real = (steps < sizes).flatten().nonzero().squeeze(1)
            place[positions[real]] = len(source) + real
            source = torch.cat([source, positions])
            shapes.append((len(members), longest))
        return cls(tuple(shapes), source.to(device), place.to(device))

    def spread(self, packed: Tensor) -> list[Tensor]:
        """(T, ..) -> (S, L, ..) of each group."""
        flat = _Gather.apply(packed, self.source, self.place)
        parts = flat.split([sequences * longest for sequences, longest in self.groups])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.groups, strict=True)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """(S, L, ..) of each group -> (T, ..)."""
        return _GatherBack.apply(torch.cat([part.flatten(0, 1) for part in parts]), self.place)
