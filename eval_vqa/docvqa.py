"""DocVQA: average normalised Levenshtein similarity (ANLS), and the command that predicts and scores.

A misread letter costs little, a wrong answer everything: the similarity to the nearest reference answer counts where it is at least one
half. The paper writes "below 0.5" of the distance, the official program keeps a similarity of exactly 0.5; this follows the program. So
it does in what a distance is divided by: the length of the longer text in upper case as it was written, white space included.

    python eval_vqa/docvqa.py predict|score|run --help
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: its own folder is first on the path, the project's is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval_vqa.official_files import OfficialFiles, Question, choose_split, find_file
from eval_vqa.official_records import field, index_questions, index_records
from eval_vqa.per_question import evaluate_each, require_strings

__all__ = ["edit_distance", "evaluate", "locate", "read_questions", "similarity"]

PLACES = (".", "annotations")
PATTERN = "{}_v1.0.json"
LEAST_SIMILARITY = 0.5


def edit_distance(one: str, other: str) -> int:
    """Fewest insertions, deletions and replacements of a character that turn one text into the other (Levenshtein)."""
    previous = list(range(len(other) + 1))
    for row, left in enumerate(one, start=1):
        current = [row]
        for column, right in enumerate(other, start=1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (left != right)))
        previous = current
    return previous[-1]


def similarity(prediction: str, answers: list[str]) -> float:
    """ANLS of one question, 0..1; case and runs of white space do not matter. Raises ValueError for what is no string or no answer."""
    require_strings(answers)
    require_strings([prediction])
    best = 0.0
    said = " ".join(prediction.lower().split())
    for answer in answers:
        wanted = " ".join(answer.lower().split())
        longest = max(len(answer.upper()), len(prediction.upper()))
        best = max(best, 1.0 - (edit_distance(said, wanted) / longest if longest else 0.0))
    return best if best >= LEAST_SIMILARITY else 0.0


def evaluate(annotations: dict, results: list, *, question_ids=None) -> dict:
    """{"accuracy": ANLS in percent, "evalQA": {questionId: percent}}, unrounded.

    annotations: the parsed file, {"data": [{"questionId", "answers": strings}]}. results: [{"questionId", "answer"}]; of several for one id
    the last counts, unknown ids do no harm. Raises ValueError with the ids for a missing result and for what `similarity` refuses. Source:
    Biten et al. 2019 (arXiv 1905.13648) and the Robust Reading Competition's evaluation program.
    """
    truths = index_records(field(annotations, "data", "the annotation file"), "questionId", "data")
    return evaluate_each(truths, results, "questionId", _judge, question_ids)


def locate(folder: Path, split: str | None) -> OfficialFiles:
    """SPLIT_v1.0.json (or SPLIT_v1.0_withQT.json) and the documents/ its rows name."""
    newer = "{}_v1.0_withQT.json"
    pattern = newer if find_file(folder, PLACES, newer.format(split or "val")) else PATTERN
    split = split or choose_split(folder, PLACES, pattern, ("val",))
    questions = find_file(folder, PLACES, pattern.format(split))
    if questions is None:
        raise FileNotFoundError(f"{folder / pattern.format(split)} not found")
    images = folder / split if (folder / split).is_dir() else folder
    return OfficialFiles(split, questions, images, None if split == "test" else questions, kinds=find_file(folder, (".",), "kinds.json"))


def read_questions(content: dict, images: Path) -> list[Question]:
    """Rows of the official file; "image" is a path below the folder."""
    rows = index_questions(field(content, "data", "the question file"), "questionId", "data")
    return [
        Question(key, field(row, "question", f"question {key!r}"), images / str(field(row, "image", f"question {key!r}")))
        for key, row in rows.items()
    ]


def _judge(truth: dict, answer: str) -> float:
    return similarity(answer, field(truth, "answers", "the annotation"))


if __name__ == "__main__":
    from eval_vqa.command_line import main

    sys.exit(main("docvqa"))
