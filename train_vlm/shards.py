"""webdataset tar shards, each with an index beside it, so that any sample can be read by its number.

    python -m train_vlm.shards convert --llava FILE --images DIR --model DIR --out DIR [--samples-per-shard N]

A shard holds, per sample, `KEY.json` (messages) and `KEY.0.jpg`, `KEY.1.png`, ... (image bytes as they came). The index has a line each:
key, place of each member (offset and size in bytes), tiles, tokens and a hash. webdataset writes the tar; reading is ours (reading.py),
because an exact resume needs positions, not streams.
"""

import argparse
import hashlib
import json
import os
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from train_vlm.conversations import from_llava, read_llava
from vlm.files import write_whole
from vlm.processing import VLMProcessor
from vlm.tiling import open_image

__all__ = ["convert", "main", "measure_sample"]


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


def convert(samples: list[dict], images: Path, processor: VLMProcessor, out: Path, *, samples_per_shard: int = 2000) -> dict:
    """LLaVA samples -> shards and indexes in `out`. Unusable samples are left out and counted by reason.

    Returns {"samples", "shards", "skipped": {reason: count}, "examples": {reason: first sample}, "tokens", "tiles", "seconds"}. Raises
    ValueError when no sample is usable.
    """
    import webdataset

    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
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
    for number, sample in enumerate(tqdm(samples, desc="shards", unit="sample", leave=False, disable=None)):
        try:
            messages, paths = from_llava(sample)
            contents = []
            for path in paths:
                if not (images / path).is_file():
                    raise FileNotFoundError(f"image missing: {path}")
                contents.append((images / path).read_bytes())
            sizes = [open_image(images / path).size for path in paths]
            tiles, tokens, supervised = measure_sample(messages, sizes, processor)
            if not supervised:
                raise ValueError("nothing supervised: no assistant turn")
        except (ValueError, FileNotFoundError) as error:
            reason = (
                "image missing"
                if isinstance(error, FileNotFoundError)
                else "image broken"
                if "readable image" in str(error)
                else "malformed"
            )
            reason = "nothing supervised" if str(error).startswith("nothing supervised") else reason
            skipped[reason] += 1
            examples.setdefault(reason, f"sample {sample.get('id', number) if isinstance(sample, dict) else number}: {error}")
            continue
        if writer is None:
            shard, facts = out / f"shard-{totals['shards']:06d}.tar", {}
            writer = webdataset.TarWriter(str(temporary), mtime=0)
        key = f"{number:09d}"
        record = {"id": str(sample.get("id", number)), "messages": messages}
        members = {"__key__": key, "json": json.dumps(record).encode()}
        for place, (path, content) in enumerate(zip(paths, contents, strict=True)):
            members[f"{place}{Path(path).suffix.lower() or '.img'}"] = content
        writer.write(members)
        digest = hashlib.sha256(members["json"] + b"".join(contents)).hexdigest()
        facts[key] = {"tiles": tiles, "tokens": tokens, "supervised_tokens": supervised, "sha256": digest}
        totals.update(samples=1, tokens=tokens, tiles=sum(tiles))
        if len(facts) == samples_per_shard:
            close()
            writer = None
            totals["shards"] += 1
    if writer is not None:
        close()
        totals["shards"] += 1
    if not totals["samples"]:
        raise ValueError(f"none of {len(samples)} samples is usable: {'; '.join(examples.values())}")
    summary = {**totals, "skipped": dict(skipped), "examples": examples, "seconds": round(time.monotonic() - started, 1)}
    write_whole(out / "summary.json", json.dumps(summary, indent=1))
    return summary


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train_vlm.shards", description="Write training shards with an index.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("convert", help="LLaVA JSON -> shards")
    make.add_argument("--llava", required=True, metavar="FILE")
    make.add_argument("--images", required=True, metavar="DIR")
    make.add_argument("--model", required=True, metavar="DIR", help="model folder whose processor counts tiles and tokens")
    make.add_argument("--out", required=True, metavar="DIR")
    make.add_argument("--samples-per-shard", type=int, default=2000)
    make.add_argument("--max-skipped-percent", type=float, default=1.0, help="more unusable samples than this is an error")
    options = parser.parse_args(arguments)
    try:
        samples = read_llava(options.llava)
        if not Path(options.model).is_dir():
            raise FileNotFoundError(f"no model folder at {options.model}; make one by python -m vlm.assemble")
        processor = VLMProcessor.from_pretrained(options.model)
        summary = convert(samples, Path(options.images), processor, Path(options.out), samples_per_shard=options.samples_per_shard)
        for reason, count in summary["skipped"].items():
            print(f"skipped {count} samples, {reason}; first: {summary['examples'][reason]}", file=sys.stderr)
        share = 100 * sum(summary["skipped"].values()) / len(samples)
        print(
            f"{summary['samples']} samples, {summary['tiles']} tiles, {summary['tokens']} tokens in {summary['shards']} shards "
            f"at {options.out} ({summary['seconds']} s)"
        )
        if share > options.max_skipped_percent:
            raise ValueError(
                f"{share:.1f} % of the samples are unusable; at most {options.max_skipped_percent} % are accepted (--max-skipped-percent)"
            )
        return 0
    except (ValueError, FileNotFoundError, OSError) as error:
        print(f"shards: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
