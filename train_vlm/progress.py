"""How far a run is: by its steps, or by the clock when the recipe gives minutes.

With minutes the learning rate follows the time that has passed, so that the run ends on time, at its final rate, however the cost of
its steps changes on the way. The clock is rank 0's: all ranks must agree on the rate and on the last step. Such a run is not repeatable
step by step; one that gives steps is.
"""

import math
import time
from collections.abc import Callable

import torch

from vision_encoders.gathering import gather_over_ranks

__all__ = ["Progress", "learning_rate_share", "share_from_first_rank"]


def learning_rate_share(position: float, length: float, warmup: float, final: float) -> float:
    """The rate at a step (0-based) of `length` steps, or at a second of `length` seconds, as a share of the peak: a linear rise over the
    share `warmup`, then a cosine down to `final`."""
    rising = max(1, round(warmup * length))
    if position < rising:
        return min(1.0, (position + 1) / rising)
    progress = min(1.0, (position - rising) / max(1, length - rising))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


class Progress:
    """`steps` or `minutes`; `spent`: seconds of earlier starts of the same run; `share` makes rank 0's number everyone's."""

    def __init__(
        self,
        steps: int | None,
        minutes: float | None,
        *,
        spent: float = 0.0,
        share: Callable[[float], float] = lambda value: value,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.steps, self.seconds = steps, None if minutes is None else minutes * 60.0
        self._share, self._clock, self._started = share, clock, clock() - spent

    @property
    def spent(self) -> float:
        """Seconds since the start, by this rank's clock."""
        return self._clock() - self._started

    def position(self, step: int) -> tuple[float, float]:
        """(where the run is, its length), in steps or in seconds; call it after `step` steps on every rank, once."""
        if self.steps is not None:
            return step, self.steps
        return self._share(self.spent), self.seconds

    def expected_steps(self, step: int) -> int:
        """The number of steps at the end, estimated when time decides."""
        if self.steps is not None:
            return self.steps
        return max(step, round(step * self.seconds / max(self.spent, 1e-9)))


def share_from_first_rank(value: float, device: torch.device) -> float:
    """Rank 0's value, on every rank."""
    return gather_over_ranks(torch.tensor([float(value)], dtype=torch.float64, device=device))[0].item()
