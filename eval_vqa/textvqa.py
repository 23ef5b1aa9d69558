"""TextVQA: the soft accuracy of ten answers with the benchmark's own normaliser, and the command that predicts and scores.

Two things differ from VQAv2: commas and question marks are deleted and "'s" becomes a word of its own before anything else, and both
sides are always normalised. Published TextVQA scores, and LLaVA's on VQAv2-like sets, were measured so.

    python eval_vqa/textvqa.py predict|score|run --help
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: its own folder is first on the path, the project's is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval_vqa.answer_normalization import normalize
from eval_vqa.contractions import VQAV2_CONTRACTIONS
from eval_vqa.official_files import OfficialFiles, Question, choose_split, find_file, find_images
from eval_vqa.official_records import field, index_questions, index_records
from eval_vqa.per_question import evaluate_each, require_strings
from eval_vqa.soft_accuracy import leave_one_out

__all__ = ["evaluate", "locate", "normalize_answer", "read_questions"]

PLACES = (".", "annotations")
PATTERN = "TextVQA_0.5.1_{}.json"
ANSWERS = 10


def normalize_answer(text: str) -> str:
    """`text` as TextVQA compares it. Raises ValueError when it is not a string."""
    if not isinstance(text, str):
        raise ValueError(f"an answer must be a string, found {text!r} ({type(text).__name__})")
    return normalize(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip(), VQAV2_CONTRACTIONS)


def evaluate(annotations: dict, results: list, *, question_ids=None) -> dict:
    """{"accuracy": percent, "evalQA": {question_id: percent}}, unrounded.

    annotations: the parsed TextVQA file, {"data": [{"question_id", "answers": ten strings}]}. results: [{"question_id", "answer"}]; of
    several for one id the last counts, unknown ids do no harm. question_ids: a subset to score. Raises ValueError with the ids for a
    missing result, an answer that is no string, or another number of answers than ten. Source: MMF / LLaVA, m4c_evaluator.py.
    """
    truths = index_records(field(annotations, "data", "the annotation file"), "question_id", "data")
    return evaluate_each(truths, results, "question_id", _judge, question_ids)


def locate(folder: Path, split: str | None) -> OfficialFiles:
    """TextVQA_0.5.1_SPLIT.json, train_images/ (of train and val) or test_images/."""
    split = split or choose_split(folder, PLACES, PATTERN, ("val",))
    questions = find_file(folder, PLACES, PATTERN.format(split))
    if questions is None:
        raise FileNotFoundError(f"{folder / PATTERN.format(split)} not found")
    images = find_images(folder, "test_images" if split == "test" else "train_images")
    return OfficialFiles(split, questions, images, None if split == "test" else questions, kinds=find_file(folder, (".",), "kinds.json"))


def read_questions(content: dict, images: Path) -> list[Question]:
    """Rows of the official file."""
    rows = index_questions(field(content, "data", "the question file"), "question_id", "data")
    return [
        Question(key, field(row, "question", f"question {key!r}"), images / f"{field(row, 'image_id', f'question {key!r}')}.jpg")
        for key, row in rows.items()
    ]


def _judge(truth: dict, answer: str) -> float:
    people = field(truth, "answers", "the annotation")
    require_strings(people)
    if len(people) != ANSWERS:
        raise ValueError(f"expected {ANSWERS} answers in the annotation, found {len(people)}")
    prediction = normalize_answer(answer)
    matches = [normalize_answer(one) == prediction for one in people]
    return leave_one_out([sum(matches) - match for match in matches])


if __name__ == "__main__":
    from eval_vqa.command_line import main

    sys.exit(main("textvqa"))
