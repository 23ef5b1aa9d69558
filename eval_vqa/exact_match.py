"""Exact match on questions of your own, and the command that predicts and scores.

The data is a JSON list of {"id", "image", "question", "answer"}; "answer" may be a list of accepted answers, "image" is a path beside the
file. Both sides are stripped of white space and final periods and lower-cased, nothing else.

    python eval_vqa/exact_match.py predict|score|run --questions FILE --help
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: its own folder is first on the path, the project's is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval_vqa.official_files import OfficialFiles, Question, choose_split, find_file
from eval_vqa.official_records import field, index_questions
from eval_vqa.per_question import evaluate_each, require_strings
from eval_vqa.postprocessing import lower_without_final_period

__all__ = ["evaluate", "locate", "read_questions"]

PLACES = (".",)


def evaluate(annotations: list, results: list, *, question_ids=None) -> dict:
    """{"accuracy": percent, "evalQA": {id: percent}}, unrounded.

    annotations: [{"id", "answer": string or list of strings}]. results: [{"id", "answer"}]; of several for one id the last counts. Raises
    ValueError with the ids for a missing result and for an answer that is no string.
    """
    return evaluate_each(index_questions(annotations, "id", "questions"), results, "id", _judge, question_ids)


def locate(folder: Path, split: str | None) -> OfficialFiles:
    """SPLIT.json; the images are named relative to it."""
    split = split or choose_split(folder, PLACES, "{}.json", ("test", "val"))
    questions = find_file(folder, PLACES, f"{split}.json")
    if questions is None:
        raise FileNotFoundError(f"{folder / split}.json not found")
    return OfficialFiles(split, questions, questions.parent, questions, kinds=find_file(folder, PLACES, "kinds.json"))


def read_questions(content: list, images: Path) -> list[Question]:
    """Rows of the list."""
    return [
        Question(key, field(row, "question", f"question {key!r}"), images / str(field(row, "image", f"question {key!r}")))
        for key, row in index_questions(content, "id", "questions").items()
    ]


def _judge(truth: dict, answer: str) -> float:
    accepted = field(truth, "answer", "the question")
    accepted = accepted if isinstance(accepted, list) else [accepted]
    require_strings(accepted)
    return 1.0 if lower_without_final_period(answer) in map(lower_without_final_period, accepted) else 0.0


if __name__ == "__main__":
    from eval_vqa.command_line import main

    sys.exit(main("exact_match"))
