"""Work done by threads a little ahead of whoever needs its results: pictures opened and prompts prepared while a device computes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["Ahead"]


class Ahead(Iterator):
    """Iterate over it for `make(item)` of each item, in order; use it as a context manager.

    workers: threads that make, of up to `most` items beforehand; with 0 each result is made when it is asked for. Items are taken in the
    thread that asks, and where they say `can_go_on`, as these results do, only one that is needed now is waited for. An error of `make`, or
    of the items themselves, is raised where its result would come.
    """

    def __init__(self, make: Callable, items: Iterable, *, workers: int, most: int):
        if workers < 0 or most < 1:
            raise ValueError(f"{workers = } and {most = }; expected 0 or more and 1 or more")
        self._make, self._items = make, iter(items)
        self._most = most if workers else 1
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="ahead") if workers else None
        self._begun: deque[Callable | Future] = deque()
        self._has_more = True

    def begin(self) -> None:
        """Take as many items as can be taken without waiting, and have them made."""
        while self._has_more and len(self._begun) < self._most and getattr(self._items, "can_go_on", True):
            self._begin_one()

    def _begin_one(self) -> None:
        try:
            item = next(self._items)
        except StopIteration:
            self._has_more = False
        except Exception as error:  # after those that came before it
            self._has_more = False
            failed: Future = Future()
            failed.set_exception(error)
            self._begun.append(failed)
        else:
            self._begun.append(self._pool.submit(self._make, item) if self._pool else lambda: self._make(item))

    @property
    def is_over(self) -> bool:
        """Nothing is left. Waits for an item where none is begun."""
        if not self._begun and self._has_more:
            self._begin_one()
        self.begin()
        return not self._begun

    @property
    def ready(self) -> int:
        """So many results wait for no other thread. Takes no items, so it is for those who hold a lock."""
        count = 0
        for begun in self._begun:
            if isinstance(begun, Future) and not begun.done():
                break
            count += 1
        return count

    @property
    def can_go_on(self) -> bool:
        """The next result is one of those."""
        return self.ready > 0

    @property
    def is_all_ready(self) -> bool:
        """And nothing comes behind them, as far as is known."""
        return not self._has_more and self.ready == len(self._begun)

    def __next__(self):
        if self.is_over:
            raise StopIteration
        first = self._begun.popleft()
        self.begin()
        return first.result() if isinstance(first, Future) else first()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_) -> None:
        self._has_more = False
        self._begun.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
