"""Compare a loaded model and processor with the folder's golden pack, name what moved, and refuse or warn.

Settings, grids, tiles and ids must be equal. Normalised pixels, features, visual tokens and logits may differ by rounding (numbers.py).
When loading, as many pictures go through the model as cost about a second on a processor, the cheapest first and at least one; `check`
without `quick` and `python -m vlm.golden` take all that have numbers.
"""

import warnings
from pathlib import Path

from PIL import Image

from ..modeling import VisionLanguageModel
from ..processing import VLMProcessor
from .numbers import STAGES, TF32_TOLERANCE, TOLERANCE, distance, operations, run_stages
from .pack import FOLDER, open_pack, versions
from .reading import Reading, read_settings, read_tiles

__all__ = ["ON_DRIFT", "check", "guard"]

ON_DRIFT = ("refuse", "warn", "ignore")
QUICK_OPERATIONS = {"cpu": 1e11, "cuda": 2e15}  # floating-point operations spent when loading
CHANNEL_TOLERANCE = 1e-3  # of normalised values, which lie between -3 and 3

Finding = tuple[str, str, bool]


def guard(model: VisionLanguageModel, processor: VLMProcessor, folder: str | Path, on_drift: str = "refuse") -> str:
    """A line that says what the check found. Raises ValueError when something drifted and on_drift is "refuse"; "warn" warns instead,
    "ignore" does not look. A folder without a pack gives a note."""
    if on_drift not in ON_DRIFT:
        raise ValueError(f"on_drift is {on_drift!r}; expected one of {', '.join(ON_DRIFT)}")
    if on_drift == "ignore":
        return "golden pack: not looked at"
    findings = check(model, processor, folder, quick=True)
    drifted = [f"{name} ({figure})" for name, figure, ok in findings if not ok]
    if not drifted:
        return f"golden pack: {'; '.join(f'{name} {figure}' for name, figure, _ in findings[-2:])}"
    text = (
        f"{folder} is not what it was when it was saved: {'; '.join(drifted)}{_other_versions(folder)}. Put back what changed (packages, "
        f"processor, tokenizer or weights), or go on with on_drift='warn'; if the change was wanted: python -m vlm.golden {folder} --write"
    )
    if on_drift == "refuse":
        raise ValueError(text)
    warnings.warn(text, stacklevel=3)
    return f"golden pack: DRIFTED: {'; '.join(drifted)}"


def check(model: VisionLanguageModel | None, processor: VLMProcessor, folder: str | Path, *, quick: bool = False) -> list[Finding]:
    """(what was compared, the figure, whether it holds) for everything the folder's pack holds; without a pack one line that says so.

    Without a model, only what needs none. quick: see above.
    """
    try:
        pack = open_pack(folder)
        if pack is None:
            return [("pack", f"none in {folder}: not checked for drift", True)]
        entries = pack["pictures"]
        readings = []
        for entry in entries:
            with Image.open(Path(folder) / FOLDER / entry["image"]) as image:
                image.load()
                readings.append(read_tiles(processor, image, entry["question"]))
    except (ValueError, OSError) as error:
        return [("pack", " ".join(str(error).split()), False)]
    findings = [_settings(pack["settings"], processor), *_preprocessing(entries, readings)]
    same_input = all(ok for _, _, ok in findings)
    findings.append(_ids(entries, readings, processor))
    if model is not None and same_input:
        findings += _numbers(model, pack, readings, quick)
    elif model is not None:
        findings.append((STAGES[-1], "not compared, for what goes into the model differs already", True))
    return findings


def _settings(expected: dict, processor: VLMProcessor) -> Finding:
    found = read_settings(processor)
    changed = [f"{name} is {found[name]}, was {value}" for name, value in expected.items() if name in found and found[name] != value]
    return "settings", "; ".join(changed) or f"{len(expected)} equal", not changed


def _verdict(name: str, wrong: list[str], count: int) -> Finding:
    return name, f"{len(wrong)} of {count} differ; {wrong[0]}" if wrong else f"{count} equal", not wrong


def _preprocessing(entries: list[dict], readings: list[Reading]) -> list[Finding]:
    wrong: dict[str, list[str]] = {"grids": [], "tile pixels": [], "tile order": [], "normalised pixels": []}
    for entry, reading in zip(entries, readings, strict=True):
        found, name = reading.record(), entry["image"]
        if (found["grid"], found["tiles"]) != (entry["grid"], entry["tiles"]):
            now, then = (f"{one['grid'][0]} x {one['grid'][1]} in {one['tiles']} tiles" for one in (found, entry))
            wrong["grids"].append(f"{name}: {now}, was {then}")
        elif found["pixel_sha256"] != entry["pixel_sha256"]:
            kind = "tile order" if sorted(found["tile_digests"]) == sorted(entry["tile_digests"]) else "tile pixels"
            wrong[kind].append(f"{name}: first at tile {_first_difference(found['tile_digests'], entry['tile_digests']) + 1}")
        far = max(abs(one - other) for one, other in zip(found["channels"], entry["channels"], strict=True))
        if not far <= CHANNEL_TOLERANCE:
            wrong["normalised pixels"].append(f"{name}: mean or standard deviation of a channel by {far:.2g}")
    return [_verdict(name, faults, len(entries)) for name, faults in wrong.items()]


def _first_difference(first: list, second: list) -> int:
    return next((place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def _ids(entries: list[dict], readings: list[Reading], processor: VLMProcessor) -> Finding:
    wrong = []
    for entry, reading in zip(entries, readings, strict=True):
        if reading.ids != entry["ids"]:
            place = _first_difference(reading.ids, entry["ids"])
            now, then = (f"{ids[place]}" if place < len(ids) else "nothing" for ids in (reading.ids, entry["ids"]))
            said = processor.tokenizer.decode(reading.ids[place : place + 1])
            wrong.append(f"prompt of {entry['image']}: at position {place} {now} ({said!r}), was {then}")
    return _verdict("token ids", wrong, len(entries))


def _numbers(model: VisionLanguageModel, pack: dict, readings: list[Reading], quick: bool) -> list[Finding]:
    """The kept ids and this processor's pixels through the model, stage by stage."""
    known = [index for index, entry in enumerate(pack["pictures"]) if entry["numbers"] is not None]
    if not known:
        return [(STAGES[-1], f"none in the pack: {pack['pictures'][0]['why_no_numbers']}", True)]
    dtypes = pack["dtype"], str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    bound = max(TOLERANCE.get(name, TOLERANCE["bfloat16"]) for name in dtypes)
    if "cuda" in (pack["device"], model.device.type):
        bound = max(bound, TF32_TOLERANCE)
    costs = {index: operations(model, len(readings[index].ids), len(readings[index].pixels)) for index in known}
    left = QUICK_OPERATIONS["cpu" if model.device.type == "cpu" else "cuda"] if quick else float("inf")
    worst, taken = dict.fromkeys(STAGES, (0.0, "")), 0
    for index in sorted(known, key=costs.__getitem__):
        if taken and costs[index] > left:
            break
        left, taken = left - costs[index], taken + 1
        entry = pack["pictures"][index]
        try:
            stages = run_stages(model, entry["ids"], readings[index].normalized)
        except (RuntimeError, ValueError, IndexError) as error:
            return [(STAGES[-1], f"{entry['image']}: the forward pass failed: {(str(error).splitlines() or [''])[0]}", False)]
        for name in STAGES:
            worst[name] = max(worst[name], (distance(entry["numbers"][name], stages[name]), entry["image"]))
    return [
        (name, f"{far:.1e} of their spread at most (bound {bound:g}) in {taken} of {len(readings)}{f', at {at}' if far > bound else ''}",
         far <= bound)
        for name, (far, at) in worst.items()
    ]  # fmt: skip


def _other_versions(folder: str | Path) -> str:
    try:
        made = (open_pack(folder) or {}).get("versions", {})
    except ValueError:
        return ""
    other = [f"{name} {version} (here {here})" for name, version in made.items() if (here := versions().get(name)) not in (version, None)]
    return f"; made with {', '.join(other)}" if other else ""
