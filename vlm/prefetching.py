"""Work done by threads a little ahead of whoever needs its results: pictures opened and prompts prepared while a device computes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

__all__ = ["Prefetcher"]


class _Begun:
    """One item's result on its way. is_done: asking for it waits for nobody; read without a lock, from any thread."""

    def __init__(self, pool: ThreadPoolExecutor | None, make: Callable[[], object]):
        self.is_done = pool is None
        self.result = make if pool is None else pool.submit(self._make, make).result

    def _make(self, make: Callable[[], object]):
        try:
            return make()
        finally:
            self.is_done = True


class Prefetcher(Iterator):
    """Iterate over it for `make(item)` of each item, in order; use it as a context manager.

    workers: threads that make, of up to `most` items beforehand; with 0 each result is made when it is asked for. Items are taken in the
    thread that asks, and where they say `can_go_on`, as these results do, only one that is needed now is waited for. An error of `make`, or
    of the items themselves, is raised where its result would come. Raises ValueError for numbers that are too small.
    """

    def __init__(self, make: Callable, items: Iterable, *, workers: int, most: int):
        if workers < 0 or most < 1:
            raise ValueError(f"{workers = } and {most = }; expected 0 or more and 1 or more")
        self._make, self._items = make, iter(items)
        self._most = most if workers else 1
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch") if workers else None
        self._begun: deque[_Begun] = deque()
        self._has_more = True

    @property
    def can_begin(self) -> bool:
        """Whether `begin` would take something. As `ready_count`, this takes and waits for nothing, so it is for those who hold a lock."""
        return self._has_more and len(self._begun) < self._most and getattr(self._items, "can_go_on", True)

    def begin(self) -> None:
        """Take as many items as can be taken without waiting, and have them made."""
        while self.can_begin:
            self._begin_one()

    def _begin_one(self) -> None:
        try:
            item = next(self._items)
        except StopIteration:
            self._has_more = False
        except Exception as error:  # after those that came before it
            self._has_more = False
            self._begun.append(_Begun(None, lambda error=error: _raise(error)))
        else:
            self._begun.append(_Begun(self._pool, lambda: self._make(item)))

    @property
    def is_over(self) -> bool:
        """Nothing is left. Waits for an item where none is begun."""
        if not self._begun and self._has_more:
            self._begin_one()
        self.begin()
        return not self._begun

    @property
    def ready_count(self) -> int:
        """So many results can be had without waiting for another thread."""
        return next((place for place, begun in enumerate(self._begun) if not begun.is_done), len(self._begun))

    @property
    def can_go_on(self) -> bool:
        """`next` waits for no other thread: a result is ready, or nothing is left."""
        return self._begun[0].is_done if self._begun else not self._has_more

    @property
    def is_all_ready(self) -> bool:
        """The results that are ready are the last ones."""
        return not self._has_more and self.ready_count == len(self._begun)

    def __next__(self):
        if self.is_over:
            raise StopIteration
        first = self._begun.popleft()
        self.begin()
        return first.result()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Begin nothing more, and wait for what the threads are at."""
        self._has_more = False
        self._begun.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _raise(error: Exception):
    raise error
