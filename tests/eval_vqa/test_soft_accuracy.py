"""The sum and the mean under every soft accuracy."""

from eval_vqa.soft_accuracy import AccuracyTable, leave_one_out, plain_sum


def test_sums_are_not_compensated():
    """Python 3.12's own sum gives 1.0 here, and rounds some official percentages to the other side of a half."""
    assert plain_sum([0.1] * 10) == 0.9999999999999999


def test_more_than_three_matches_are_no_better_than_three():
    assert leave_one_out([3, 9, 0]) == 2 / 3


def test_a_question_that_comes_again_counts_again_and_shows_its_last_percentage():
    table = AccuracyTable(decimals=2)
    for accuracy in (1.0, 0.5, 0.0):
        table.add("x", accuracy, answer="other")
    assert (table.overall(), table.per_type("answer"), table.per_question) == (50.0, {"other": 50.0}, {"x": 0.0})
