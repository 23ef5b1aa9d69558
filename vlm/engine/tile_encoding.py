"""Visual tokens of the tiles that some prompts are about: each distinct tile encoded once, however many ask about it.

Letters: N distinct tiles, V visual tokens of a tile, D decoder width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..decoder.packed_weights import PackedWeights
from ..modeling import VisionLanguageModel
from ..processing import VLMProcessor
from .prompt import Prompt
from .sharing import Piece
from .ticket import Ticket

__all__ = ["TileEncoder", "VisualTokens", "keys_within"]

TILES_A_CALL = 128  # on a GPU
CACHED_BYTES = 2**22  # on a CPU, as many tiles as keep the encoder's widest activation in the cache


def keys_within(prompt: Prompt, piece: Piece) -> list[bytes]:
    """Digests of the tiles that stand in this piece of a prompt. A cut never goes through a tile: their first words differ."""
    first, last = prompt.tile_starts.searchsorted((piece.start, piece.end))
    return prompt.tile_keys[first:last]


@dataclass(frozen=True)
class VisualTokens:
    """tokens: (N, V, D), or None without a tile; places: where each digest stands in them."""

    tokens: Tensor | None
    places: dict[bytes, int]

    def of(self, keys: list[bytes]) -> Tensor | None:
        """(len(keys), V, D) in this order, or None for no tile."""
        if not keys:
            return None
        return self.tokens.index_select(0, torch.tensor([self.places[key] for key in keys], device=self.tokens.device))


class TileEncoder:
    """Encoder and projector of a model, as the engine calls them."""

    def __init__(self, model: VisionLanguageModel, processor: VLMProcessor, packed: PackedWeights):
        self.model, self.image_processor = model, processor.image_processor
        self._with_packed_weights = packed.within(model.vision_encoder, model.projector)

    def encode(self, tickets: list[Ticket], pieces: list[Piece]) -> VisualTokens:
        """Of the distinct tiles in these pieces of the tickets' prompts."""
        places: dict[bytes, int] = {}
        pixels = []
        for piece in pieces:
            prompt = tickets[piece.owner].prompt
            first = int(prompt.tile_starts.searchsorted(piece.start))
            for offset, key in enumerate(keys_within(prompt, piece)):
                if key not in places:
                    places[key] = len(pixels)
                    pixels.append(prompt.pixels[first + offset])
        if not pixels:
            return VisualTokens(None, places)
        device = self.model.device
        step = TILES_A_CALL if device.type == "cuda" else self._tiles_in_cache()
        calls = (torch.stack(pixels[start : start + step]).to(device) for start in range(0, len(pixels), step))
        with self._with_packed_weights:
            return VisualTokens(torch.cat([self.model.encode_tiles(self.image_processor.normalize_pixels(call)) for call in calls]), places)

    def _tiles_in_cache(self) -> int:
        """Patches x FFN width (four times the encoder's) x float32 for each tile."""
        vision = self.model.config.vision_config
        return max(1, CACHED_BYTES // ((vision.image_size // vision.patch_size) ** 2 * vision.hidden_size * 4 * 4))
