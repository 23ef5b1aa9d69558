"""Images and messages -> what the model takes. A transformers processor around the one tiler and the one renderer.

Letters: B batch, T positions, N tiles.
"""

from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from .rendering import PLACEHOLDER, ChatFormat, Rendered, Renderer, normalize_messages
from .tiling import choose_grid, open_image, tile_image

__all__ = ["Prepared", "VLMImageProcessor", "VLMProcessor"]


class VLMImageProcessor(BaseImageProcessor):
    """Tiles and normalises images. tile_size in pixels; max_tiles without the thumbnail; mean and std per channel, for values in 0..1."""

    model_input_names = ["pixel_values", "num_tiles"]

    def __init__(self, tile_size=448, max_tiles=12, policy="closest", thumbnail=True, image_mean=None, image_std=None, **kwargs):
        super().__init__(**kwargs)
        self.tile_size, self.max_tiles, self.policy, self.thumbnail = tile_size, max_tiles, policy, thumbnail
        self.image_mean = list(image_mean or (0.485, 0.456, 0.406))
        self.image_std = list(image_std or (0.229, 0.224, 0.225))

    def tile(self, image, max_tiles: int | None = None) -> list[Image.Image]:
        """The tiles of one image (path, file or Pillow image)."""
        limit = self.max_tiles if max_tiles is None else max_tiles
        return tile_image(open_image(image), tile_size=self.tile_size, max_tiles=limit, policy=self.policy, thumbnail=self.thumbnail)

    def count_tiles(self, width: int, height: int, max_tiles: int | None = None) -> int:
        """How many tiles an image of this size becomes, thumbnail included."""
        limit = self.max_tiles if max_tiles is None else max_tiles
        grid = choose_grid(width, height, tile_size=self.tile_size, max_tiles=limit, policy=self.policy)
        return grid.tiles + (1 if self.thumbnail and grid.tiles > 1 else 0)

    def to_pixels(self, tiles: list[Image.Image]) -> torch.Tensor:
        """N RGB tiles -> (N, 3, H, W) float32, normalised; an empty list gives N = 0."""
        if not tiles:
            return torch.zeros(0, 3, self.tile_size, self.tile_size)
        return self.normalize_pixels(torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])))

    def normalize_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) with mean and std applied, on the same device: bytes are moved faster than floats."""
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.image_mean, self.image_std))
        planes = pixels.permute(0, 3, 1, 2).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return planes.div_(255.0).sub_(mean).div_(std)

    def preprocess(self, images, max_tiles: int | None = None, return_tensors="pt", **kwargs) -> BatchFeature:
        """One image or a list -> pixel_values (N, 3, H, W) of all tiles in order, num_tiles (one int an image)."""
        images = images if isinstance(images, list | tuple) else [images]
        tiles = [self.tile(image, max_tiles) for image in images]
        pixels = self.to_pixels([tile for group in tiles for tile in group])
        return BatchFeature({"pixel_values": pixels, "num_tiles": torch.tensor([len(group) for group in tiles])})

    def __call__(self, images, **kwargs) -> BatchFeature:
        return self.preprocess(images, **kwargs)


@dataclass
class Prepared:
    """One conversation, ready: rendered ids, tiles as uint8 (N, H, W, 3), and receipts of tiles taken away to fit the length."""

    rendered: Rendered
    pixels: torch.Tensor
    num_tiles: list[int]
    receipts: list[str] = field(default_factory=list)


class VLMProcessor(ProcessorMixin):
    """Tokenizer, image processor and chat format of one model. `prepare` makes one sample; calling it makes a padded batch."""

    def __init__(self, image_processor=None, tokenizer=None, chat_format=None, visual_tokens_per_tile=256, chat_template=None, **kwargs):
        chat_format = ChatFormat(**chat_format) if isinstance(chat_format, dict) else chat_format or ChatFormat()
        self.chat_format = chat_format.to_dict()
        self.visual_tokens_per_tile = visual_tokens_per_tile
        super().__init__(image_processor, tokenizer, chat_template=chat_template or chat_format.chat_template())
        self.renderer = Renderer(tokenizer, chat_format, visual_tokens_per_tile)

    def to_dict(self, *args, **kwargs):
        result = super().to_dict(*args, **kwargs)
        result.pop("renderer", None)
        return result

    def prepare(
        self,
        messages: list[dict],
        *,
        max_tokens: int | None = None,
        max_tiles: int | None = None,
        add_generation_prompt: bool = False,
        thinking: bool | None = None,
    ) -> Prepared:
        """Messages with images (paths, files or Pillow images) -> ids, labels and tiles.

        When the text is longer than `max_tokens`, tiles are taken from the image with most of them, one image and one step at a time,
        with a receipt each. `thinking` is a reasoning checkpoint's switch (see `Renderer.render`). Raises ValueError when even one tile an
        image is too long (text is never cut) or an image is broken.
        """
        messages = normalize_messages(messages)
        images = [open_image(part["image"]) for message in messages for part in message["content"] if part["type"] == "image"]
        limit = self.image_processor.max_tiles if max_tiles is None else max_tiles
        limits = [limit] * len(images)
        counts = [self.image_processor.count_tiles(*image.size, limit) for image in images]
        rendered = self.renderer.render(messages, counts, add_generation_prompt=add_generation_prompt, thinking=thinking)
        receipts = []
        while max_tokens is not None and len(rendered.input_ids) > max_tokens:
            if not counts or max(counts) == 1:
                raise ValueError(
                    f"the sample has {len(rendered.input_ids)} tokens with one tile an image; at most {max_tokens} fit; "
                    "shorten the text or raise the length (text is never cut)"
                )
            largest = counts.index(max(counts))
            before = counts[largest]
            while counts[largest] == before:
                limits[largest] -= 1
                counts[largest] = self.image_processor.count_tiles(*images[largest].size, limits[largest])
            receipts.append(f"image {largest + 1}: {before} -> {counts[largest]} tiles to fit {max_tokens} tokens")
            rendered = self.renderer.render(messages, counts, add_generation_prompt=add_generation_prompt, thinking=thinking)
        tiles = [tile for image, tiles in zip(images, limits, strict=True) for tile in self.image_processor.tile(image, tiles)]
        size = self.image_processor.tile_size
        pixels = (
            torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])) if tiles else torch.zeros(0, size, size, 3, dtype=torch.uint8)
        )
        return Prepared(rendered, pixels, counts, receipts)

    def apply_chat_template(
        self, conversation, *, add_generation_prompt=False, tokenize=False, return_dict=False, return_tensors=None, **kwargs
    ):
        """transformers' call, for one conversation or a batch. Tokenised, user text stays plain text (the renderer makes the ids).

        `enable_thinking` is a reasoning checkpoint's switch, as in its own template; to ask it of another checkpoint is a ValueError.
        """
        thinking = kwargs.pop("enable_thinking", None)
        self.renderer.chat_format.answer_opening(thinking)
        if not tokenize:
            if thinking is not None and self.renderer.chat_format.think_open:
                kwargs["enable_thinking"] = thinking
            return super().apply_chat_template(conversation, add_generation_prompt=add_generation_prompt, tokenize=False, **kwargs)
        conversations = conversation if isinstance(conversation[0], list) else [conversation]
        samples = [self.prepare(messages, add_generation_prompt=add_generation_prompt, thinking=thinking) for messages in conversations]
        batch = self.pad([sample.rendered.input_ids for sample in samples])
        batch["pixel_values"] = self.image_processor.normalize_pixels(torch.cat([sample.pixels for sample in samples]))
        return batch if return_dict else batch["input_ids"]

    def __call__(self, images=None, text=None, add_special_tokens=False, return_tensors="pt", **kwargs) -> BatchFeature:
        """Text made by the chat template, in which each `<image>` stands for one of `images` (a flat list over the batch).

        `<image>` and the marks of the chat format are special here, nothing else is: give it only text that the chat template made. Raises
        ValueError when `<image>` and images differ in number.
        """
        texts = [text] if isinstance(text, str) else list(text)
        images = [] if images is None else (list(images) if isinstance(images, list | tuple) else [images])
        images = [item for group in images for item in (group if isinstance(group, list | tuple) else [group])]
        found = sum(item.count(PLACEHOLDER) for item in texts)
        if found != len(images):
            raise ValueError(f"found {found} times {PLACEHOLDER} in the text for {len(images)} images; expected one for each image")
        vision = self.image_processor(images) if images else None
        counts = iter(vision["num_tiles"].tolist() if vision else [])
        batch = self.pad([self.renderer.encode_marked(item, list(islice(counts, item.count(PLACEHOLDER)))) for item in texts])
        if vision:
            batch["pixel_values"] = vision["pixel_values"]
        return batch

    def pad(self, rows: list[list[int]]) -> BatchFeature:
        """Rows of ids -> input_ids and attention_mask (B, T), padded on the left (what `generate` wants)."""
        width = max(len(row) for row in rows)
        filler = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.renderer.end_of_turn_id
        ids = torch.tensor([[filler] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return BatchFeature({"input_ids": ids, "attention_mask": mask})

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]
