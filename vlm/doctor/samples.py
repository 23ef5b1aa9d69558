"""A few conversations in the model's own format, with drawn pictures: what the checks run on.

Text only, one tile, several tiles, several pictures: the mixture in which tiles could land in a neighbour and states leak.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..processing import VLMProcessor

__all__ = ["Sample", "draw_samples", "noise", "pack", "padded", "places"]


@dataclass(frozen=True)
class Sample:
    """input_ids, labels (1, T); pixels (N, 3, H, W), N may be 0; question: the user's message alone."""

    input_ids: Tensor
    labels: Tensor
    pixels: Tensor
    question: dict

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    @property
    def model_inputs(self) -> dict[str, Tensor | None]:
        return {"input_ids": self.input_ids, "pixel_values": self.pixels if len(self.pixels) else None}


def noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def draw_samples(processor: VLMProcessor, device: torch.device) -> list[Sample]:
    """Four conversations: a wide picture, no picture, two pictures, a small picture."""
    side = processor.image_processor.tile_size
    plans = [
        ([(2 * side, side)], "What colour is the ball?", "a red ball"),
        ([], "No picture here.", "no"),
        ([(side, side), (side, 2 * side)], "Which is larger?", "the second"),
        ([(side - 4, side - 4)], "And?", "x"),
    ]
    samples = []
    for number, (sizes, words, answer) in enumerate(plans):
        images = [{"type": "image", "image": noise(*size, 10 * number + place)} for place, size in enumerate(sizes)]
        question = {"role": "user", "content": [*images, {"type": "text", "text": words}]}
        prepared = processor.prepare([question, {"role": "assistant", "content": answer}])
        ids, labels = (torch.tensor(row, device=device)[None] for row in (prepared.rendered.input_ids, prepared.rendered.labels))
        samples.append(Sample(ids, labels, processor.image_processor.normalize_pixels(prepared.pixels).to(device), question))
    return samples


def pack(samples: list[Sample]) -> dict[str, Tensor]:
    """The samples end to end in one row, as the model takes them."""
    lengths = torch.tensor([0, *(sample.length for sample in samples)], device=samples[0].input_ids.device)
    return {
        "input_ids": torch.cat([sample.input_ids for sample in samples], dim=1),
        "pixel_values": torch.cat([sample.pixels for sample in samples]),
        "cu_seq_lens_q": lengths.cumsum(0),
    }


def places(samples: list[Sample]) -> list[slice]:
    """Where each sample stands in their pack."""
    ends = np.cumsum([sample.length for sample in samples])
    return [slice(int(end) - sample.length, int(end)) for end, sample in zip(ends, samples, strict=True)]


def padded(samples: list[Sample], side: str, *, extra: int = 0) -> dict[str, Tensor]:
    """The samples as rows of one batch, padded on a side to the longest and `extra` more.

    The padding repeats a real token of its row: its mask must make it invisible, not its id.
    """
    width = max(sample.length for sample in samples) + extra
    rows, masks = [], []
    for sample in samples:
        ids, ones = sample.input_ids, torch.ones_like(sample.input_ids)
        filler = ids[:, -1:].expand(1, width - sample.length)
        blank = torch.zeros_like(filler)
        rows.append(torch.cat([filler, ids] if side == "left" else [ids, filler], dim=1))
        masks.append(torch.cat([blank, ones] if side == "left" else [ones, blank], dim=1))
    return {
        "input_ids": torch.cat(rows),
        "attention_mask": torch.cat(masks),
        "pixel_values": torch.cat([sample.pixels for sample in samples]),
    }
