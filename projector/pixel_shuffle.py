"""Trade patches for channels: each square of factor x factor neighbouring patches becomes one visual token.

The order of the channels is InternVL's "v2" (row in the square, column in the square, channel), so that its projectors fit.
Letters: N tiles, P patches per tile, C vision width.
"""

import math

from einops import rearrange
from torch import Tensor

__all__ = ["pixel_shuffle"]


def pixel_shuffle(features: Tensor, factor: int = 2) -> Tensor:
    """features N P C (row by row, a square grid) -> N P/factor^2 factor^2*C, dtype kept.

    Raises ValueError when P is no square or its side does not divide by `factor`.
    """
    if features.ndim != 3:
        raise ValueError(f"features have shape {tuple(features.shape)}, expected (tiles, patches, width).")
    patches = features.shape[1]
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{patches} patches per tile are no square grid; pixel shuffle needs one (drop class and register tokens).")
    if factor < 1 or side % factor:
        raise ValueError(f"a grid of {side} x {side} patches does not divide by {factor = }; change image_size, patch_size or the factor.")
    # Order: row in the square, column in the square, channel.
    return rearrange(features, "n (h r w c) d -> n (h w) (r c d)", h=side // factor, w=side // factor, r=factor)
