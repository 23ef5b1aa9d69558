"""ChartQA: relaxed accuracy, and the command that predicts and scores.

A number may be off by five percent of the true one, because a chart is read by eye; any other answer must be the same but for case. The
official files have no ids, so a question's id is its place in the file, from "0".

    python eval_vqa/chartqa.py predict|score|run --help
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: its own folder is first on the path, the project's is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import math

from eval_vqa.official_files import OfficialFiles, Question, choose_split, find_file, find_images
from eval_vqa.official_records import field
from eval_vqa.per_question import evaluate_each, require_strings

__all__ = ["evaluate", "is_right", "locate", "read_questions"]

PLACES = (".",)
PATTERN = "{}.json"
TOLERANCE = 0.05  # of the true number


def is_right(prediction: str, answer: str) -> bool:
    """Whether a number is within 5 % of the true one, or a text the same but for case. A true 0 is compared as text.

    Raises ValueError for what is no string. Source: Masry et al. 2022 (arXiv 2203.10244), section 5.1, as computed by pix2struct.
    """
    require_strings([prediction, answer])
    said, true = _number(prediction), _number(answer)
    if said is not None and true:
        return abs(said - true) / abs(true) <= TOLERANCE
    return prediction.strip().lower() == answer.strip().lower()


def evaluate(annotations: list, results: list, *, question_ids=None) -> dict:
    """{"accuracy": percent, "evalQA": {id: percent}}, unrounded.

    annotations: the parsed file, [{"imgname", "query", "label"}], ids are "0", "1", ... results: [{"id", "answer"}]; of several for one id
    the last counts. Raises ValueError with the ids for a missing result and for what `is_right` refuses.
    """
    truths = {str(place): row for place, row in enumerate(annotations)}
    return evaluate_each(truths, results, "id", _judge, question_ids)


def locate(folder: Path, split: str | None) -> OfficialFiles:
    """SPLIT.json with SPLIT one of test_human, test_augmented, val_human, ..., and png/ (below the folder or below test/, val/)."""
    if folder.is_dir() and not list(folder.glob("*_*.json")) and (folder / "test").is_dir():
        folder = folder / "test"
    split = split or choose_split(folder, PLACES, PATTERN, ("test_human",))
    questions = find_file(folder, PLACES, PATTERN.format(split))
    if questions is None:
        raise FileNotFoundError(f"{folder / PATTERN.format(split)} not found")
    return OfficialFiles(split, questions, find_images(folder, "png"), questions, kinds=find_file(folder, PLACES, "kinds.json"))


def read_questions(content: list, images: Path) -> list[Question]:
    """Rows of the official list."""
    if not isinstance(content, list):
        raise ValueError(f"expected a list of questions, found {type(content).__name__}")
    return [
        Question(str(place), field(row, "query", f"entry {place}"), images / str(field(row, "imgname", f"entry {place}")))
        for place, row in enumerate(content)
    ]


def _judge(truth: dict, answer: str) -> float:
    return 1.0 if is_right(answer, str(field(truth, "label", "the annotation"))) else 0.0


def _number(text: str) -> float | None:
    """The number a text is, percent as hundredths; None for any other text. Thousands separators make it a text, as in the source."""
    text = text.strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    from eval_vqa.command_line import main

    sys.exit(main("chartqa"))
