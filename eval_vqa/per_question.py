"""A score that is the mean over questions of something judged question by question: what the smaller tasks have in common."""

from collections.abc import Callable

from eval_vqa.official_records import field, index_records, name_ids
from eval_vqa.soft_accuracy import mean

__all__ = ["evaluate_each", "require_strings"]


def evaluate_each(truths: dict, results: list, id_key: str, judge: Callable[[dict, str], float], question_ids=None) -> dict:
    """{"accuracy": percent, "evalQA": {id: percent}}, unrounded, with judge(truth, answer) -> 0..1 for each question.

    truths: {id: record}. results: [{id_key, "answer"}]; of several for one id the last counts, unknown ids do no harm. question_ids: a
    subset to score. Raises ValueError with the ids for a missing result, an answer that is no string, and whatever `judge` refuses.
    """
    predictions = index_records(results, id_key, "results")
    chosen = list(truths) if question_ids is None else list(question_ids)
    if not chosen:
        raise ValueError("there is no question to score")
    if missing := [one for one in chosen if one not in predictions or one not in truths]:
        raise ValueError(f"questions without result or annotation, {name_ids(missing)}")
    percents = {}
    for one in chosen:
        try:
            answer = field(predictions[one], "answer", "the result")
            require_strings([answer])
            percents[one] = 100 * judge(truths[one], answer)
        except ValueError as error:
            raise ValueError(f"question {one!r}: {error}") from None
    return {"accuracy": mean(list(percents.values())), "evalQA": percents}


def require_strings(answers) -> None:
    """Raises ValueError when there is no answer or one that is no string."""
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"expected a list of answers, found {answers!r}")
    for answer in answers:
        if not isinstance(answer, str):
            raise ValueError(f"an answer must be a string, found {answer!r} ({type(answer).__name__})")
