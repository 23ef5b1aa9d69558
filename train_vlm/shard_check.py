"""Read every sample of a folder of shards as a run would, and tell what is in it: before eight GPUs do.

Histograms of tiles and tokens, unusable samples by the reasons of the run's own ledger, samples changed since their index was written, and
pictures that an evaluation set has too: trained on, they make its score worthless.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from train_vlm.image_hashes import hashes_of, read_hashes
from train_vlm.ledger import EXAMPLES, REASONS
from train_vlm.reading import SampleStream
from train_vlm.reading_processes import reader_settings
from train_vlm.recipe import Source
from vlm.processing import VLMProcessor

__all__ = ["CheckResult", "check_shards", "histogram"]

BAR, BINS = 40, 10


def histogram(values: list[int], label: str) -> list[str]:
    """Lines of a histogram: a line for each value when there are few, else ten ranges of like width."""
    if not values:
        return []
    low, high = min(values), max(values)
    width = 1 if high - low < 2 * BINS else -(-(high - low + 1) // BINS)
    counts = Counter((value - low) // width for value in values)
    most, lines = max(counts.values()), [label]
    for place in range((high - low) // width + 1):
        start, count = low + place * width, counts[place]
        if width > 1 or count:
            name = f"{start:,}" if width == 1 else f"{start:,} to {start + width - 1:,}"
            lines.append(f"  {name:>17}  {count:>9,}  {100 * count / len(values):5.1f} %  {'#' * round(BAR * count / most)}".rstrip())
    return lines


class _Samples(torch.utils.data.Dataset):
    """Sample number -> what a run makes of it, without its pixels."""

    def __init__(self, stream: SampleStream, known: dict[str, str]):
        self.stream, self.known = stream, known

    def __len__(self) -> int:
        return len(self.stream.sources[0])

    def __getitem__(self, number: int) -> dict:
        source = self.stream.sources[0]
        entry, shared, changed = source.entries[number][1], [], None
        try:
            record, pictures = source.content(number)
            if entry.get("sha256") not in (None, hashlib.sha256(record + b"".join(pictures)).hexdigest()):
                changed = f"{entry['key']}: not what its index was written for"
            if self.known:
                found = [next((self.known[item] for item in hashes_of(picture) if item in self.known), None) for picture in pictures]
                shared = [name for name in found if name is not None]
        except ValueError:
            pass  # a shard cut off: the sample below says so
        sample = self.stream.sample(0, number)
        told = {"name": f"{entry['key']} ({sample['id']})", "shared": shared, "changed": changed}
        if "skipped" in sample:
            return told | {"skipped": sample["skipped"], "detail": sample["detail"]}
        supervised = sum(label >= 0 for label in sample["labels"])
        return told | {"tiles": len(sample["pixels"]), "tokens": len(sample["input_ids"]), "supervised": supervised,
                       "images": len(entry["tiles"]), "reduced": int(sample["tiles_reduced"] > 0)}  # fmt: skip


@dataclass
class CheckResult:
    """What was found in `samples` samples: numbers for the histograms, faults and examples by reason, shared pictures as (sample, name)."""

    folder: str
    samples: int = 0
    against: int | None = None
    reduced: int = 0
    numbers: dict[str, list[int]] = field(default_factory=lambda: {"tiles": [], "tokens": [], "supervised": [], "images": []})
    faults: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    shared: list[tuple[str, str]] = field(default_factory=list)

    def add(self, found: dict) -> None:
        self.samples += 1
        self.shared += [(found["name"], name) for name in found["shared"]]
        for reason, detail in ((found.get("skipped"), found.get("detail")), ("changed" if found["changed"] else None, found["changed"])):
            if reason:
                self.faults[reason] += 1
                known = self.examples.setdefault(reason, [])
                if len(known) < EXAMPLES:
                    known.append(detail if reason == "changed" else f"{found['name']}: {detail}")
        if "skipped" not in found:
            self.reduced += found["reduced"]
            for key, values in self.numbers.items():
                values.append(found[key])

    @property
    def skipped(self) -> int:
        return sum(self.faults[reason] for reason in REASONS)

    def is_bad(self, most_skipped_percent: float) -> bool:
        """Too many unusable samples, any changed one, or any picture of an evaluation set."""
        return 100 * self.skipped > most_skipped_percent * self.samples or self.faults["changed"] > 0 or bool(self.shared)

    def text(self) -> str:
        lines = [f"{self.samples:,} samples in {self.folder}"]
        titles = {"images": "images a sample", "tiles": "tiles a sample, thumbnails included", "tokens": "tokens a sample",
                  "supervised": "supervised tokens a sample"}  # fmt: skip
        for key, title in titles.items():
            lines += histogram(self.numbers[key], title)
        lines.append(f"tiles reduced to fit: {self.reduced:,} samples")
        for reason in (*REASONS, "changed"):
            lines.append(f"{reason}: {self.faults[reason]:,}")
            lines += [f"  {example}" for example in self.examples.get(reason, [])]
        if self.against is None:
            lines.append("shared with an evaluation set: not looked for (--against)")
        else:
            lines.append(f"shared with an evaluation set: {len(self.shared):,} pictures (of {self.against:,} hashes of bytes and pixels)")
            lines += [f"  {sample} has {name}" for sample, name in self.shared[: 2 * EXAMPLES]]
        return "\n".join(lines)


def check_shards(
    folder: str | Path, processor: VLMProcessor, *, max_tokens: int, max_tiles: int | None = None, against: list[str] = (), workers: int = 0
) -> CheckResult:
    """Read every sample once, in order, in `workers` processes. Raises FileNotFoundError / ValueError for a folder without shards or a
    damaged index, or for a place in `against` without images."""
    stream = SampleStream((Source(str(folder), max_tiles=max_tiles),), processor, seed=0, max_tokens=max_tokens)
    known = read_hashes(list(against), workers=workers)
    result = CheckResult(str(folder), against=len(known) if against else None)
    reader = torch.utils.data.DataLoader(_Samples(stream, known), batch_size=None, **reader_settings(workers))
    for found in tqdm(reader, desc="check", unit="sample", leave=False, disable=None):
        result.add(found)
    return result
