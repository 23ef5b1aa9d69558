"""Average precision and F1 against scikit-learn where it is installed, and against a brute force over thresholds."""

import random
import warnings

import pytest

from eval_vqa.average_precision import average_precision, f1_score


def random_case(rng):
    count = rng.randint(1, 30)
    return [rng.randint(0, 1) for _ in range(count)], [rng.choice((rng.random(), 0.25, 0.5, 0.75)) for _ in range(count)]


def brute_force(labels, scores):
    """Precision and recall of "score >= threshold" for each distinct score, highest first."""
    total, last_recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [label for label, score in zip(labels, scores, strict=True) if score >= threshold]
        recall = sum(chosen) / sum(labels)
        total += (recall - last_recall) * sum(chosen) / len(chosen)
        last_recall = recall
    return total


def test_equals_a_brute_force_over_thresholds():
    rng = random.Random(1)
    for _ in range(200):
        labels, scores = random_case(rng)
        if any(labels):
            assert average_precision(labels, scores) == pytest.approx(brute_force(labels, scores), abs=1e-12)


def test_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference and is not installed")
    rng = random.Random(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns where no label is positive; 0.0 is the value in question
        for _ in range(200):
            labels, scores = random_case(rng)
            decisions = [score > 0.5 for score in scores]
            assert average_precision(labels, scores) == pytest.approx(metrics.average_precision_score(labels, scores), abs=1e-12)
            assert f1_score(labels, decisions) == pytest.approx(metrics.f1_score(labels, decisions, zero_division=0.0), abs=1e-12)


def test_equals_scikit_learn_to_the_last_digit():
    """Else an exact half rounds to the other side: one of some four thousand small answerability files came out 0.01 off."""
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference and is not installed")
    rng = random.Random(3)
    for count in [*range(1, 40), 127, 128, 129, 136, 300, 1000]:
        for levels in (4, 1_000_000):
            labels, scores = [1, *rng.choices((0, 1), k=count - 1)], [rng.randint(0, levels) / levels for _ in range(count)]
            assert average_precision(labels, scores) == metrics.average_precision_score(labels, scores)


def test_ties_enter_together():
    assert average_precision([1, 0, 0, 0], [0.5] * 4) == 0.25


def test_nothing_to_rank_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        average_precision([], [])
