"""Where each sample of a folder of shards stands, and what it weighs: the index files as columns of numbers, a line read when asked for.

As dictionaries the index took 1.7 KB a sample, in every rank and, since Python writes into what it looks at, in every reading process
forked from it: 20 GB for 665,000 samples, eight ranks, and one reader each. Columns take some 30 bytes a sample, and forks share them.
"""

import json
import os
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["OpenFiles", "SampleIndex"]


class OpenFiles:
    """Pieces of many files, of which the `most` used last stay open. Forked processes may read from the same one."""

    def __init__(self, most: int):
        self.most, self._files = most, OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, fewer at the file's end."""
        if path in self._files:
            self._files.move_to_end(path)
        else:
            while len(self._files) >= self.most:
                os.close(self._files.popitem(last=False)[1])
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        parts = []
        while size and (part := os.pread(self._files[path], size, offset)):  # some file systems give less at a time
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    def close(self) -> None:
        """The next read opens its file again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self):
        self.close()


class SampleIndex(Sequence):
    """(shard, entry of its index) by number, read anew each time; `tokens` and `supervised_tokens` (int32 arrays) and `tiles(number)`
    without reading. With `at_most_tiles` samples of more tiles have no number; `left_out` counts them.

    Raises ValueError when an index file is missing or damaged.
    """

    def __init__(self, shards: list[Path], files: OpenFiles, *, at_most_tiles: int | None = None):
        self.shards, self.left_out, self._files = shards, 0, files
        starts, offsets, sizes = array("q"), array("q"), array("l")
        tokens, supervised, tiles, images = array("l"), array("l"), array("l"), array("q", [0])
        for shard in shards:
            starts.append(len(offsets))
            offset, index = 0, _index_file(shard)
            if not index.is_file():
                raise ValueError(f"shard {shard} has no index {index.name}; write the shards again")
            with open(index, "rb") as lines:
                for line in lines:
                    if line.strip():
                        entry = _parsed(line, index)
                        if at_most_tiles is not None and sum(entry["tiles"]) > at_most_tiles:
                            self.left_out += 1
                        else:
                            offsets.append(offset)
                            sizes.append(len(line))
                            tokens.append(entry["tokens"])
                            supervised.append(entry["supervised_tokens"])
                            tiles.extend(entry["tiles"])
                            images.append(len(tiles))
                    offset += len(line)
        # The sample's number of a shard's first one; of each sample its line's place, and where its images' tiles begin.
        self._starts, self._offsets, self._images = (np.array(column, dtype=np.int64) for column in (starts, offsets, images))
        self._sizes, self.tokens, self.supervised_tokens, self._tiles = (
            np.array(column, dtype=np.int32) for column in (sizes, tokens, supervised, tiles)
        )

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, number: int) -> tuple[Path, dict]:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        shard = self.shards[int(np.searchsorted(self._starts, number, side="right")) - 1]
        index = _index_file(shard)
        return shard, _parsed(self._files.read(index, int(self._offsets[number]), int(self._sizes[number])), index)

    def tiles(self, number: int) -> list[int]:
        """Of each image of a sample."""
        return self._tiles[self._images[number] : self._images[number + 1]].tolist()


def _index_file(shard: Path) -> Path:
    return shard.with_suffix(".index.jsonl")


def _parsed(line: bytes, index: Path) -> dict:
    try:
        entry = json.loads(line)
        if missing := {"key", "members", "tiles", "tokens", "supervised_tokens"} - entry.keys():
            raise ValueError(f"a line without {', '.join(sorted(missing))}")
        numbers = [entry["tokens"], entry["supervised_tokens"], *entry["tiles"]]
        if not all(isinstance(number, int) and 0 <= number < 2**31 for number in numbers):
            raise ValueError(f"found {numbers} for tokens, supervised tokens and tiles")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"index {index} is damaged ({error}); write the shards again") from error
    return entry
