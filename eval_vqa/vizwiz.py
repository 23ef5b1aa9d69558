"""VizWiz: the official accuracy and answerability scores, and the command that predicts and scores.

Unlike VQAv2 the prediction is always normalised and the annotators' answers never are, the other nine are found by position, and the
contraction table has curly apostrophes. "unanswerable" is an answer like any other.

    python eval_vqa/vizwiz.py predict|score|run|baseline --help
"""

import math
import sys
from numbers import Real
from pathlib import Path

if __package__ in (None, ""):  # started as a script: its own folder is first on the path, the project's is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval_vqa.answer_normalization import normalize
from eval_vqa.average_precision import average_precision, f1_score
from eval_vqa.contractions import VIZWIZ_CONTRACTIONS
from eval_vqa.official_records import field, index_records, name_ids
from eval_vqa.soft_accuracy import AccuracyTable, leave_one_out

__all__ = ["evaluate", "evaluate_answerability", "normalize_answer"]


def normalize_answer(text: str) -> str:
    """`text` cleaned, without punctuation, with digits and without articles, VizWiz's contractions. Raises ValueError for no string."""
    return normalize(text, VIZWIZ_CONTRACTIONS)


def evaluate(annotations: list, results: list, *, images=None, decimals: int = 2) -> dict:
    """The official VizWiz accuracies of `results` from the parsed official files, neither of which is changed.

    annotations: [{"image", "answers": [{"answer"}, ...], "answer_type"}]. results: [{"image", "answer"}]; more images than annotated do
    no harm. In both the last of several records for one image counts. images: a subset to score, in order, repeats counted again.
    decimals: of every percentage. Returns accuracy, perAnswerType {type: percent}, evalQA {image: percent} and evalAnsType
    {type: {image: percent}}. Where the official program would fail (an image without result, an answer that is no string, nothing to
    score, ...) it raises ValueError with the images. Source: the VizWiz API, vqaEval.py (Qing Li). The caption metrics are left out.
    """
    truths = index_records(annotations, "image", "annotations")
    predictions = index_records(results, "image", "results")
    table = AccuracyTable(decimals)
    for image in _chosen(images, truths, predictions):
        try:
            prediction = normalize_answer(field(predictions[image], "answer", "the result"))
            table.add(image, _accuracy(truths[image], prediction), answer=field(truths[image], "answer_type", "the annotation"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"image {image!r}: {error}") from None
    return {
        "accuracy": table.overall(),
        "perAnswerType": table.per_type("answer"),
        "evalQA": table.per_question,
        "evalAnsType": table.questions_by_type["answer"],
    }


def evaluate_answerability(annotations: list, results: list) -> dict:
    """Average precision and F1 (percent, 2 decimals) of finding the questions that can NOT be answered.

    annotations: [{"image", "answerable": 0 or 1}]. results: [{"image", "answerable": confidence in 0..1 that it can be answered}]. The
    positive class is "unanswerable"; a confidence of exactly 0.5 counts as answerable. Raises ValueError with the image for a missing
    result, key or number, and when there is nothing to score. Source: the VizWiz API, evaluate_unanswerability.
    """
    truths = index_records(annotations, "image", "annotations")
    predictions = index_records(results, "image", "results")
    labels, scores = [], []
    for image in _chosen(None, truths, predictions):
        answerable = field(truths[image], "answerable", f"the annotation of image {image!r}")
        confidence = field(predictions[image], "answerable", f"the result of image {image!r}")
        if answerable not in (0, 1):
            raise ValueError(f"image {image!r}: answerable must be 0 or 1 in the annotations, found {answerable!r}")
        if not _is_finite(confidence):
            raise ValueError(f"image {image!r}: answerable must be a number from 0 to 1 in the results, found {confidence!r}")
        labels.append(1 - int(answerable))
        scores.append(1.0 - confidence)
    return {
        "average_precision": round(100 * average_precision(labels, scores), 2),
        "f1_score": round(100 * f1_score(labels, [score > 0.5 for score in scores]), 2),
    }


def _chosen(images, truths: dict, predictions: dict) -> list:
    """The images to score, after a check that each is annotated and answered."""
    chosen = list(truths) if images is None else list(images)
    if not chosen:
        raise ValueError("there is no image to score")
    if unknown := [image for image in chosen if isinstance(image, list | dict | set) or image not in truths]:
        raise ValueError(f"images without annotation, {name_ids(unknown)}")
    if missing := [image for image in chosen if image not in predictions]:
        raise ValueError(f"annotated images without result, {name_ids(missing)}")
    return chosen


def _is_finite(value) -> bool:
    """Whether `value` is a number that a double can hold; nan and infinity, which JSON readers let pass, are none."""
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:
        return False


def _accuracy(truth: dict, prediction: str) -> float:
    """Soft accuracy; the others are the answers at the other positions, compared as they were written."""
    entries = field(truth, "answers", "the annotation")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"expected a list of human answers, found {entries!r}")
    matches = [field(entry, "answer", "a human answer") == prediction for entry in entries]
    return leave_one_out([sum(matches) - match for match in matches])


if __name__ == "__main__":
    from eval_vqa.command_line import main

    sys.exit(main("vizwiz"))
