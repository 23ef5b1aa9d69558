"""Fit a learned position embedding to another number of patches, so that a checkpoint can be used with another tile size.

Bicubic in float32 without antialiasing: what InternViT's own code does. (timm resizes its towers by its own rule.)
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["resize_position_embedding"]


def resize_position_embedding(positions: Tensor, side: int, *, prefix_tokens: int) -> Tensor:
    """positions 1 prefix+P C or prefix+P C -> the same with side * side patches, dtype kept; the prefix is left as it is.

    Raises ValueError when the stored patches are no square grid.
    """
    prefix, patches = positions[..., :prefix_tokens, :], positions[..., prefix_tokens:, :]
    stored = math.isqrt(patches.shape[-2])
    if stored * stored != patches.shape[-2]:
        raise ValueError(f"the checkpoint's position embedding has {patches.shape[-2]} patches, which is no square grid.")
    if stored == side:
        return positions
    grid = patches.reshape(1, stored, stored, -1).permute(0, 3, 1, 2).float()  # 1 C h w
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    resized = grid.permute(0, 2, 3, 1).reshape(*patches.shape[:-2], side * side, -1).to(positions.dtype)
    return torch.cat([prefix, resized], dim=-2)
