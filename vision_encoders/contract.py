"""What every vision encoder promises, so that tiling, projector and trainer need not know which one they hold.

Letters: N tiles, P patches per tile, C vision width.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["CLIP_MEAN", "CLIP_STD", "IMAGENET_MEAN", "IMAGENET_STD", "VisionEncoder", "as_square", "mark_initialized", "settled_dtype"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class VisionEncoder(nn.Module, ABC):
    """A tower, the few figures others ask for, and `forward`; a family fills in `features`."""

    def __init__(
        self,
        tower: nn.Module,
        *,
        image_size: int,
        patch_size: int,
        hidden_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        encoder_settings: dict,
    ):
        super().__init__()
        if image_size % patch_size:
            near = max(1, round(image_size / patch_size)) * patch_size
            raise ValueError(f"image_size {image_size} px is no multiple of patch_size {patch_size} px; try image_size={near}.")
        self.image_size = image_size  # pixels, height and width of a tile
        self.patch_size = patch_size  # pixels per patch, height and width
        self.hidden_size = hidden_size  # C
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.encoder_settings = encoder_settings | {"image_size": image_size, "mean": list(self.mean), "std": list(self.std)}
        self.tower = tower
        _settle(self)

    @abstractmethod
    def features(self, pixel_values: Tensor) -> Tensor:
        """N 3 H W -> N P C, patches only, row by row."""

    def inference_features(self, pixel_values: Tensor) -> Tensor:
        """The same in inference mode, where a family may have a faster way that has no gradient."""
        return self.features(pixel_values)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values N 3 image_size image_size (normalised with mean and std, any float dtype) -> features N P C, weights' dtype.

        Raises ValueError for another size, and when the tower's output is no square of patches.
        """
        expected = (3, self.image_size, self.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}, expected (tiles, {', '.join(map(str, expected))}); cut the image "
                f"into tiles of {self.image_size} px, or build the encoder with another image_size."
            )
        compute = self.inference_features if torch.is_inference_mode_enabled() else self.features
        features = compute(pixel_values.to(self.weight_dtype))  # N P C
        patches = (self.image_size // self.patch_size) ** 2
        if features.shape[1:] != (patches, self.hidden_size):
            raise ValueError(
                f"the tower of {self.encoder_settings['name']!r} gave features of shape {tuple(features.shape)}, expected "
                f"(tiles, {patches}, {self.hidden_size}); this model does not return a square grid of patches."
            )
        return features

    @property
    def weight_dtype(self) -> torch.dtype:
        """dtype of the first weight of at least two dimensions: what pixels are cast to (norms may be kept wider by a trainer).

        DeepSpeed's ZeRO-3 leaves every weight empty and flat between uses and keeps its shape in `ds_shape`.
        """
        return next(parameter.dtype for parameter in self.tower.parameters() if len(getattr(parameter, "ds_shape", parameter.shape)) >= 2)


def as_square(features: Tensor, *, prefix_tokens: int, channels: int, channels_last: bool) -> Tensor:
    """Any tower's output -> N P C: tokens N L C lose their first `prefix_tokens`, maps N C h w or N h w C are flattened row by row.

    `channels_last` decides only where the shape does not. Raises ValueError when the patches are no square.
    """
    if features.ndim == 3:
        patches = features[:, prefix_tokens:]
        side = math.isqrt(patches.shape[1])
        height, width = (side, side) if side * side == patches.shape[1] else (1, patches.shape[1])
    elif features.ndim == 4:
        last = features.shape[-1] == channels if features.shape[1] != features.shape[-1] else channels_last
        grid = features if last else features.permute(0, 2, 3, 1)  # N h w C
        height, width = grid.shape[1:3]
        patches = grid.flatten(1, 2)  # N P C
    else:
        raise ValueError(f"the tower returned a tensor of shape {tuple(features.shape)}, expected tokens (3-D) or a map (4-D).")
    if height != width:
        raise ValueError(f"the tower returned {height} x {width} patches (output {tuple(features.shape)}), expected a square grid.")
    return patches


def settled_dtype(sizes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The float dtype of most elements, given (dtype, number of elements) of each weight."""
    counted: Counter[torch.dtype] = Counter()
    for dtype, elements in sizes:
        if dtype.is_floating_point:
            counted[dtype] += elements
    return counted.most_common(1)[0][0]


def mark_initialized(encoder: nn.Module) -> None:
    """The mark that transformers looks for: without it, wrapping the encoder in a larger model would draw its weights again."""
    for tensor in (*encoder.parameters(), *encoder.buffers()):
        tensor._is_hf_initialized = True
    for module in encoder.modules():
        module._is_hf_initialized = True


def _settle(encoder: nn.Module) -> None:
    """Eval mode; one float dtype (the most frequent one of the checkpoint); weights marked as initialised."""
    encoder.eval()
    tensors = encoder.state_dict().values()
    if len({tensor.dtype for tensor in tensors if tensor.is_floating_point()}) > 1:
        encoder.to(settled_dtype((tensor.dtype, tensor.numel()) for tensor in tensors))
    if not any(tensor.is_meta for tensor in encoder.parameters()):
        mark_initialized(encoder)
