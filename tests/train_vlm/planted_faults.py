"""A folder of shards in which every kind of fault was planted a known number of times, after it was written (writing leaves faults out)."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from train_vlm.reading import ShardedSource
from train_vlm.shards import convert

KINDS = ("broken", "image missing", "too long", "nothing supervised", "tiles reduced")
WIDE = (64 * 6, 64)  # pixels: six tiles of the tiny preset and a thumbnail


def plant(folder: Path, processor, *, samples: int, each: int) -> tuple[Path, int]:
    """Write `samples` samples, `each` of every kind of fault. Returns the folder of shards, and the longest sample a run may read for it:
    one token less than the wide pictures need."""
    images = folder / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, (width, height) in {"good": (64, 64), "wide": WIDE}.items():
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(images / f"{name}.png")
    # Spread over the whole folder: faults of a kind in a row would all come in one step.
    kinds = [KINDS[place % len(KINDS)] for place in range(each * len(KINDS))] + ["good"] * (samples - each * len(KINDS))
    kinds = [kinds[place] for place in generator.permutation(samples)]
    content = [
        {"id": f"{kind} {number}", "image": "wide.png" if kind == "tiles reduced" else "good.png",
         "conversations": [{"from": "human", "value": "<image>\n" + "What is this? " * (200 if kind == "too long" else 1)},
                           {"from": "gpt", "value": "red"}]}
        for number, kind in enumerate(kinds)
    ]  # fmt: skip
    shards = folder / "shards"
    convert(content, images, processor, shards, samples_per_shard=300)
    longest = max(entry["tokens"] for (_, entry), kind in zip(ShardedSource(shards).entries, kinds, strict=True) if kind == "tiles reduced")
    number = 0
    for shard in sorted(shards.glob("*.tar")):
        index = shard.with_suffix(".index.jsonl")
        lines, data = [json.loads(line) for line in index.read_text().splitlines()], bytearray(shard.read_bytes())
        for line in lines:
            _spoil(kinds[number], line, data)
            number += 1
        shard.write_bytes(data)
        index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return shards, longest - 1


def _spoil(kind: str, entry: dict, data: bytearray) -> None:
    if kind == "broken":
        offset, size = entry["members"]["0.png"]
        data[offset : offset + size] = bytes(size)
    elif kind == "image missing":
        del entry["members"]["0.png"]
    elif kind == "nothing supervised":
        offset, size = entry["members"]["json"]
        role = b'"assistant"'
        assert data[offset : offset + size].count(role) == 1
        data[offset : offset + size] = data[offset : offset + size].replace(role, b'"user"'.ljust(len(role)))
