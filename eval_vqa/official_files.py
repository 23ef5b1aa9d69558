"""Where the official VQAv2, GQA and VizWiz downloads keep what, and the questions in them as one kind of row.

A split that is not named is the usual one to measure on, or the only one there.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eval_vqa.json_files import read_json
from eval_vqa.official_records import field, index_records, name_ids

__all__ = ["LOCATORS", "READERS", "OfficialFiles", "Question", "read_questions"]


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
    split = split or _only_split(folder, pattern, ("val2014",))
    return OfficialFiles(
        split,
        _existing(folder / pattern.format(split), folder, pattern),
        images=folder / split.replace("test-dev2015", "test2015"),
        annotations=_if_exists(folder / f"v2_mscoco_{split}_annotations.json"),
        kinds=_if_exists(folder / "kinds.json"),
    )


def locate_gqa(folder: Path, split: str | None) -> OfficialFiles:
    """SPLIT_questions.json, a folder SPLIT_questions/ with its pieces, TIER_choices.json, TIER_sceneGraphs.json, images/ID.jpg.

    A split is a tier and a set ("testdev_balanced", "val_all"); of a tier alone the balanced set is taken, or else all.
    """
    pattern = "{}_questions.json"
    preferred = ("testdev_balanced", "testdev_all", "val_balanced", "val_all")
    split = split or _only_split(folder, pattern, preferred)
    names = [split] if split.endswith(("_balanced", "_all")) else [f"{split}_balanced", f"{split}_all", split]
    candidates = [folder / form for name in names for form in (pattern.format(name), f"{name}_questions")]
    questions = next((path for path in candidates if path.exists()), None) or _existing(candidates[0], folder, pattern)
    name = questions.name.removesuffix(".json").removesuffix("_questions")
    tier = re.sub("_(balanced|all)$", "", name)
    return OfficialFiles(
        name,
        questions,
        images=folder / "images",
        annotations=questions,
        choices=_if_exists(folder / f"{tier}_choices.json"),
        scene_graphs=_if_exists(folder / f"{tier}_sceneGraphs.json"),
        kinds=_if_exists(folder / "kinds.json"),
    )


def locate_vizwiz(folder: Path, split: str | None) -> OfficialFiles:
    """SPLIT.json (or Annotations/SPLIT.json) and SPLIT/IMAGE."""
    where = folder if not (folder / "Annotations").is_dir() else folder / "Annotations"
    split = split or _only_split(where, "{}.json", ("val",))
    questions = _existing(where / f"{split}.json", where, "{}.json")
    return OfficialFiles(split, questions, images=folder / split, annotations=questions, kinds=_if_exists(folder / "kinds.json"))


LOCATORS: dict[str, Callable[[Path, str | None], OfficialFiles]] = {
    "vqav2": locate_vqav2, "gqa": locate_gqa, "vizwiz": locate_vizwiz,
}  # fmt: skip


def read_vqav2_questions(content: dict, images: Path) -> list[Question]:
    """Rows of the official question file; image names carry its data_subtype."""
    subset = str(field(content, "data_subtype", "the question file")).replace("test-dev2015", "test2015")
    rows = index_records(field(content, "questions", "the question file"), "question_id", "questions")
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
    rows = index_records(content, "image", "annotations")
    return [Question(key, field(row, "question", f"image {key!r}"), images / str(key)) for key, row in rows.items()]


READERS: dict[str, Callable[[dict | list, Path], list[Question]]] = {
    "vqav2": read_vqav2_questions, "gqa": read_gqa_questions, "vizwiz": read_vizwiz_questions,
}  # fmt: skip


def read_questions(task: str, files: OfficialFiles) -> list[Question]:
    """The questions of a split in official order. Raises ValueError for a file without questions or with one that is no text."""
    rows = READERS[task](read_json(files.questions), files.images)
    if not rows:
        raise ValueError(f"{files.questions} holds no questions")
    if silent := [row.id for row in rows if not isinstance(row.text, str)]:
        raise ValueError(f"{files.questions}: questions whose text is no string, {name_ids(silent)}")
    return rows


def _number(row: dict) -> int:
    image_id = field(row, "image_id", f"question {row['question_id']!r}")
    if not isinstance(image_id, int):
        raise ValueError(f"question {row['question_id']!r}: image_id must be a whole number, found {image_id!r}")
    return image_id


def _if_exists(path: Path) -> Path | None:
    return path if path.exists() else None


def _splits(folder: Path, pattern: str) -> list[str]:
    before, after = pattern.split("{}")
    names = [path.name for path in folder.iterdir() if path.name.startswith(before)]
    stem = after.removesuffix(".json")
    found = {name[len(before) : len(name) - len(end)] for name in names for end in {after, stem} if end and name.endswith(end)}
    return sorted(found - {"", "kinds"})


def _only_split(folder: Path, pattern: str, preferred: tuple[str, ...]) -> str:
    if not folder.is_dir():
        raise FileNotFoundError(f"the data folder {folder} does not exist")
    found = _splits(folder, pattern)
    chosen = next((split for split in preferred if split in found), found[0] if len(found) == 1 else None)
    if chosen is None:
        several = f"found {', '.join(found)}; choose one with --split" if found else "found none"
        raise FileNotFoundError(f"{folder} should hold {pattern.format('SPLIT')}; {several}")
    return chosen


def _existing(path: Path, folder: Path, pattern: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"the data folder {folder} does not exist")
    if not path.exists():
        raise FileNotFoundError(f"{path} not found; splits in that folder: {', '.join(_splits(folder, pattern)) or 'none'}")
    return path
