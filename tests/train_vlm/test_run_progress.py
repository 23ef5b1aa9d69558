"""A run given in minutes ends on time at its final rate, whatever its steps cost; one given in steps does not look at the clock."""

import pytest

from train_vlm.progress import Progress, learning_rate_share


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_a_run_in_minutes_ends_on_time_at_its_final_rate():
    clock, rates, step = Clock(), [], 0
    progress = Progress(None, 1.0, clock=clock)
    while (place := progress.position(step))[0] < place[1]:
        rates.append(learning_rate_share(*place, 0.1, 0.2))
        clock.now += 0.5 if step < 40 else 1.0  # steps become dearer on the way
        step += 1
    assert step == 40 + 40 and clock.now == 160.0
    assert max(rates) == 1.0 and rates[-1] == pytest.approx(0.2, abs=0.01)


def test_the_expected_number_of_steps_follows_the_clock():
    clock = Clock()
    progress = Progress(None, 2.0, clock=clock)
    clock.now += 30.0
    assert progress.expected_steps(10) == 40
    clock.now += 500.0
    assert progress.expected_steps(70) == 70


def test_a_second_start_goes_on_where_the_first_one_stopped():
    clock = Clock()
    progress = Progress(None, 1.0, spent=45.0, clock=clock)
    clock.now += 5.0
    assert progress.position(7) == (50.0, 60.0)


def test_all_ranks_hear_the_first_one():
    progress = Progress(None, 1.0, clock=Clock(), share=lambda seconds: 12.0)
    assert progress.position(0) == (12.0, 60.0)


def test_a_run_in_steps_ignores_the_clock():
    clock = Clock()
    progress = Progress(5, None, clock=clock)
    clock.now += 1e6
    assert progress.position(3) == (3, 5) and progress.expected_steps(3) == 5
