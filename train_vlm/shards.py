"""Make training shards from files as they are published, and check them before a run does.

    python -m train_vlm.shards convert --llava FILE --images DIR --model DIR --out DIR
    python -m train_vlm.shards convert --messages FILE.jsonl | --gqa FILE | --vizwiz FILE | --captions FILE | --text FILE  ...
    python -m train_vlm.shards convert --vqav2 QUESTIONS --annotations FILE ...
    python -m train_vlm.shards check --shards DIR --model DIR [--against EVALUATION_IMAGES ...]

A shard holds, per sample, `KEY.json` (messages) and `KEY.0.jpg`, `KEY.1.png`, ... (image bytes as they came). The index beside it has a
line each: key, place of each member (offset and size in bytes), tiles, tokens and a hash. webdataset writes the tar; reading is ours
(reading.py), because an exact resume needs positions, not streams.
"""

import argparse
import sys
from pathlib import Path

from train_vlm.conversations import read_llava
from train_vlm.messages_files import read_messages
from train_vlm.official_samples import caption_samples, gqa_samples, vizwiz_samples, vqav2_samples
from train_vlm.plain_text import text_records
from train_vlm.shard_check import check_shards
from train_vlm.shard_writing import convert, measure_sample
from vlm.cores import usable_cores
from vlm.processing import VLMProcessor

__all__ = ["convert", "main", "measure_sample"]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train_vlm.shards", description="Training shards with an index: write and check them.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("convert", help="files of samples -> shards")
    given = make.add_mutually_exclusive_group(required=True)
    given.add_argument("--llava", metavar="FILE", help="LLaVA JSON")
    given.add_argument("--messages", metavar="FILE", help="OpenAI-style messages, .jsonl")
    given.add_argument("--vqav2", metavar="FILE", help="official VQAv2 questions, with --annotations")
    given.add_argument("--gqa", metavar="FILE", help="official GQA questions, or the folder of their pieces")
    given.add_argument("--vizwiz", metavar="FILE", help="official VizWiz train.json")
    given.add_argument("--captions", metavar="FILE", help="COCO captions, or a JSON list of {image, caption}")
    given.add_argument("--text", metavar="FILE", help='plain text, or .jsonl with {"text": ...} a line: language to go on with')
    make.add_argument("--annotations", metavar="FILE", help="official VQAv2 annotations")
    make.add_argument("--images", metavar="DIR", help="folder that the files' image names are in")
    make.add_argument("--out", required=True, metavar="DIR")
    make.add_argument("--samples-per-shard", type=int, default=2000)
    make.add_argument("--questions-per-sample", type=int, default=8, help="of VQAv2 and GQA, about one image (default 8)")
    make.add_argument("--text-tokens", type=int, default=512, help="longest piece of a text (default 512)")
    check = commands.add_parser("check", help="read every sample; histograms, faults, and images shared with evaluation sets")
    check.add_argument("--shards", required=True, metavar="DIR")
    check.add_argument(
        "--against", action="append", default=[], metavar="DIR", help="images of an evaluation set: folder or .zip; repeatable"
    )
    check.add_argument("--max-tokens", type=int, default=4096, help="longest sample of the run to come (default 4096)")
    check.add_argument("--max-tiles", type=int, help="limit per image of the run to come, without the thumbnail")
    for command in (make, check):
        command.add_argument("--model", required=True, metavar="DIR", help="model folder whose processor counts tiles and tokens")
        command.add_argument(
            "--workers",
            type=int,
            default=min(8, usable_cores()),
            help="processes that decode pictures; 0: this one (default: up to 8)",
        )
        command.add_argument("--max-skipped-percent", type=float, default=1.0, help="more unusable samples than this is an error")
    return parser.parse_args(arguments)


def _samples(options: argparse.Namespace, processor: VLMProcessor | None = None) -> list[dict]:
    """The samples that were asked for. A text needs the processor, which cuts it."""
    images, per_sample = Path(options.images or "."), options.questions_per_sample
    if options.llava:
        return read_llava(options.llava)
    if options.messages:
        return read_messages(options.messages)
    if options.vqav2:
        return vqav2_samples(options.vqav2, options.annotations, images, per_sample=per_sample)
    if options.gqa:
        return gqa_samples(options.gqa, images, per_sample=per_sample)
    if options.vizwiz:
        return vizwiz_samples(options.vizwiz)
    if options.captions:
        return caption_samples(options.captions)
    return text_records(options.text, processor, options.text_tokens)


def _convert(options: argparse.Namespace) -> None:
    needs_images = next((name for name in ("llava", "vqav2", "gqa", "vizwiz", "captions") if getattr(options, name)), None)
    if needs_images and not options.images:
        raise ValueError(f"--{needs_images} needs --images, the folder its paths are in")
    if bool(options.vqav2) != bool(options.annotations):
        raise ValueError("--vqav2 and --annotations belong together: the questions and their answers")
    if options.text_tokens < 2 or options.samples_per_shard < 1 or options.questions_per_sample < 1:
        raise ValueError(
            f"--text-tokens is {options.text_tokens}, --samples-per-shard {options.samples_per_shard}, --questions-per-sample "
            f"{options.questions_per_sample}; expected at least 2, 1 and 1"
        )
    samples = [] if options.text else [_samples(options)]  # a malformed file is told before anything is loaded
    processor = _processor(options.model)
    samples = samples or [_samples(options, processor)]
    asked = len(samples[0])
    summary = convert(samples.pop(), Path(options.images or "."), processor, Path(options.out), samples_per_shard=options.samples_per_shard,
                      workers=options.workers)  # fmt: skip
    for reason, count in summary["skipped"].items():
        print(f"skipped {count} samples, {reason}; first: {summary['examples'][reason]}", file=sys.stderr)
    share = 100 * sum(summary["skipped"].values()) / asked
    print(
        f"{summary['samples']} samples, {summary['tiles']} tiles, {summary['tokens']} tokens in {summary['shards']} shards "
        f"at {options.out} ({summary['seconds']} s)"
    )
    if share > options.max_skipped_percent:
        raise ValueError(
            f"{share:.1f} % of the samples are unusable; at most {options.max_skipped_percent} % are accepted (--max-skipped-percent)"
        )


def _processor(folder: str) -> VLMProcessor:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no model folder at {folder}; make one by python -m vlm.assemble")
    return VLMProcessor.from_pretrained(folder)


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 done; 1 `check` found too many faults or images of an evaluation set; 2 bad input; 130 Ctrl-C."""
    options = _options(arguments)
    try:
        if options.command == "convert":
            _convert(options)
            return 0
        found = check_shards(
            options.shards, _processor(options.model), max_tokens=options.max_tokens, max_tiles=options.max_tiles,
            against=options.against, workers=options.workers,
        )  # fmt: skip
        print(found.text())
        return int(found.is_bad(options.max_skipped_percent))
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # the last one of a reader that was killed
        print(f"shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"shards: {options.command} interrupted; it begins anew", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
