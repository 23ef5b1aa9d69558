"""Running statistics (BatchNorm) that a pass must not move: of a blank tile, encoded for equal work on every rank and part of no image."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["unmoved_statistics"]


@contextmanager
def unmoved_statistics(encoder: nn.Module) -> Iterator[None]:
    """Within the block, layers of `encoder` that train normalise by their batch, as always, and leave running statistics as they are.
    Those that share statistics with other ranks (shared_statistics.py) normalise by the others', and move with them.

    Not by eval mode: a layer that shares its batch's statistics (SyncBatchNorm, too) would then leave other ranks waiting.
    """
    training = [module for module in encoder.modules() if isinstance(module, nn.modules.batchnorm._NormBase) and module.training]
    sharing = [module for module in training if hasattr(module, "counts_in_statistics")]
    moving = [module for module in training if module.track_running_stats and module not in sharing]
    for module in sharing:
        module.counts_in_statistics = False
    for module in moving:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in sharing:
            module.counts_in_statistics = True
        for module in moving:
            module.track_running_stats = True
