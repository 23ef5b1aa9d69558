"""One works for all, nobody is forgotten, and nobody is woken for nothing."""

import random
import threading
import time

import pytest

import vlm.engine.turns as turns_file
from vlm.engine.turns import Turns

LIMIT = 5  # seconds, of a test that would otherwise stand still


class Work:
    """Counts steps, and that no two are made at once."""

    def __init__(self, pause=0.0):
        self.steps, self.inside, self.pause = 0, 0, pause

    def act(self):
        self.inside += 1
        assert self.inside == 1
        time.sleep(self.pause)
        self.steps += 1
        self.inside -= 1


def run_all(*functions):
    """Each in a thread of its own; raises what they raise."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in threads)
    return errors


def test_many_wait_and_each_gets_what_it_waits_for():
    """Threads wait for step numbers, again and again; some want the turn for themselves meanwhile."""
    turns, work = Turns(), Work()

    def waiter(seed):
        generator = random.Random(seed)
        for _ in range(60):
            wanted = work.steps + generator.randint(0, 5)
            turns.wait(lambda wanted=wanted: work.steps >= wanted, work.act)
            assert work.steps >= wanted

    def loner():
        for _ in range(40):
            with turns.alone():
                work.act()
            turns.try_alone(work.act)

    assert run_all(*(lambda seed=seed: waiter(seed) for seed in range(12)), loner, loner) == []
    assert work.steps >= 80 and turns._holder is None and turns._sleepers == []


def test_only_those_are_woken_who_have_something(monkeypatch):
    """A hundred open streams must not be woken at every token of one."""
    woken, ready = [], threading.Barrier(13)

    class Counting(threading.Condition):
        def wait(self, timeout=None):
            found = super().wait(timeout)
            woken.append(threading.current_thread())
            return found

    monkeypatch.setattr(turns_file, "Condition", Counting)
    turns, work = Turns(), Work(pause=0.002)

    def waiter(wanted):
        ready.wait()
        turns.wait(lambda: work.steps >= wanted, work.act)

    assert run_all(*(lambda wanted=wanted: waiter(wanted) for wanted in [200] * 12 + [100])) == []
    assert work.steps == 200 and len(woken) <= 3 * 13


def test_who_wants_the_turn_gets_it_from_one_who_works_on():
    turns, work, done = Turns(), Work(pause=0.002), []

    def loner():
        until = time.monotonic() + LIMIT
        while turns._holder is None and time.monotonic() < until:
            time.sleep(0.0001)
        with turns.alone():
            done.append("alone")

    assert run_all(lambda: turns.wait(lambda: bool(done), work.act), loner) == []


def test_the_work_of_one_who_leaves_is_taken_over():
    turns, work = Turns(), Work(pause=0.002)
    assert run_all(*(lambda wanted=wanted: turns.wait(lambda: work.steps >= wanted, work.act) for wanted in (3, 60, 9, 30))) == []
    assert work.steps == 60


def test_an_error_hits_who_worked_and_the_others_go_on():
    turns, work, failed = Turns(), Work(pause=0.002), []

    def act():
        work.act()
        if work.steps == 20 and not failed:
            failed.append(threading.current_thread())
            raise KeyboardInterrupt

    errors = run_all(*(lambda: turns.wait(lambda: work.steps >= 50, act) for _ in range(4)))
    assert [type(error) for error in errors] == [KeyboardInterrupt]
    assert work.steps == 50 and turns._holder is None


@pytest.mark.parametrize("alone", [False, True])
def test_who_is_interrupted_in_its_sleep_hands_the_turn_on(monkeypatch, alone):
    """Ctrl-C when it was just woken to work, or had just been handed the turn."""
    interrupted = []

    class Interrupted(threading.Condition):
        def wait(self, timeout=None):
            super().wait(timeout)
            if threading.current_thread().name == "unlucky":
                interrupted.append(True)
                raise KeyboardInterrupt

    monkeypatch.setattr(turns_file, "Condition", Interrupted)
    turns, may_end = Turns(), threading.Event()
    done, errors = [], []

    def unlucky():
        try:
            if alone:
                with turns.alone():
                    done.append("unlucky")
            else:
                turns.wait(lambda: False, lambda: None)
        except KeyboardInterrupt as error:
            errors.append(error)

    first = threading.Thread(target=lambda: turns.try_alone(lambda: may_end.wait(LIMIT)), daemon=True)
    second = threading.Thread(target=unlucky, name="unlucky", daemon=True)
    third = threading.Thread(target=lambda: turns.wait(lambda: bool(done), lambda: done.append("third")), daemon=True)
    for number, thread in enumerate((first, second, third)):
        thread.start()
        until = time.monotonic() + LIMIT
        while (turns._holder is None or len(turns._sleepers) < number) and time.monotonic() < until:
            time.sleep(0.001)
    may_end.set()
    for thread in (first, second, third):
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert interrupted and len(errors) == 1 and done == ["third"]


@pytest.mark.parametrize("place", range(6))
def test_an_interrupt_between_two_steps_leaves_the_turn_to_others(place):
    """Wherever Ctrl-C finds who works - here at the asking after its own step - the sleeping ones go on."""
    turns, work, asked = Turns(), Work(pause=0.002), []
    interrupted, until = threading.Event(), time.monotonic() + LIMIT

    def act():
        while len(turns._sleepers) < 2 and time.monotonic() < until:  # the first one keeps the turn until both others sleep
            time.sleep(0.001)
        work.act()

    def is_ready():
        if threading.current_thread().name == "unlucky":
            asked.append(1)
            if len(asked) == 2 + place:
                interrupted.set()
                raise KeyboardInterrupt
        return False

    def unlucky():
        with pytest.raises(KeyboardInterrupt):
            turns.wait(is_ready, act)

    def other():
        turns.wait(lambda: interrupted.is_set() and work.steps >= 20, work.act)

    first = threading.Thread(target=unlucky, name="unlucky", daemon=True)
    first.start()
    while turns._holder is None and time.monotonic() < until:
        time.sleep(0.001)
    assert run_all(other, other) == []
    first.join(LIMIT)
    assert not first.is_alive() and turns._holder is None and turns._sleepers == []


def test_two_wait_for_the_turn_and_the_first_is_interrupted(monkeypatch):
    """The turn was handed to it when Ctrl-C came: the second has it then, and after it the one who works."""
    unlucky = []

    class Interrupted(threading.Condition):
        def wait(self, timeout=None):
            super().wait(timeout)
            if threading.current_thread().name == "unlucky" and not unlucky:
                unlucky.append(True)
                raise KeyboardInterrupt

    monkeypatch.setattr(turns_file, "Condition", Interrupted)
    turns, may_end, done = Turns(), threading.Event(), []

    def loner():
        try:
            with turns.alone():
                done.append("alone")
        except KeyboardInterrupt:
            done.append("interrupted")

    threads = [
        threading.Thread(target=lambda: turns.try_alone(lambda: may_end.wait(LIMIT)), daemon=True),
        threading.Thread(target=loner, name="unlucky", daemon=True),
        threading.Thread(target=loner, daemon=True),
        threading.Thread(target=lambda: turns.wait(lambda: "worked" in done, lambda: done.append("worked")), daemon=True),
    ]
    for number, thread in enumerate(threads):
        thread.start()
        until = time.monotonic() + LIMIT
        while (turns._holder is None or len(turns._sleepers) < number) and time.monotonic() < until:
            time.sleep(0.001)
    may_end.set()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert sorted(done) == ["alone", "interrupted", "worked"] and turns._holder is None


def test_who_is_called_inside_the_lock_gives_up_soon():
    """A stream that nobody holds is closed by the garbage collector, in whatever thread and place that runs."""
    turns = Turns()
    with turns._lock:
        assert turns.try_alone(lambda: pytest.fail("never")) is False


def test_whoever_finds_the_turn_taken_does_nothing():
    turns = Turns()
    with turns.alone():
        assert turns.try_alone(lambda: pytest.fail("the turn was taken")) is False
    seen = []
    assert turns.try_alone(lambda: seen.append(1)) is True and seen == [1]
