"""Results in order, whoever made them; never more made beforehand than was said."""

import threading
import time

import pytest

from vlm.prefetching import Prefetcher


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers):
    with Prefetcher(lambda number: number**2, range(50), workers=workers, most=7) as results:
        assert list(results) == [number**2 for number in range(50)]
        assert results.is_over and list(results) == []


@pytest.mark.parametrize(("workers", "beforehand"), [(0, 1), (2, 3)])
def test_items_are_taken_as_results_are(workers, beforehand):
    taken = []
    with Prefetcher(str, (taken.append(number) or number for number in range(20)), workers=workers, most=3) as results:
        assert not results.can_go_on and taken == []  # asking that takes nothing
        for number in range(5):
            assert next(results) == str(number)
            assert len(taken) == number + 1 + beforehand
    assert len(taken) == 5 + beforehand  # nothing more when it is left


def test_without_threads_nothing_is_made_before_it_is_asked_for():
    made = []
    with Prefetcher(made.append, range(5), workers=0, most=3) as results:
        assert not results.is_over and results.can_go_on and made == []
        next(results)
        assert made == [0]


def test_threads_work_while_nobody_asks():
    may_end, began = threading.Event(), threading.Event()

    def make(number):
        began.set()
        assert may_end.wait(20)
        return number

    with Prefetcher(make, range(3), workers=1, most=2) as results:
        assert not results.is_over
        assert began.wait(20) and not results.can_go_on
        may_end.set()
        assert list(results) == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_come_where_the_result_would(workers):
    def items():
        yield from (1, 0, 4)
        raise OSError("the list ends here")

    with Prefetcher(lambda number: 4 / number, items(), workers=workers, most=8) as results:
        assert next(results) == 4
        with pytest.raises(ZeroDivisionError):
            next(results)
        assert next(results) == 1
        with pytest.raises(OSError, match="the list ends here"):
            next(results)
        assert list(results) == []


def test_an_interrupt_is_not_kept_for_later():
    def items():
        yield from range(3)
        raise KeyboardInterrupt

    with Prefetcher(str, items(), workers=1, most=8) as results, pytest.raises(KeyboardInterrupt):
        next(results)


def test_what_is_not_needed_now_is_not_waited_for():
    """Items that come from other threads themselves: pictures that are being opened, for prompts that are prepared from them."""
    may_open = threading.Semaphore(0)

    def opened(number):
        assert may_open.acquire(timeout=20)
        return number

    with Prefetcher(opened, range(6), workers=1, most=6) as pictures, Prefetcher(str, pictures, workers=1, most=4) as prompts:
        may_open.release()
        assert next(prompts) == "0"  # and not the four that there may be
        assert not prompts.can_go_on and prompts.ready_count == 0 and not prompts.is_all_ready
        may_open.release(2)
        assert next(prompts) == "1"
        until = time.monotonic() + 20
        while prompts.ready_count == 0 and time.monotonic() < until:
            prompts.begin()
        assert prompts.ready_count == 1 and prompts.can_go_on
        may_open.release(3)
        assert [*prompts] == ["2", "3", "4", "5"] and prompts.is_over and prompts.is_all_ready


def test_the_end_is_known_where_the_items_know_theirs():
    """The last prompts of an evaluation must not wait for more to come."""
    with Prefetcher(str, range(2), workers=1, most=8) as pictures, Prefetcher(str, pictures, workers=1, most=8) as prompts:
        until = time.monotonic() + 20
        while not prompts.is_all_ready and time.monotonic() < until:
            prompts.begin() if prompts.can_begin else pictures.begin()
        assert prompts.ready_count == 2 and not prompts.can_begin
        assert [*prompts] == ["0", "1"] and prompts.can_go_on


def test_the_leading_results_are_counted():
    doors = [threading.Event() for _ in range(4)]

    def make(number):
        assert doors[number].wait(20)
        return number

    with Prefetcher(make, range(4), workers=4, most=4) as results:
        results.begin()
        doors[1].set()
        assert results.ready_count == 0
        doors[0].set()
        until = time.monotonic() + 20
        while results.ready_count < 2 and time.monotonic() < until:
            time.sleep(0.001)
        assert results.ready_count == 2 and not results.is_all_ready
        doors[2].set()
        doors[3].set()
        assert [*results] == [0, 1, 2, 3]


class Broken:
    """Raises whenever it is asked."""

    def __iter__(self):
        return self

    def __next__(self):
        raise OSError("gone")


def test_items_that_fail_are_not_asked_again():
    with Prefetcher(str, Broken(), workers=1, most=4) as results:
        with pytest.raises(OSError, match="gone"):
            next(results)
        assert results.is_over


@pytest.mark.parametrize("settings", [{"workers": -1, "most": 1}, {"workers": 1, "most": 0}])
def test_settings_check_themselves(settings):
    with pytest.raises(ValueError, match="expected"):
        Prefetcher(str, (), **settings)
