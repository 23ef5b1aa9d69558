"""Who works: of many threads that wait for something, one at a time does the work for all.

A thread sleeps until what it waits for is there, or until it is its turn to work. Each sleeps by itself: after a step only those are woken
whose answer or next piece of text has come, not the hundred others that a server may have.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Lock

__all__ = ["Turns"]

LONGEST_TRY_SECONDS = 0.05


class _Sleeper:
    """who: the call that sleeps. is_ready: what it waits for, or None for the turn itself."""

    def __init__(self, lock: Lock, who: object, is_ready: Callable[[], bool] | None):
        self.who, self.is_ready, self.condition = who, is_ready, Condition(lock)


class Turns:
    """The turn is held by one call, or free. What `is_ready` looks at is changed by whoever has the turn, or turns ready by itself."""

    def __init__(self):
        self._lock = Lock()
        self._holder: object | None = None
        self._sleepers: list[_Sleeper] = []  # in order of their coming

    def wait(self, is_ready: Callable[[], bool], act: Callable[[], None]) -> None:
        """Return when `is_ready()`; until then `act` again and again, or sleep while another thread does. `is_ready` may be asked by other
        threads, and is quick. What `act` raises is raised here; the others go on."""
        me = object()
        try:
            while True:
                with self._lock:
                    while self._holder is not None and not is_ready():
                        self._sleep(_Sleeper(self._lock, me, is_ready))
                    if is_ready():
                        return
                    self._holder = me
                act()
                with self._lock:
                    self._hand_on()
        finally:
            self._leave(me)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else works inside; waits for the one who does."""
        me = object()
        try:
            with self._lock:
                if self._holder is None:
                    self._holder = me
                while self._holder is not me:
                    self._sleep(_Sleeper(self._lock, me, None))
            yield
        finally:
            self._leave(me)

    def try_alone(self, act: Callable[[], None]) -> bool:
        """`act` if nobody works at this moment; whether it did. May be called from anywhere, also by the garbage collector in a thread that
        is inside this very class."""
        if not self._lock.acquire(timeout=LONGEST_TRY_SECONDS):
            return False
        me = object()
        try:
            is_free = self._holder is None
            if is_free:
                self._holder = me
        finally:
            self._lock.release()
        if is_free:
            try:
                act()
            finally:
                self._leave(me)
        return is_free

    def _sleep(self, sleeper: _Sleeper) -> None:
        self._sleepers.append(sleeper)
        try:
            sleeper.condition.wait()
        finally:
            self._sleepers.remove(sleeper)

    def _hand_on(self) -> None:
        """With the lock: the turn to the first who waits for it, or to nobody; and wake those who have what they wait for."""
        wants = next((sleeper for sleeper in self._sleepers if sleeper.is_ready is None), None)
        self._holder = None if wants is None else wants.who
        if wants is not None:
            wants.condition.notify()
        for sleeper in self._sleepers:
            if sleeper.is_ready is not None and sleeper.is_ready():
                sleeper.condition.notify()

    def _wake_who_goes_on(self) -> None:
        """With the lock: whoever was handed the turn in its sleep, or the first of those who wait for something when it is free."""
        for sleeper in self._sleepers:
            if sleeper.who is self._holder or self._holder is None and sleeper.is_ready is not None:
                sleeper.condition.notify()
                return

    def _leave(self, me: object) -> None:
        """How every call ends, an interrupt in its sleep or between two steps included: it holds no turn, and somebody goes on. (A second
        interrupt inside this one is not provided for.)"""
        with self._lock:
            try:
                if self._holder is me:
                    self._hand_on()
            finally:
                self._wake_who_goes_on()
