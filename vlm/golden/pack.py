"""Write a golden pack, and read it again: FOLDER/golden with twelve PNG files and pack.json.

What a picture costs is a forward pass of its tiles and its question. Where that is too much (a model of billions on a processor) the
pack keeps the cheapest pictures' numbers, at least one, and says why the others have none; grids, pixels and ids cost milliseconds.
"""

import io
import json
import platform
from pathlib import Path

import PIL
import torch
import transformers
from PIL import Image

from ..files import write_whole
from ..modeling import VisionLanguageModel
from ..processing import VLMProcessor
from .numbers import operations, run_stages, summarize
from .pictures import PLANS, draw
from .reading import read_settings, read_tiles

__all__ = ["FILE", "FOLDER", "open_pack", "versions", "write"]

FOLDER, FILE, FORMAT = "golden", "pack.json", 1
WRITING_OPERATIONS = {"cpu": 2e12, "cuda": 1e16}  # floating-point operations spent on a pack: some ten seconds


def versions() -> dict[str, str]:
    """Of what may move a pixel, an id or a logit."""
    packages = {"torch": torch, "transformers": transformers, "pillow": PIL}
    return {"python": platform.python_version(), **{name: package.__version__ for name, package in packages.items()}}


def write(model: VisionLanguageModel | None, processor: VLMProcessor, folder: str | Path, *, reason: str = "no model in memory") -> Path:
    """Write the pack of `folder` from this model and processor; returns the path of pack.json.

    Without a model it holds everything but features, visual tokens and logits, and `reason` says why. Weights without finite numbers, or a
    forward pass that fails, do the same: a checkpoint is saved with a note rather than not at all.
    """
    folder = Path(folder) / FOLDER
    entries, prompts = [], []
    for number, (_, _, mode, question) in enumerate(PLANS):
        image = draw(number)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        name = f"{number:02d}.png"
        write_whole(folder / name, buffer.getvalue())
        found = read_tiles(processor, Image.open(io.BytesIO(buffer.getvalue())), question)
        prompts.append(found)
        entries.append({"image": name, "mode": mode, "question": question, **found.record(), "numbers": None, "why_no_numbers": reason})
    if model is not None:
        _add_numbers(model, entries, prompts)
    content = {
        "format": FORMAT,
        "versions": versions(),
        "dtype": None if model is None else str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "device": None if model is None else model.device.type,
        "settings": read_settings(processor),
        "pictures": entries,
    }
    return write_whole(folder / FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _add_numbers(model: VisionLanguageModel, entries: list[dict], prompts: list) -> None:
    left = WRITING_OPERATIONS["cpu" if model.device.type == "cpu" else "cuda"]
    costs = [operations(model, len(prompt.ids), len(prompt.pixels)) for prompt in prompts]
    for rank, index in enumerate(sorted(range(len(entries)), key=costs.__getitem__)):
        entry = entries[index]
        if rank and costs[index] > left:
            entry["why_no_numbers"] = f"{costs[index]:.1e} operations were too many on {model.device.type}; python -m vlm.golden --write"
            continue
        left -= costs[index]
        try:
            numbers = summarize(run_stages(model, prompts[index].ids, prompts[index].normalized))
        except RuntimeError as error:  # out of memory, say: the checkpoint is worth more than its pack
            entry["why_no_numbers"] = f"the forward pass failed: {(str(error).splitlines() or [''])[0]}"
            continue
        entry["numbers"] = numbers
        entry["why_no_numbers"] = None if numbers is not None else "the model gave numbers that are not finite"


def open_pack(folder: str | Path) -> dict | None:
    """The pack of a model folder as written, None where there is none. Raises ValueError when it is damaged."""
    path = Path(folder) / FOLDER / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this version reads {FORMAT}")
        for entry in content["pictures"]:
            for name in ("image", "question", "grid", "ids", "tile_digests", "numbers"):
                entry[name]
        content["settings"]["tile_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); write it anew with python -m vlm.golden {folder} --write") from error
    return content
