"""Average precision and F1 of a binary decision, by scikit-learn's definitions, without scikit-learn.

VizWiz's answerability task is scored with these two. Written by hand because scoring should need nothing but Python; the tests compare
both with scikit-learn.
"""

import math
from collections.abc import Sequence
from itertools import groupby

from eval_vqa.soft_accuracy import plain_sum

__all__ = ["average_precision", "f1_score"]


def average_precision(labels: Sequence[int], scores: Sequence[float]) -> float:
    """Sum over the distinct scores, highest first, of (recall - previous recall) * precision; 0.0 when no label is 1.

    labels: 0 or 1. scores: the larger, the more likely 1; equal scores enter together. Raises ValueError when there is nothing to rank,
    the lengths differ or a score is not finite. Source: sklearn.metrics.average_precision_score.
    """
    if len(labels) != len(scores) or not labels:
        raise ValueError(f"expected as many scores as labels and at least one, found {len(scores)} and {len(labels)}")
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(f"scores must be finite, found {next(score for score in scores if not math.isfinite(score))}")
    positives = sum(labels)
    if positives == 0:
        return 0.0
    ranked = sorted(zip(scores, labels, strict=True), key=lambda pair: -pair[0])
    steps, previous_recall, seen, hits = [], 0.0, 0, 0
    for _, tied in groupby(ranked, key=lambda pair: pair[0]):
        tied_labels = [label for _, label in tied]
        seen += len(tied_labels)
        hits += sum(tied_labels)
        recall = hits / positives
        steps.append((recall - previous_recall) * (hits / seen))
        previous_recall = recall
    return _numpy_sum(steps[::-1])  # scikit-learn's arrays begin at the lowest score


def f1_score(labels: Sequence[int], decisions: Sequence[bool]) -> float:
    """2 TP / (2 TP + FP + FN); 0.0 where that is undefined. Source: sklearn.metrics.f1_score."""
    true_positives = sum(1 for label, decision in zip(labels, decisions, strict=True) if label and decision)
    errors = sum(1 for label, decision in zip(labels, decisions, strict=True) if bool(label) != bool(decision))
    return 2 * true_positives / (2 * true_positives + errors) if true_positives else 0.0


def _numpy_sum(values: list[float]) -> float:
    """Sum of `values` in the order of numpy.sum over doubles: halves down to 128 values, these in eight columns, fewer than eight in line.

    Only the last digit depends on it, but an average precision of exactly 28.125 % must not become 28.12499.
    """
    if len(values) > 128:
        half = len(values) // 2
        half -= half % 8
        return _numpy_sum(values[:half]) + _numpy_sum(values[half:])
    total, rest = 0.0, 0
    if len(values) >= 8:
        rest = len(values) - len(values) % 8
        one, two, three, four, five, six, seven, eight = (plain_sum(values[column:rest:8]) for column in range(8))
        total = ((one + two) + (three + four)) + ((five + six) + (seven + eight))
    return plain_sum([total, *values[rest:]])
