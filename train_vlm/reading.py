"""Read samples by position: a seeded permutation of each source's index, sources mixed by weight, each sample once an epoch.

A position of the stream is a number. Which sample stands there follows from the seed alone, so that another number of ranks, or a start
in the middle, is arithmetic and nothing is lost or repeated.
"""

import io
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

from train_vlm.conversations import has_answer
from train_vlm.plain_text import prepare_text
from train_vlm.recipe import Source
from train_vlm.sample_index import OpenFiles, SampleIndex
from vlm.processing import VLMProcessor
from vlm.tiling import open_image

__all__ = ["SampleStream", "ShardedSource", "blend_cycle"]

CYCLE = 1000
OPEN_FILES = 128  # shards and their indexes


def _image_members(entry: dict) -> list[str]:
    """Names of a sample's images, in order."""
    return sorted((name for name in entry["members"] if name != "json"), key=lambda name: int(name.split(".")[0]))


class ShardedSource:
    """All samples of a folder of shards. Raises FileNotFoundError / ValueError when folder, shard, index or summary is missing or empty, or
    when the summary counts other samples: what a conversion that was stopped leaves behind."""

    def __init__(self, folder: str | Path, at_most_tiles: int | None = None):
        self.folder = Path(folder)
        shards = sorted(self.folder.glob("*.tar"))
        if not shards:
            raise FileNotFoundError(f"no shards in {folder}; make them by python -m train_vlm.shards convert")
        self._files = OpenFiles(OPEN_FILES)
        self.entries = SampleIndex(shards, self._files, at_most_tiles=at_most_tiles)
        self.left_out = self.entries.left_out
        found = len(self.entries) + self.left_out
        if not self.entries:
            raise ValueError(f"the shards in {folder} hold {found} samples, none of at most {at_most_tiles} tiles")
        self.skipped = self._checked_summary(found)["skipped"]

    def __len__(self) -> int:
        return len(self.entries)

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        self._files.close()

    def _checked_summary(self, found: int) -> dict:
        """summary.json, which a conversion writes last. `found`: samples in the indexes."""
        path, again = self.folder / "summary.json", "convert its samples again (python -m train_vlm.shards convert)"
        if not path.is_file():
            raise ValueError(f"{self.folder} holds {found} samples and no summary.json: the conversion was not finished; {again}")
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            counted, _ = summary["samples"], summary["skipped"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); {again}") from error
        if counted != found:
            raise ValueError(f"the indexes in {self.folder} list {found} samples, its summary.json {counted}; {again}")
        return summary

    def never_read(self) -> dict[str, int]:
        """What is not read at all: left out by `at_most_tiles`, and by reason when the shards were written."""
        counts = {"more tiles than at_most_tiles": self.left_out} if self.left_out else {}
        return counts | {f"{reason} when the shards were written": count for reason, count in self.skipped.items()}

    def _read(self, shard: Path, place: list[int]) -> bytes:
        content = self._files.read(shard, *place)
        if len(content) != place[1]:
            raise ValueError(f"shard {shard} is truncated: {len(content)} of {place[1]} bytes at {place[0]}")
        return content

    def content(self, number: int) -> tuple[bytes, list[bytes]]:
        """The JSON of a sample and its images' files, as they stand in the shard. Raises ValueError when the shard is cut off."""
        shard, entry = self.entries[number]
        return self._read(shard, entry["members"]["json"]), [self._read(shard, entry["members"][name]) for name in _image_members(entry)]

    def read(self, number: int) -> tuple[str, list[dict] | str]:
        """The id and the messages of a sample, images in place as RGB, or its plain text. Raises ValueError when an image cannot be
        decoded."""
        entry = self.entries[number][1]
        record, contents = self.content(number)
        record = json.loads(record)
        if "text" in record:
            return record["id"], record["text"]
        images = []
        for name, content in zip(_image_members(entry), contents, strict=True):
            try:
                images.append(open_image(io.BytesIO(content)))
            except ValueError as error:
                raise ValueError(f"image {name} of sample {entry['key']} is broken: {error}") from error
        waiting = iter(images)
        for message in record["messages"]:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = next(waiting, None)
                    if part["image"] is None:
                        raise ValueError(f"image missing: sample {entry['key']} has {len(images)}, its text asks for more")
        return record["id"], record["messages"]


def blend_cycle(weights: list[float], length: int = CYCLE) -> list[int]:
    """A cycle of source numbers in which each source stands in proportion to its weight, spread evenly (smooth weighted round robin)."""
    total, credit, cycle = sum(weights), [0.0] * len(weights), []
    for _ in range(length):
        credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
        chosen = max(range(len(weights)), key=credit.__getitem__)
        credit[chosen] -= total
        cycle.append(chosen)
    return cycle


class SampleStream(torch.utils.data.Dataset):
    """Position -> one prepared sample, or the reason why there is none. Endless: positions go on into further epochs."""

    def __init__(self, sources: tuple[Source, ...], processor: VLMProcessor, *, seed: int, max_tokens: int):
        self.settings = sources
        self.sources = [ShardedSource(source.shards, source.at_most_tiles) for source in sources]
        self.processor, self.seed, self.max_tokens = processor, seed, max_tokens
        most = processor.image_processor.max_tiles
        for source in sources:
            if source.max_tiles is not None and source.max_tiles > most:
                raise ValueError(
                    f"data.sources: max_tiles of {source.shards} is {source.max_tiles}; the model cuts an image into at most {most} tiles "
                    "(max_tiles of its preprocessor_config.json), and so the indexes count; give at most that, or null"
                )
        self.cycle = blend_cycle([source.weight for source in sources])
        unread = [source.shards for number, source in enumerate(sources) if number not in self.cycle]
        if unread:
            raise ValueError(f"data.sources: the weight of {unread[0]} is under 1/{CYCLE} of all; raise it or leave the source out")
        counts = [0] * len(sources)
        self.rank_in_cycle = []  # how many earlier places of the cycle have the same source
        for source in self.cycle:
            self.rank_in_cycle.append(counts[source])
            counts[source] += 1
        self.per_cycle = counts
        self._orders: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def locate(self, position: int) -> tuple[int, int]:
        """(source, sample number) at a position of the stream."""
        source, epoch, within = self._place(position)
        return source, int(self._order(source, epoch)[within])

    def _place(self, position: int) -> tuple[int, int, int]:
        cycle, place = divmod(position, len(self.cycle))
        source = self.cycle[place]
        drawn = cycle * self.per_cycle[source] + self.rank_in_cycle[place]
        return source, *divmod(drawn, len(self.sources[source]))

    def once(self, most: int) -> list[tuple[int, int]]:
        """(source, sample number) of the first `most` samples of the stream without a repeat: a source that was read through gives no
        more, and all of them give no more than they have."""
        found, position, wanted = [], 0, min(most, sum(map(len, self.sources)))
        while len(found) < wanted:
            source, epoch, within = self._place(position)
            if epoch == 0:
                found.append((source, int(self._order(source, 0)[within])))
            position += 1
        return found

    def _order(self, source: int, epoch: int) -> np.ndarray:
        key = (source, epoch)
        if key not in self._orders:
            generator = torch.Generator().manual_seed(hash((self.seed, source, epoch)) & 0x7FFFFFFFFFFFFFFF)
            self._orders[key] = torch.randperm(len(self.sources[source]), generator=generator).numpy()
            while len(self._orders) > 2 * len(self.sources):
                self._orders.popitem(last=False)
        return self._orders[key]

    def expected(self, position: int) -> dict:
        """{"tiles", "tokens", "supervised_tokens"} of the sample at a position, from its index entry alone; all 0 for one that is too long.

        The tiles that the source's limit and the run's longest sample take away are estimated (the index has no image sizes): good for
        what a sample costs.
        """
        source, number = self.locate(position)
        index, limit = self.sources[source].entries, self.settings[source].max_tiles
        a_tile = self.processor.visual_tokens_per_tile + 1  # and its tag
        whole, tokens = index.tiles(number), int(index.tokens[number])
        tiles = whole if limit is None else [min(count, limit + (limit > 1)) for count in whole]
        tokens -= a_tile * (sum(whole) - sum(tiles))
        taken = min(max(0, -(-(tokens - self.max_tokens) // a_tile)), sum(tiles) - len(tiles))
        found = {"tiles": sum(tiles) - taken, "tokens": tokens - taken * a_tile, "supervised_tokens": int(index.supervised_tokens[number])}
        return found if found["tokens"] <= self.max_tokens else dict.fromkeys(found, 0)

    def __getitem__(self, position: int) -> dict:
        return self.sample(*self.locate(position))

    def sample(self, source: int, number: int) -> dict:
        """{"source", "id", "input_ids", "labels", "pixels" uint8 (N, H, W, 3), "tiles_reduced"} or {"source", "id", "skipped": reason}."""
        name = f"{Path(self.settings[source].shards).name}, sample {number}"
        try:
            name = f"{Path(self.settings[source].shards).name}/{self.sources[source].entries[number][1]['key']}"
            name, messages = self.sources[source].read(number)
            if isinstance(messages, str):
                sample = prepare_text(messages, self.processor, self.max_tokens)
            else:
                sample = self.processor.prepare(messages, max_tokens=self.max_tokens, max_tiles=self.settings[source].max_tiles)
        except ValueError as error:
            words = str(error)
            reason = "image missing" if words.startswith("image missing") else "too long" if " fit; " in words else "broken"
            return {"source": source, "id": name, "skipped": reason, "detail": str(error)}
        if not any(label >= 0 for label in sample.rendered.labels) or not (isinstance(messages, str) or has_answer(messages)):
            return {"source": source, "id": name, "skipped": "nothing supervised", "detail": "no assistant text"}
        return {
            "source": source,
            "id": name,
            "input_ids": sample.rendered.input_ids,
            "labels": sample.rendered.labels,
            "pixels": sample.pixels,
            "tiles_reduced": len(sample.receipts),
        }
