"""Write samples as webdataset tar shards, each with an index beside it. What unusable samples were left out is counted by reason.

webdataset writes the tar; the index is made from it afterwards, so that its places are those of the finished file. Shards of an earlier
conversion are removed first: two of them left over would be trained on in silence. summary.json is written last and removed first: shards
without it are not read (reading.py), because a conversion that was stopped leaves whole ones, too.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from train_vlm.conversations import from_llava, has_answer
from train_vlm.messages_files import from_messages
from train_vlm.reading_processes import reader_settings
from vlm.files import write_whole
from vlm.processing import VLMProcessor
from vlm.tiling import open_image

__all__ = ["convert", "measure_sample"]


def measure_sample(messages: list[dict], sizes: list[tuple[int, int]], processor: VLMProcessor) -> tuple[list[int], int, int]:
    """Tiles of each image, tokens, and supervised tokens of a sample whose images have these (width, height), with no tile taken away."""
    tiles = [processor.image_processor.count_tiles(*size) for size in sizes]
    rendered = processor.renderer.render(messages, tiles)
    return tiles, len(rendered.input_ids), sum(label >= 0 for label in rendered.labels)


def _index_of(shard: Path, facts: dict[str, dict]) -> str:
    """JSON lines: one a sample, with the places of its members."""
    places: dict[str, dict[str, list[int]]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            places.setdefault(key, {})[extension] = [member.offset_data, member.size]
    return "".join(json.dumps({"key": key, "members": places[key], **facts[key]}) + "\n" for key in places)


def _is_file(path: Path) -> bool:
    """Path.is_file, where a name that no file can have (bytes without `data:` before them, an address) is no file and no error."""
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def _read(sample: dict, images: Path) -> tuple[dict, list[io.BytesIO]]:
    """What stands in a sample's JSON beside its id, and its pictures' bytes, each under the name of its file."""
    if isinstance(sample, dict) and sample.keys() == {"id", "text"}:  # of plain_text.py; other layouts may have a text beside their turns
        return {"text": sample["text"]}, []
    is_messages = isinstance(sample, dict) and "messages" in sample
    messages, sources = from_messages(sample) if is_messages else from_llava(sample)
    pictures = []
    for source in sources:
        if isinstance(source, str) and not _is_file(images / source):
            raise FileNotFoundError(f"image missing: {source[:200]}")
        picture = io.BytesIO(source if isinstance(source, bytes) else (images / source).read_bytes())
        picture.name = source if isinstance(source, str) else "embedded.img"
        pictures.append(picture)
    return {"messages": messages}, pictures


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "image missing"
    words = str(error)
    return "image broken" if "readable image" in words else "nothing supervised" if words.startswith("nothing supervised") else "malformed"


class _Measured(torch.utils.data.Dataset):
    """Number of a sample -> what its shard will hold: {"id", "content", "pictures" [(name, bytes)], "tiles", "tokens",
    "supervised_tokens"}, (reason, words) for an unusable one, or the OSError of a disk that fails.

    Samples stand in one buffer: Python writes reference counts into what it looks at, and each reader would come to own a list's copy."""

    def __init__(self, samples: list[dict], images: Path, processor: VLMProcessor):
        pieces = [pickle.dumps(sample) for sample in samples]
        self._ends = np.cumsum([0, *map(len, pieces)])
        self._pieces = b"".join(pieces)
        self.images, self.processor = images, processor

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> dict | tuple[str, str] | OSError:
        sample = pickle.loads(self._pieces[self._ends[number] : self._ends[number + 1]])
        try:
            content, pictures = _read(sample, self.images)
            sizes = [open_image(named).size for named in pictures]
            if "text" in content:
                tiles, tokens = [], len(self.processor.renderer.render_text(content["text"]).input_ids)
                supervised = tokens - 1
            else:
                tiles, tokens, supervised = measure_sample(content["messages"], sizes, self.processor)
            if not supervised or not ("text" in content or has_answer(content["messages"])):
                raise ValueError("nothing supervised: no assistant text")
        except (ValueError, FileNotFoundError) as error:
            return _reason(error), f"sample {sample.get('id', number) if isinstance(sample, dict) else number}: {error}"
        except OSError as error:  # raised by whoever asked, in one line
            return error
        named = [(picture.name, picture.getvalue()) for picture in pictures]
        return {"id": str(sample.get("id", number)), "content": content, "pictures": named, "tiles": tiles, "tokens": tokens,
                "supervised_tokens": supervised}  # fmt: skip


def _as_it_is(item):
    return item


def convert(
    samples: list[dict], images: Path, processor: VLMProcessor, out: Path, *, samples_per_shard: int = 2000, workers: int = 0
) -> dict:
    """Samples -> shards and indexes in `out`: LLaVA's ("conversations"), messages (messages_files.py), or plain text ("text"). Unusable
    ones are left out and counted by reason. Pictures are decoded, which finds the broken ones, in `workers` processes; the files are the
    same whatever their number.

    Returns {"samples", "shards", "skipped": {reason: count}, "examples": {reason: first sample}, "tokens", "tiles", "seconds"}. Raises
    ValueError when no sample is usable, ImportError without webdataset.
    """
    try:
        import webdataset
    except ImportError as error:
        raise ImportError(f"writing shards needs webdataset ({error}): pip install 'nemotron-h-vision[train]'") from error

    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").unlink(missing_ok=True)
    for old in out.glob("shard-*"):
        old.unlink()
    skipped, examples = Counter(), {}
    totals = Counter()
    writer, facts, shard = None, {}, None

    def close() -> None:
        writer.close()
        os.replace(temporary, shard)
        write_whole(shard.with_suffix(".index.jsonl"), _index_of(shard, facts))

    temporary = out / ".shard.tar.partial"
    given = _Measured(samples, images, processor)
    del samples  # of 665,000 the list is gigabytes, if the caller does not hold it
    found = torch.utils.data.DataLoader(given, batch_size=None, collate_fn=_as_it_is, **reader_settings(workers))
    try:
        for number, measured in enumerate(tqdm(found, desc="shards", unit="sample", leave=False, disable=None)):
            if isinstance(measured, OSError):
                raise measured
            if isinstance(measured, tuple):
                reason, words = measured
                skipped[reason] += 1
                examples.setdefault(reason, words)
                continue
            tiles = measured["tiles"]
            if writer is None:
                shard, facts = out / f"shard-{totals['shards']:06d}.tar", {}
                writer = webdataset.TarWriter(str(temporary), mtime=0)
            key = f"{number:09d}"
            members = {"__key__": key, "json": json.dumps({"id": measured["id"]} | measured["content"]).encode()}
            for place, (name, picture) in enumerate(measured["pictures"]):
                suffix = Path(name).suffix.lower()
                suffix = suffix if suffix not in ("", ".gz") else ".img"  # webdataset would compress what it takes for .gz
                members[f"{place}{suffix}"] = picture
            writer.write(members)
            digest = hashlib.sha256(members["json"] + b"".join(picture for _, picture in measured["pictures"])).hexdigest()
            facts[key] = {name: measured[name] for name in ("tiles", "tokens", "supervised_tokens")} | {"sha256": digest}
            totals.update(samples=1, tokens=measured["tokens"], tiles=sum(tiles))
            if len(facts) == samples_per_shard:
                close()
                writer = None
                totals["shards"] += 1
    except BaseException:
        with contextlib.suppress(Exception):  # or it writes to a closed file when Python collects it
            if writer is not None:
                writer.close()
        temporary.unlink(missing_ok=True)
        raise
    if writer is not None:
        close()
        totals["shards"] += 1
    if not totals["samples"]:
        raise ValueError(f"none of {len(given)} samples is usable: {'; '.join(examples.values())}")
    summary = {**totals, "skipped": dict(skipped), "examples": examples, "seconds": round(time.monotonic() - started, 1)}
    write_whole(out / "summary.json", json.dumps(summary, indent=1))
    return summary
