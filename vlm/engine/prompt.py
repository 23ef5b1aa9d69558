"""Messages -> a prompt: token ids, tiles, and an identity that two prompts share exactly as far as they show the model the same.

A placeholder has the same id in every prompt, whatever the picture. In the identity a digest of the tile's pixels stands in its place, so
that "same prefix" is one comparison of numbers, for text and pictures alike. Pictures are tiled once for all questions about them.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..processing import VLMProcessor
from ..rendering import normalize_messages

__all__ = ["Prompt", "Prompter"]

DIGEST_WORDS = 4  # 256 bits a tile


@dataclass(frozen=True)
class Tiles:
    """Tiles of a prompt: pixels (N, H, W, 3) uint8, and of each tile its digest as int64 words (N, 4), all below 0."""

    pixels: torch.Tensor
    digests: np.ndarray
    counts: tuple[int, ...]  # tiles of each image


@dataclass
class Prompt:
    """ids (T); identity (T,) int64; N tiles in reading order. cuts: lengths of prefixes others may have too: the system turn, and up to the
    last image."""

    ids: list[int]
    identity: np.ndarray
    pixels: torch.Tensor | None  # (N, H, W, 3) uint8; None once they were read
    tile_keys: list[bytes]  # digest of each tile
    tile_starts: np.ndarray  # (N,) place of the first placeholder of each tile
    visual_tokens: int
    cuts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


def digest_tiles(pixels: torch.Tensor) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, 4) int64, negative, so that no token id can be taken for one."""
    words = [
        np.frombuffer(hashlib.blake2b(tile.tobytes(), digest_size=8 * DIGEST_WORDS).digest(), dtype=np.int64) for tile in pixels.numpy()
    ]
    return np.stack(words) | np.int64(-(2**63)) if words else np.zeros((0, DIGEST_WORDS), dtype=np.int64)


def _picture_key(source) -> tuple | None:
    """Names a picture for as long as it is not changed; None when that cannot be known."""
    if isinstance(source, Image.Image):
        return ("object", id(source))
    if isinstance(source, str | Path):
        try:
            found = os.stat(source)
        except OSError:
            return None
        return ("file", os.fspath(source), found.st_mtime_ns, found.st_size, found.st_ino)
    return None


def _bytes_a_pixel(picture: Image.Image) -> int:
    """In memory: Pillow keeps a fourth byte beside three colours."""
    return 1 if picture.mode in ("1", "L", "P") else 4


class Prompter:
    """Prepares prompts of one processor, and remembers the tiles of the pictures asked about last.

    most_bytes: of remembered tiles, and of the pictures they are of. A Pillow image is known by identity while it is remembered: `forget`
    before it may have been changed.
    """

    def __init__(self, processor: VLMProcessor, image_token_id: int, most_bytes: int = 2**27):
        self.processor, self.image_token_id, self.most_bytes = processor, image_token_id, most_bytes
        self._tiles: OrderedDict[tuple, tuple[Tiles, list, int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Forget pictures given as objects: from now on the same object may show something else."""
        with self._lock:
            for key in [key for key in self._tiles if any(part[0] == "object" for part in key)]:
                self._drop(key)

    def _drop(self, key: tuple) -> None:
        _, _, size = self._tiles.pop(key)
        self._bytes -= size

    @staticmethod
    def empty() -> Prompt:
        """What stands in a ticket whose messages could not be prepared."""
        return Prompt([], np.zeros(0, dtype=np.int64), None, [], np.zeros(0, dtype=np.int64), 0, ())

    def prepare(self, messages: list, max_tokens: int | None, thinking: bool | None = None) -> Prompt:
        """Raises ValueError / FileNotFoundError as `VLMProcessor.prepare`."""
        messages = normalize_messages(messages)
        pictures = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        keys = tuple(_picture_key(picture) for picture in pictures)
        known = self._recall(keys) if pictures and None not in keys else None
        if known is not None:
            rendered = self.processor.renderer.render(messages, list(known.counts), add_generation_prompt=True, thinking=thinking)
            if max_tokens is None or len(rendered.input_ids) <= max_tokens:
                return self._prompt(messages, rendered, known)
        prepared = self.processor.prepare(messages, max_tokens=max_tokens, add_generation_prompt=True, thinking=thinking)
        tiles = Tiles(prepared.pixels, digest_tiles(prepared.pixels), tuple(prepared.num_tiles))
        if pictures and None not in keys and not prepared.receipts:
            self._remember(keys, tiles, pictures)
        return self._prompt(messages, prepared.rendered, tiles)

    def _recall(self, keys: tuple) -> Tiles | None:
        with self._lock:
            if keys not in self._tiles:
                return None
            self._tiles.move_to_end(keys)
            return self._tiles[keys][0]

    def _remember(self, keys: tuple, tiles: Tiles, pictures: list) -> None:
        with self._lock:
            if keys not in self._tiles:
                opened = [picture for picture in pictures if isinstance(picture, Image.Image)]
                size = tiles.pixels.numel() + sum(picture.width * picture.height * _bytes_a_pixel(picture) for picture in opened)
                self._tiles[keys] = tiles, pictures, size  # the pictures stay alive, so that no other object gets their id
                self._bytes += size
            while self._bytes > self.most_bytes and len(self._tiles) > 1:  # the next question may be about the last one
                self._drop(next(iter(self._tiles)))

    def _prompt(self, messages: list[dict], rendered, tiles: Tiles) -> Prompt:
        ids, renderer = rendered.input_ids, self.processor.renderer
        has_system = messages[0]["role"] == "system" or renderer.chat_format.system is not None
        # Some formats end only answers with that token; there is then no cut behind the system turn.
        first_turn = ids.index(renderer.end_of_turn_id) + 1 if has_system and renderer.end_of_turn_id in ids else 0
        identity = np.array(ids, dtype=np.int64)
        each = self.processor.visual_tokens_per_tile
        places = np.flatnonzero(identity == self.image_token_id)
        if len(places) != each * len(tiles.digests):
            raise ValueError(f"found {len(places)} image placeholders for {len(tiles.digests)} tiles of {each} visual tokens")
        if len(places):
            # A tile's words, over and over, on its placeholders.
            identity[places] = np.resize(tiles.digests.T, (each, len(tiles.digests))).T.flatten()
        cuts = tuple(sorted({first_turn, rendered.prefix_tokens} - {0}))
        keys = [digest.tobytes() for digest in tiles.digests]
        return Prompt(ids, identity, tiles.pixels, keys, places[::each], rendered.visual_tokens, cuts)
