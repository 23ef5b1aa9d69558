"""Running statistics (BatchNorm) that a pass must not move: of a blank tile, encoded for equal work on every rank and part of no image."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["unmoved_statistics"]


@contextmanager
def unmoved_statistics(encoder: nn.Module) -> Iterator[None]:
    """Within the block, layers of `encoder` that train normalise by their batch, as always, and leave running statistics as they are.

    Not by eval mode: a layer that shares its batch's statistics with other ranks (SyncBatchNorm) would then leave them waiting.
    """
    moving = [
        module for module in encoder.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats
    ]  # fmt: skip
    for module in moving:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in moving:
            module.track_running_stats = True
