"""The paired bootstrap: against its slow form, and that it draws whole pictures."""

import random

import pytest

from eval_vqa.bootstrap import paired_interval, paired_interval_slow


def test_equals_the_slow_form_up_to_the_draws():
    rng = random.Random(0)
    differences = [rng.choice((-100.0, 0.0, 30.0, 100.0)) for _ in range(80)]
    images = [rng.randrange(30) for _ in differences]
    fast = paired_interval(differences, images, resamples=4000)
    slow = paired_interval_slow(differences, images, resamples=4000)
    assert fast == pytest.approx(slow, abs=2.0)  # the standard error of such a quantile is about half of that


def test_questions_of_one_picture_are_drawn_together():
    """A hundred questions about two pictures are two observations: the interval reaches from one picture's mean to the other's."""
    differences = [100.0] * 50 + [0.0] * 50
    assert paired_interval(differences, ["a"] * 50 + ["b"] * 50) == (0.0, 100.0)
    low, high = paired_interval(differences, list(range(100)))
    assert 35 < low < 45 and 55 < high < 65


def test_the_same_difference_everywhere_is_certain():
    assert paired_interval([5.0] * 10, range(10)) == (5.0, 5.0)


def test_a_seed_gives_the_same_interval():
    differences = [float(number % 7) for number in range(50)]
    assert paired_interval(differences, range(50), seed=3) == paired_interval(differences, range(50), seed=3)


@pytest.mark.parametrize(("differences", "images", "resamples"), [([], [], 10), ([1.0], [], 10), ([1.0], [1], 0)])
def test_nothing_to_draw_from_is_an_error(differences, images, resamples):
    with pytest.raises(ValueError, match="expected"):
        paired_interval(differences, images, resamples=resamples)
