"""What a check says, and how far two ways of computing the same may lie apart.

Rounding moves every number a little; a leak moves some positions a lot. So differences are taken position by position, relative to the
size of what is compared, and the worst position counts: one wrong position behind a border is not averaged away.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BOUNDS", "Check", "measured", "worst_position"]

# Rounding of a forward pass through a deep model, relative: what the same computation in another order may differ by. A loss is in float32
# whatever the model is, and so is a kept state.
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Check:
    """One line of the doctor: what was looked at, the figure found, and whether it holds."""

    name: str
    figure: str
    ok: bool

    def line(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.name:<52} {self.figure}"


def worst_position(found: Tensor, expected: Tensor) -> float:
    """found, expected (..., T, D) -> largest distance at a position, relative to the mean size of the expected positions.

    Not a number anywhere gives infinity. No position gives 0.
    """
    if found.shape != expected.shape:
        raise ValueError(f"found shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if not found.numel():
        return 0.0
    distances, sizes = (found.double() - expected.double()).norm(dim=-1), expected.double().norm(dim=-1)
    if not distances.isfinite().all():
        return float("inf")
    return float(distances.max() / sizes.mean().clamp_min(1e-30))


def measured(name: str, value: float, bound: float, note: str = "") -> Check:
    """A check that a relative difference stays within a bound; not a number fails."""
    return Check(name, f"{value:.1e} (bound {bound:.0e}){note}", value <= bound)
