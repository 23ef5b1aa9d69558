"""Where the official VQAv2, GQA and VizWiz downloads keep what, and the questions in them as one kind of row.

A folder may hold the files as they come out of the archives, in the usual subfolders, or the archives themselves: those are read without
unpacking. A split that is not named is the usual one to measure on, or the only one there.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from eval_vqa.archives import exists, is_archive, members
from eval_vqa.official_records import field, index_questions

__all__ = [
    "OfficialFiles", "Question", "choose_split", "find_file", "find_images", "locate_gqa", "locate_vizwiz", "locate_vqav2",
    "read_gqa_questions", "read_vizwiz_questions", "read_vqav2_questions",
]  # fmt: skip

# Where files are looked for below the folder, in this order; a "*.zip" stands for every archive of that name.
VQAV2_PLACES = (".", "questions", "annotations", "Questions", "Annotations", "v2_*_mscoco.zip")
GQA_PLACES = (".", "questions", "questions1.2", "eval", "sceneGraphs", "*uestions*.zip", "sceneGraphs.zip", "eval.zip")
VIZWIZ_PLACES = ("Annotations", "annotations", ".", "Annotations.zip", "annotations.zip")


@dataclass(frozen=True)
class OfficialFiles:
    """Paths of one split. Of these only `questions` must exist; a folder stands for a file in pieces."""

    split: str
    questions: Path
    images: Path | None = None  # folder
    annotations: Path | None = None
    choices: Path | None = None
    scene_graphs: Path | None = None
    kinds: Path | None = None  # {id: kind}: not official; our drawn scenes have one


@dataclass(frozen=True)
class Question:
    """One row to predict: its official id, its text, and the file of its image."""

    id: int | str
    text: str
    image: Path


def locate_vqav2(folder: Path, split: str | None) -> OfficialFiles:
    """v2_OpenEnded_mscoco_SPLIT_questions.json, v2_mscoco_SPLIT_annotations.json (not for test), SPLIT/COCO_SPLIT_NUMBER.jpg."""
    pattern = "v2_OpenEnded_mscoco_{}_questions.json"
    split = split or choose_split(folder, VQAV2_PLACES, pattern, ("val2014",))
    subset = split.replace("test-dev2015", "test2015")
    return OfficialFiles(
        split,
        _needed(folder, VQAV2_PLACES, pattern, split),
        images=find_images(folder, subset),
        annotations=find_file(folder, VQAV2_PLACES, f"v2_mscoco_{split}_annotations.json"),
        kinds=find_file(folder, (".",), "kinds.json"),
    )


def locate_gqa(folder: Path, split: str | None) -> OfficialFiles:
    """SPLIT_questions.json, a folder SPLIT_questions/ with its pieces, TIER_choices.json, TIER_sceneGraphs.json, images/ID.jpg.

    A split is a tier and a set ("testdev_balanced", "val_all"); of a tier alone the balanced set is taken, or else all.
    """
    pattern = "{}_questions.json"
    preferred = ("testdev_balanced", "testdev_all", "val_balanced", "val_all")
    split = split or choose_split(folder, GQA_PLACES, pattern, preferred)
    names = [split] if split.endswith(("_balanced", "_all")) else [f"{split}_balanced", f"{split}_all", split]
    forms = [form for name in names for form in (pattern.format(name), f"{name}_questions")]
    questions = next((path for form in forms if (path := find_file(folder, GQA_PLACES, form))), None)
    questions = questions or _needed(folder, GQA_PLACES, pattern, names[0])
    name = questions.name.removesuffix(".json").removesuffix("_questions")
    tier = re.sub("_(balanced|all)$", "", name)
    return OfficialFiles(
        name,
        questions,
        images=find_images(folder, "images"),
        annotations=None if tier in ("test", "challenge", "submission") else questions,
        choices=find_file(folder, GQA_PLACES, f"{tier}_choices.json"),
        scene_graphs=find_file(folder, GQA_PLACES, f"{tier}_sceneGraphs.json"),
        kinds=find_file(folder, (".",), "kinds.json"),
    )


def locate_vizwiz(folder: Path, split: str | None) -> OfficialFiles:
    """SPLIT.json (or Annotations/SPLIT.json, or in Annotations.zip) and SPLIT/IMAGE. The test split has no answers."""
    split = split or choose_split(folder, VIZWIZ_PLACES, "{}.json", ("val",))
    questions = _needed(folder, VIZWIZ_PLACES, "{}.json", split)
    kinds = find_file(folder, (".",), "kinds.json")
    return OfficialFiles(split, questions, find_images(folder, split), None if split == "test" else questions, kinds=kinds)


def read_vqav2_questions(content: dict, images: Path) -> list[Question]:
    """Rows of the official question file; image names carry its data_subtype."""
    subset = str(field(content, "data_subtype", "the question file")).replace("test-dev2015", "test2015")
    rows = index_questions(field(content, "questions", "the question file"), "question_id", "questions")
    return [
        Question(key, field(row, "question", f"question {key!r}"), images / f"COCO_{subset}_{_number(row):012d}.jpg")
        for key, row in rows.items()
    ]


def read_gqa_questions(content: dict, images: Path) -> list[Question]:
    """Rows of the official question object."""
    if not isinstance(content, dict):
        raise ValueError(f"questions must be an object of questions by id, found {type(content).__name__}")
    return [
        Question(key, field(row, "question", f"question {key!r}"), images / f"{field(row, 'imageId', f'question {key!r}')}.jpg")
        for key, row in content.items()
    ]


def read_vizwiz_questions(content: list, images: Path) -> list[Question]:
    """Rows of the official list; the image's name is the id."""
    rows = index_questions(content, "image", "annotations")
    return [Question(key, field(row, "question", f"image {key!r}"), images / str(key)) for key, row in rows.items()]


def find_file(folder: Path, places: tuple[str, ...], name: str) -> Path | None:
    """The file (or folder of pieces) called `name` in the first of `places` below `folder` that holds it; None when none does.

    In an archive it may lie in a folder of any depth.
    """
    for place in _existing_places(folder, places):
        if not is_archive(place):
            if (place / name).exists():
                return place / name
            continue
        for member in members(place):
            parts = member.split("/")
            if name in parts and not member.startswith("__MACOSX/"):
                return place.joinpath(*parts[: parts.index(name) + 1])
    return None


def find_images(folder: Path, name: str) -> Path:
    """The folder of images called `name`, plain, below images/, or in NAME.zip; where it should be when it is not there."""
    for path in (folder / name, folder / "images" / name, folder / "Images" / name, folder / "Images" / "mscoco" / name):
        if path.is_dir():
            return path
    for archive in (folder / f"{name}.zip", folder / "images" / f"{name}.zip"):
        if is_archive(archive):
            return archive / name if exists(archive / name) else archive
    return folder / name


def choose_split(folder: Path, places: tuple[str, ...], pattern: str, preferred: tuple[str, ...]) -> str:
    """The first of the preferred splits that is there, or the only one. Raises FileNotFoundError when neither is."""
    found = _splits(folder, places, pattern)
    chosen = next((split for split in preferred if split in found), found[0] if len(found) == 1 else None)
    if chosen is None:
        several = f"found {', '.join(found)}; choose one with --split" if found else "found none"
        raise FileNotFoundError(f"{folder} should hold {pattern.format('SPLIT')}; {several}")
    return chosen


def _needed(folder: Path, places: tuple[str, ...], pattern: str, split: str) -> Path:
    path = find_file(folder, places, pattern.format(split))
    if path is None:
        there = ", ".join(_splits(folder, places, pattern)) or "none"
        raise FileNotFoundError(f"{folder / pattern.format(split)} not found; splits in that folder: {there}")
    return path


def _existing_places(folder: Path, places: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"the data folder {folder} does not exist")
    found = []
    for place in places:
        if place.endswith(".zip"):
            found += [path for path in sorted(folder.glob(place)) if is_archive(path)]
        elif (folder / place).is_dir():
            found.append(folder / place)
    return found


def _splits(folder: Path, places: tuple[str, ...], pattern: str) -> list[str]:
    before, after = pattern.split("{}")
    names: set[str] = set()
    for place in _existing_places(folder, places):
        if is_archive(place):
            names |= {part for member in members(place) for part in member.split("/")}
        else:
            names |= {path.name for path in place.iterdir()}
    ends = {after, after.removesuffix(".json")} - {""}
    found = {name[len(before) : len(name) - len(end)] for name in names if name.startswith(before) for end in ends if name.endswith(end)}
    return sorted(found - {"", "kinds"})


def _number(row: dict) -> int:
    image_id = field(row, "image_id", f"question {row['question_id']!r}")
    if not isinstance(image_id, int):
        raise ValueError(f"question {row['question_id']!r}: image_id must be a whole number, found {image_id!r}")
    return image_id
