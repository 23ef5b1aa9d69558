"""How much is left, later in a chunk, of what was fed earlier: every exponential of the scan.

The scan needs exp(a_l - a_s), where a is a running sum of dt A. Three things are done about its digits, and nothing else in the scan has to
know of them:
- the sum runs in float64 and **starts anew at every sequence border**, so that no neighbour's decay moves the last digits of a sequence;
- it is kept as two numbers, `coarse` + `fine`: where the sum is large, a difference of two rounded sums is wrong in the fourth digit.
  `fine` of the row is added to the difference, `fine` of the column is hidden in `weights`;
- powers of two instead of e: torch.exp2 takes half the time of torch.exp on a CPU.

Letters: B rows, c chunks, H heads, R heads of a group, k chunks of a block, L positions of a chunk (l and s two of them).
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["Decay"]

BITS_PER_NAT = 1.4426950408889634


def _seen(visible: Tensor) -> Tensor:
    """`visible` of a Decay -> (L, L) or (B, c, L, L) float64: 1 where position s (last) may be seen from l, else 0. A product with it is a
    running sum to which what stands behind a border adds exact zeros; a running sum over the border, from which what had come together in
    front of it is taken away, keeps some of it in its last digits."""
    seen = (visible > 0).double()
    return seen if seen.ndim == 2 else seen.squeeze(2)


@dataclass(frozen=True)
class Decay:
    """Decay within chunks. All (B, c, H, L), but for `through` (B, c, H) and `visible`; float32, or float64 if the scan is.

    steps: dt.  coarse, fine: the running sum of dt A, in bits.  unfine: 2 ** -fine.  weights: dt * unfine; the scan sums weights * x.
    from_start: what is left of the state before the chunk; 0 behind a border.  through: the same at the chunk's end.
    to_end: what is left, at the chunk's end, of weights * x; 0 in front of a border.
    visible: inf where position s (last) may be seen from l, else -inf: (L, L), or with borders (B, c, 1, L, L).
    """

    steps: Tensor
    coarse: Tensor
    fine: Tensor
    unfine: Tensor
    weights: Tensor
    from_start: Tensor
    through: Tensor
    to_end: Tensor
    visible: Tensor

    @classmethod
    def within(cls, steps: Tensor, A: Tensor, segments: Tensor | None, before: Tensor | None) -> "Decay":
        """steps (B, c, H, L), A (H,); segments (B, c, L) integers or None, and before (B,), the segment in front of the first chunk."""
        span, dtype = steps.shape[-1], steps.dtype
        bits = steps.double() * (A.double() * BITS_PER_NAT)[:, None]
        visible = torch.full((span, span), float("inf"), dtype=dtype, device=steps.device).masked_fill_(
            torch.ones(span, span, dtype=torch.bool, device=steps.device).triu(1), float("-inf")
        )
        starts = ends = passes = None
        if segments is not None:
            # What a border hides.
            entering = torch.cat([before[:, None], segments[:, :-1, -1]], dim=1)  # B c: segment of the state before the chunk
            last = segments[..., -1:]
            visible = torch.where(segments[..., :, None] == segments[..., None, :], visible, float("-inf"))[:, :, None]
            starts, ends = (segments == entering[..., None])[:, :, None], (segments == last)[:, :, None]
            passes = entering[..., None] == last
        total = bits.cumsum(-1) if segments is None else bits @ _seen(visible).mT
        coarse = total.to(dtype)
        fine = (total - coarse).to(dtype)
        unfine = torch.exp2(-fine)
        from_start, through = torch.exp2(total).to(dtype), torch.exp2(total[..., -1]).to(dtype)
        to_end = torch.exp2((total[..., -1:] - total).to(dtype) + fine)
        if segments is not None:
            from_start, to_end, through = from_start * starts, to_end.masked_fill_(~ends, 0.0), through * passes
        return cls(steps, coarse, fine, unfine, steps * unfine, from_start, through, to_end, visible)

    def sum_behind(self, values: Tensor) -> Tensor:
        """values (B, c, H, L) float64 -> for each position the sum over itself and what lies behind it in its sequence and chunk."""
        return values @ _seen(self.visible)

    @classmethod
    def count(cls) -> int:
        """How many tensors it is made of."""
        return len(fields(cls))

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the constructor."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def matrix(self, row: int, chunks: slice, heads: slice, out: Tensor) -> Tensor:
        """out (k, R, L, L) = 2 ** (a_l - a_s + fine_s) where s may be seen from l, else 0."""
        coarse = self.coarse[row, chunks, heads]
        torch.sub(coarse[..., :, None], coarse[..., None, :], out=out)
        out += self.fine[row, chunks, heads, :, None]
        torch.minimum(out, self.visible if self.visible.ndim == 2 else self.visible[row, chunks], out=out)
        return torch.exp2(out, out=out)
