"""Who works: of many threads that wait for something, one at a time does the work for all.

A thread sleeps until what it waits for is there, or until it is its turn to work. Each sleeps by itself: after a step only those are woken
whose answer or next piece of text has come, not the hundred others that a server may have.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Lock

__all__ = ["Turns"]


class _Sleeper:
    """is_ready: what it waits for, or None for the turn itself. has_turn: it was handed the turn."""

    def __init__(self, lock: Lock, is_ready: Callable[[], bool] | None):
        self.is_ready, self.has_turn, self.condition = is_ready, False, Condition(lock)


class Turns:
    """The turn is taken by one thread, or free. What `is_ready` looks at is changed by whoever has the turn, or turns ready by itself."""

    def __init__(self):
        self._lock = Lock()
        self._is_taken = False
        self._sleepers: list[_Sleeper] = []  # in order of their coming

    def wait(self, is_ready: Callable[[], bool], act: Callable[[], None]) -> None:
        """Return when `is_ready()`; until then `act` again and again, or sleep while another thread does. `is_ready` may be asked by other
        threads, and is quick. What `act` raises is raised here; the others go on."""
        while True:
            with self._lock:
                try:
                    while self._is_taken and not is_ready():
                        self._sleep(_Sleeper(self._lock, is_ready))
                except BaseException:  # it may have been woken to go on
                    self._wake_a_worker()
                    raise
                if is_ready():
                    self._wake_a_worker()
                    return
                self._is_taken = True
            try:
                act()
            except BaseException:
                self._release()
                with self._lock:
                    self._wake_a_worker()
                raise
            self._release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else works inside; waits for the one who does."""
        with self._lock:
            if self._is_taken:
                sleeper = _Sleeper(self._lock, None)
                try:
                    while not sleeper.has_turn:
                        self._sleep(sleeper)
                except BaseException:  # Ctrl-C, when the turn may just have been handed over
                    self._is_taken = self._is_taken and not sleeper.has_turn
                    self._wake_a_worker()
                    raise
            self._is_taken = True
        try:
            yield
        finally:
            self._release()
            with self._lock:
                self._wake_a_worker()

    def try_alone(self, act: Callable[[], None]) -> bool:
        """`act` if nobody works at this moment; whether it did."""
        with self._lock:
            if self._is_taken:
                return False
            self._is_taken = True
        try:
            act()
        finally:
            self._release()
            with self._lock:
                self._wake_a_worker()
        return True

    def _sleep(self, sleeper: _Sleeper) -> None:
        self._sleepers.append(sleeper)
        try:
            sleeper.condition.wait()
        finally:
            self._sleepers.remove(sleeper)

    def _release(self) -> None:
        """Give the turn to who waits for it, and wake those who have what they wait for."""
        with self._lock:
            wants = next((sleeper for sleeper in self._sleepers if sleeper.is_ready is None and not sleeper.has_turn), None)
            self._is_taken = wants is not None
            if wants is not None:
                wants.has_turn = True
                wants.condition.notify()
            for sleeper in self._sleepers:
                if sleeper.is_ready is not None and sleeper.is_ready():
                    sleeper.condition.notify()

    def _wake_a_worker(self) -> None:
        """Called by who leaves: somebody has to go on."""
        if not self._is_taken and self._sleepers:
            self._sleepers[0].condition.notify()
