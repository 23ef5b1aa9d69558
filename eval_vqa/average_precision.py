"""Average precision and F1 of a binary decision, by scikit-learn's definitions, without scikit-learn.

VizWiz's answerability task is scored with these two. Written by hand because scoring should need nothing but Python; the tests compare
both with scikit-learn.
"""

import math
from collections.abc import Sequence
from itertools import groupby

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
    precision_sum, previous_recall, seen, hits = 0.0, 0.0, 0, 0
    for _, tied in groupby(ranked, key=lambda pair: pair[0]):
        tied_labels = [label for _, label in tied]
        seen += len(tied_labels)
        hits += sum(tied_labels)
        recall = hits / positives
        precision_sum += (recall - previous_recall) * (hits / seen)
        previous_recall = recall
    return precision_sum


def f1_score(labels: Sequence[int], decisions: Sequence[bool]) -> float:
    """2 TP / (2 TP + FP + FN); 0.0 where that is undefined. Source: sklearn.metrics.f1_score."""
    true_positives = sum(1 for label, decision in zip(labels, decisions, strict=True) if label and decision)
    errors = sum(1 for label, decision in zip(labels, decisions, strict=True) if bool(label) != bool(decision))
    return 2 * true_positives / (2 * true_positives + errors) if true_positives else 0.0
