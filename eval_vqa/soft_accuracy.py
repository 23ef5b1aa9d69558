"""The soft accuracy of ten human answers, min(matches / 3, 1), averaged over the answers each left out in turn, and its table of means.

Sums run from left to right in plain double precision. Python 3.12's `sum` compensates rounding errors; the official programs did not,
and a mean that ends in an exact half would then round to the other side.
"""

from collections.abc import Iterable, Sequence

__all__ = ["AccuracyTable", "leave_one_out", "mean", "plain_sum"]


def plain_sum(values: Iterable[float]) -> float:
    """Left-to-right sum without compensation."""
    total = 0.0
    for value in values:
        total += value
    return total


def mean(values: Sequence[float]) -> float:
    """Mean of `values`, which must not be empty."""
    return plain_sum(values) / len(values)


def leave_one_out(matches_among_others: Sequence[int]) -> float:
    """Soft accuracy (0..1) from the number of matches that remain when each answer in turn is left out."""
    return mean([min(1.0, matches / 3) for matches in matches_among_others])


class AccuracyTable:
    """Per-question accuracies on their way to the official dictionaries: overall, per kind of type, and every question by id."""

    def __init__(self, decimals: int):
        self.decimals = decimals
        self.accuracies: list[float] = []
        self.per_question: dict = {}  # id -> percent, rounded
        self.by_type: dict[str, dict] = {}  # table -> type -> list of accuracies
        self.questions_by_type: dict[str, dict] = {}  # table -> type -> id -> percent, rounded

    def add(self, question_id, accuracy: float, **types) -> None:
        """Counts one evaluated question; an id that comes again counts again, and its last percentage is the one shown."""
        percent = round(100 * accuracy, self.decimals)
        self.accuracies.append(accuracy)
        self.per_question[question_id] = percent
        for table, name in types.items():
            self.by_type.setdefault(table, {}).setdefault(name, []).append(accuracy)
            self.questions_by_type.setdefault(table, {}).setdefault(name, {})[question_id] = percent

    def overall(self) -> float:
        """Mean of the unrounded accuracies in percent, rounded."""
        return self._percent(self.accuracies)

    def per_type(self, table: str) -> dict:
        """{type: percent} for the types that occurred, each the mean over its questions."""
        return {name: self._percent(accuracies) for name, accuracies in self.by_type[table].items()}

    def _percent(self, accuracies: list[float]) -> float:
        return round(100 * plain_sum(accuracies) / len(accuracies), self.decimals)  # in the official order of operations
