"""VQAv2: the official accuracy, and the command that predicts and scores.

The reference is the official program of 2021; `version="2017"` is the release that nearly all papers before 2021 used. They differ
where annotators agree: today's leaves both sides untouched then, the older one always normalises the prediction and never the case,
digits and articles of the annotators' answers.

    python eval_vqa/vqav2.py predict|score|run|baseline --help
"""

import sys
from functools import lru_cache
from pathlib import Path

if __package__ in (None, ""):  # started as a script: its own folder is first on the path, the project's is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval_vqa.answer_normalization import clean, digits_and_articles, normalize, strip_punctuation
from eval_vqa.contractions import VQAV2_CONTRACTIONS
from eval_vqa.official_records import field, index_records, name_ids
from eval_vqa.soft_accuracy import AccuracyTable, leave_one_out

__all__ = ["evaluate", "normalize_answer"]

VERSIONS = ("2017", "2021")
QUESTION_FILE_KEYS = ("info", "task_type", "data_type", "data_subtype", "license", "questions")  # what the official loader reads


def normalize_answer(text: str) -> str:
    """`text` cleaned, without punctuation, with digits for number words and without articles; always all three steps.

    Raises ValueError when `text` is not a string. Source: GT-Vision-Lab/VQA, vqaEval.py (processPunctuation, processDigitArticle).
    """
    return normalize(text, VQAV2_CONTRACTIONS)


def evaluate(questions: dict, annotations: dict, results: list, *, question_ids=None, decimals: int = 2, version: str = "2021") -> dict:
    """The official VQAv2 scores of `results` from the parsed official files, none of which is changed.

    questions, annotations: the two official objects. results: [{"question_id", "answer"}], one for each annotated question; of several
    for one id the last counts. question_ids: a subset to score, in order, repeats counted again. decimals: of every percentage.
    Returns accuracy, perQuestionType and perAnswerType {type: percent}, evalQA {id: percent}, evalQuesType and evalAnsType
    {type: {id: percent}}. Where the official program would fail (ids that do not correspond, an answer that is no string, nothing to
    score, ...) it raises ValueError with the ids. Source: GT-Vision-Lab/VQA a013f00 (2021) and a4f1afd (2017), vqa.py and vqaEval.py.
    """
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, found {version!r}")
    records = field(annotations, "annotations", "the annotation file")
    truths = index_records(records, "question_id", "annotations")
    predictions = index_records(results, "question_id", "results")
    _check_correspondence(questions, records, truths, results, predictions)
    if question_ids is None:
        question_ids = [record["question_id"] for record in records]  # an id annotated twice is scored twice
    question_ids = list(question_ids)
    if not question_ids:
        raise ValueError("there is no question to score")
    if unknown := [one for one in question_ids if isinstance(one, list | dict | set) or one not in truths]:
        raise ValueError(f"question_ids without annotation, {name_ids(unknown)}")

    compare = _compare_2021 if version == "2021" else _compare_2017
    table = AccuracyTable(decimals)
    answers: dict = {}  # what the official program leaves in its annotations: a question that comes again is normalised again
    for question_id in question_ids:
        truth = truths[question_id]
        try:
            if question_id not in answers:
                answers[question_id] = _copied_answers(truth)
            answers[question_id], prediction = compare(answers[question_id], field(predictions[question_id], "answer", "the result"))
            accuracy = _accuracy(answers[question_id], prediction)
            table.add(question_id, accuracy, question=truth["question_type"], answer=truth["answer_type"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"question {question_id!r}: {error}") from None
    return {
        "accuracy": table.overall(),
        "perQuestionType": table.per_type("question"),
        "perAnswerType": table.per_type("answer"),
        "evalQA": table.per_question,
        "evalQuesType": table.questions_by_type["question"],
        "evalAnsType": table.questions_by_type["answer"],
    }


def _check_correspondence(questions, records, truths, results, predictions) -> None:
    """Raises ValueError for what makes the official loader refuse the files."""
    for key in QUESTION_FILE_KEYS:
        field(questions, key, "the question file")
    asked = index_records(questions["questions"], "question_id", "questions")
    index_records(records, "image_id", "annotations")
    missing = [question_id for question_id in truths if question_id not in predictions]
    extra = [question_id for question_id in predictions if question_id not in truths]
    if missing or extra:
        raise ValueError(
            "results and annotations must hold the same question ids; "
            f"annotated but not answered {name_ids(missing)}; answered but not annotated {name_ids(extra)}"
        )
    for question_id, truth in truths.items():
        for key in ("question_type", "answer_type"):
            field(truth, key, f"the annotation of question {question_id!r}")
    if questions["task_type"] == "Multiple Choice":
        for result in results:
            question_id = result["question_id"]
            if question_id not in asked:
                raise ValueError(f"question {question_id!r} of a multiple-choice task is not in the question file")
            choices = field(asked[question_id], "multiple_choices", f"multiple-choice question {question_id!r}")
            if field(result, "answer", f"the result of question {question_id!r}") not in choices:
                raise ValueError(f"question {question_id!r}: the answer {result['answer']!r} is none of its multiple_choices {choices}")


def _copied_answers(truth: dict) -> list[dict]:
    entries = field(truth, "answers", "the annotation")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"expected a list of human answers, found {entries!r}")
    for entry in entries:
        field(entry, "answer", "a human answer")
    return [dict(entry) for entry in entries]


@lru_cache(maxsize=1 << 16)  # human answers repeat: a validation set holds two million, some hundred thousand of them distinct
def _normalized(cleaned: str) -> str:
    return digits_and_articles(strip_punctuation(cleaned), VQAV2_CONTRACTIONS)


def _compare_2021(entries: list[dict], prediction: str) -> tuple[list[dict], str]:
    """Both sides as they are compared: normalised only where the cleaned human answers differ."""
    cleaned = [clean(entry["answer"]) for entry in entries]
    prediction = clean(prediction)
    if len(set(cleaned)) > 1:
        cleaned = [_normalized(answer) for answer in cleaned]
        prediction = _normalized(prediction)
    return [{**entry, "answer": answer} for entry, answer in zip(entries, cleaned, strict=True)], prediction


def _compare_2017(entries: list[dict], prediction: str) -> tuple[list[dict], str]:
    """Both sides as they are compared: the prediction always normalised, human answers only without punctuation where they differ."""
    prediction = _normalized(clean(prediction))
    if len({entry["answer"] for entry in entries}) > 1:
        if strange := [entry["answer"] for entry in entries if not isinstance(entry["answer"], str)]:
            raise ValueError(f"an answer must be a string, found {strange[0]!r}")
        entries = [{**entry, "answer": strip_punctuation(entry["answer"])} for entry in entries]
    return entries, prediction


def _accuracy(entries: list[dict], prediction: str) -> float:
    """Soft accuracy; "the others" are the entries unlike the one left out, so equal entries (no answer_id) leave together."""
    matching = [entry for entry in entries if entry["answer"] == prediction]
    return leave_one_out(
        [len(matching) - (sum(other == entry for other in matching) if entry["answer"] == prediction else 0) for entry in entries]
    )


if __name__ == "__main__":
    from eval_vqa.command_line import main

    sys.exit(main("vqav2"))
