"""What a score must be held against: the majority answer per question type, and the best that constant answers could reach.

A model that does not look at the image can learn the first. The second is the ceiling where people disagree: on VizWiz no answer gets
full marks for many questions. Both work on all three official formats; a question type is the annotation's where it has one, else the
longest official VQAv2 type that the question begins with.
"""

from collections import Counter, defaultdict

from eval_vqa import vizwiz, vqav2
from eval_vqa.official_records import field, index_records
from eval_vqa.question_types import question_type
from eval_vqa.soft_accuracy import mean

__all__ = ["ceiling", "fit_majority", "majority_results"]

EVERY_TYPE = ""  # key of the answer for a type that the training set does not have


def fit_majority(annotations: dict | list) -> dict[str, str]:
    """{question type: its most frequent answer}, and under "" the most frequent of all, from parsed training annotations.

    annotations: VQAv2's annotation object (type and multiple_choice_answer are read), GQA's questions, or VizWiz's list (each person's
    answer counts). Of equally frequent answers the alphabetically first. Raises ValueError when there is nothing to fit.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for kind, answers in _typed_answers(annotations):
        counts[kind].update(answers)
        counts[EVERY_TYPE].update(answers)
    if not counts:
        raise ValueError("the training annotations hold no answers to fit a majority on")
    return {kind: min(counter, key=lambda answer: (-counter[answer], answer)) for kind, counter in counts.items()}


def majority_results(majority: dict[str, str], questions: dict | list, annotations: dict | None = None) -> list[dict]:
    """Official results that answer each question by its type.

    questions: VQAv2's question object, GQA's questions or VizWiz's list. annotations: VQAv2's, for their question types; without them
    the type is read off the question.
    """

    def answer(row: dict, kind: str | None = None) -> str:
        kind = kind or question_type(field(row, "question", "a question"))
        return majority.get(kind, majority[EVERY_TYPE])

    if isinstance(questions, list):
        return [{"image": key, "answer": answer(row)} for key, row in index_records(questions, "image", "annotations").items()]
    if "questions" not in questions:
        return [{"questionId": key, "prediction": answer(row)} for key, row in questions.items()]
    records = annotations["annotations"] if annotations else []
    types = {key: row.get("question_type") for key, row in index_records(records, "question_id", "annotations").items()}
    rows = index_records(questions["questions"], "question_id", "questions")
    return [{"question_id": key, "answer": answer(row, types.get(key))} for key, row in rows.items()]


def ceiling(annotations: dict | list, questions: dict | None = None) -> float:
    """Mean percent over questions of the best score that any single answer gets there; 100 less it is what nobody can reach.

    annotations: VizWiz's list, or VQAv2's object with its question object beside it. Tried are the people's own answers.
    """
    is_vizwiz = isinstance(annotations, list)
    id_key = "image" if is_vizwiz else "question_id"
    rows = annotations if is_vizwiz else field(annotations, "annotations", "the annotation file")
    people = {key: field(row, "answers", f"{key!r}") for key, row in index_records(rows, id_key, "annotations").items()}
    candidates = {key: list(dict.fromkeys(field(entry, "answer", "an answer") for entry in entries)) for key, entries in people.items()}
    best = dict.fromkeys(candidates, 0.0)
    for place in range(max(map(len, candidates.values()), default=0)):
        results = [{id_key: key, "answer": answers[min(place, len(answers) - 1)]} for key, answers in candidates.items()]
        if is_vizwiz:
            scores = vizwiz.evaluate(annotations, results, decimals=10)["evalQA"]
        else:
            scores = vqav2.evaluate(questions, annotations, results, decimals=10)["evalQA"]
        best = {key: max(best[key], percent) for key, percent in scores.items()}
    if not best:
        raise ValueError("there is no question to find a ceiling of")
    return mean(list(best.values()))


def _typed_answers(annotations: dict | list):
    """(question type, answers) of each training question."""
    if isinstance(annotations, list):
        for row in annotations:
            people = field(row, "answers", "an annotation")
            yield question_type(field(row, "question", "an annotation")), [field(entry, "answer", "an answer") for entry in people]
    elif "annotations" in annotations:
        for row in annotations["annotations"]:
            yield field(row, "question_type", "an annotation"), [field(row, "multiple_choice_answer", "an annotation")]
    else:
        for key, row in annotations.items():
            yield question_type(field(row, "question", f"question {key!r}")), [field(row, "answer", f"question {key!r}")]
