"""What a processor makes of one picture and question: grid, tiles, normalised pixels, ids. No model is needed, milliseconds a picture.

Letters: N tiles, T positions.
"""

import hashlib
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..processing import VLMProcessor
from ..tiling import choose_grid, to_rgb

__all__ = ["Reading", "read_settings", "read_tiles"]

SETTINGS = ("tile_size", "max_tiles", "policy", "thumbnail", "image_mean", "image_std")


@dataclass(frozen=True)
class Reading:
    """ids of the prompt; pixels (N, H, W, 3) uint8; normalized (N, 3, H, W) float32, as the encoder gets them."""

    grid: tuple[int, int]
    ids: list[int]
    pixels: Tensor
    normalized: Tensor

    def record(self) -> dict:
        """The same as plain values: digests in place of pixels, of normalised ones mean and standard deviation of each channel."""
        means, deviations = self.normalized.mean((0, 2, 3)), self.normalized.std((0, 2, 3))
        return {
            "grid": list(self.grid),
            "tiles": len(self.pixels),
            "pixel_sha256": hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest(),
            "tile_digests": [hashlib.sha256(tile.numpy().tobytes()).hexdigest()[:16] for tile in self.pixels],
            "channels": [round(float(value), 6) for value in torch.cat([means, deviations])],
            "ids": self.ids,
        }


def read_settings(processor: VLMProcessor) -> dict:
    """What decides how pictures are cut and scaled, and how many visual tokens a tile has."""
    image_processor = processor.image_processor
    return {name: getattr(image_processor, name) for name in SETTINGS} | {"visual_tokens_per_tile": processor.visual_tokens_per_tile}


def read_tiles(processor: VLMProcessor, image: Image.Image, question: str) -> Reading:
    """The picture and the question as a user's turn, on the way that training, evaluation and demo take."""
    image_processor = processor.image_processor
    turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}
    prepared = processor.prepare([turn], add_generation_prompt=True)
    size = to_rgb(image).size
    grid = choose_grid(*size, tile_size=image_processor.tile_size, max_tiles=image_processor.max_tiles, policy=image_processor.policy)
    return Reading(tuple(grid), prepared.rendered.input_ids, prepared.pixels, image_processor.normalize_pixels(prepared.pixels))
