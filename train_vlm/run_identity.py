"""Which run is it? Settings and inputs that decide every step of a run, apart from how long it goes on and what it tells.

A checkpoint goes on under the same command only: a changed rate, a rebuilt shard or another starting model would make it a run that
nobody wrote down. The inputs are known by their content, so that a copied folder still fits: shards by their indexes (which hold a
hash of every sample), weights by size, header and samples of their bytes (a model of 16 GB is told apart in a second).
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from train_vlm.recipe import Recipe

__all__ = ["describe_run", "difference", "fingerprint_model", "fingerprint_shards"]

# What may change between two starts of the same run: its length, its words, its speed, and how a step is cut into micro-batches.
FREE = {
    "run": {"steps", "minutes", "log_every", "heldout_every", "wandb", "peak_teraflops", "threads_per_rank", "save_every_steps",
            "save_every_minutes", "keep", "replace"},
    "data": {"heldout", "heldout_samples", "heldout_text", "workers", "micro_batches", "pack_tokens", "max_skipped_percent"},
    "lora": {"merge"},
}  # fmt: skip
PIECES, PIECE_BYTES = 32, 1 << 16


def fingerprint_shards(folder: str | Path) -> str:
    """A hash over the indexes of a folder of shards."""
    digest = hashlib.sha256()
    for index in sorted(Path(folder).glob("*.index.jsonl")):
        digest.update(f"{index.name} {index.stat().st_size}\n".encode())
        digest.update(index.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint_model(folder: str | Path) -> str:
    """A hash over a model folder: all of its small files, and of each weight file its size and pieces spread evenly over it."""
    digest = hashlib.sha256()
    folder = Path(folder)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in ("README.md", "training.json")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= PIECES * PIECE_BYTES:
                digest.update(file.read())
                continue
            for piece in range(PIECES):
                file.seek(piece * (size - PIECE_BYTES) // (PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()[:16]


def describe_run(recipe: Recipe) -> dict:
    """What must be the same for a run to go on: {key: value}, keys as in overrides, in JSON's types."""
    described = {"stage": recipe.stage, "model": fingerprint_model(recipe.model)}
    for section in ("data", "parts", "optimizer", "run", "lora", "fp8"):
        settings = getattr(recipe, section)
        if section == "fp8" and not settings.enabled:
            continue
        for key, value in dataclasses.asdict(settings).items() if settings is not None else ():
            if key in FREE.get(section, ()):
                continue
            if key == "sources":
                for number, source in enumerate(value):
                    content = {**source, "shards": fingerprint_shards(source["shards"])}
                    described |= {f"data.sources.{number}.{name}": item for name, item in content.items()}
            else:
                described[f"{section}.{key}"] = value
    return json.loads(json.dumps(described))


def difference(before: dict, now: dict) -> list[str]:
    """The keys in which two descriptions differ, each with both values."""
    keys = sorted(before.keys() | now.keys())
    return [f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)]
