"""From many requests the next ones, prepared: as many as there is room for, and on a GPU by a thread of their own while it computes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..prefetching import Prefetcher
from .prompt import Prompt
from .request import Request
from .ticket import Ticket

__all__ = ["Intake"]

MOST_AHEAD_BYTES = 2**28  # of tiles in the queue
PREPARED_AHEAD, TAKEN_TOGETHER = 48, 32  # prompts that another thread makes while a GPU computes: their tiles come on top of those


class Intake:
    """Use it as a context manager. `prepare`: makes (request, prompt, why there is none) of a request. `open_tickets`: those under way,
    which whoever owns them changes; `most`: how many there may be. `in_thread`: prepare in another thread.

    A sequence is taken in the order that shares most, anything else as it comes."""

    def __init__(self, requests: Iterable[Request], prepare: Callable, open_tickets: dict[int, Ticket], most: int, *, in_thread: bool):
        self._order = by_pictures(requests) if isinstance(requests, Sequence) else None
        given = requests if self._order is None else (requests[index] for index in self._order)
        self._prepared = Prefetcher(prepare, given, workers=int(in_thread), most=PREPARED_AHEAD)
        self._in_thread, self._together = in_thread, TAKEN_TOGETHER if in_thread else 1
        self._open, self._most, self._taken = open_tickets, most, 0

    def __enter__(self) -> "Intake":
        return self

    def __exit__(self, *_) -> None:
        self._prepared.close()

    @property
    def is_over(self) -> bool:
        """No request is left. Waits for the next one where none is at hand."""
        return self._prepared.is_over

    def _waiting(self) -> dict[int, int]:
        """Bytes of tiles that are still to be read; those of a picture count once for all its questions."""
        tiles = (ticket.prompt.pixels for ticket in self._open.values())
        return {id(pixels): pixels.numel() for pixels in tiles if pixels is not None}

    def _has_room(self, waiting: dict[int, int]) -> bool:
        return not self._open or len(self._open) < self._most and sum(waiting.values()) < MOST_AHEAD_BYTES

    @property
    def can_take(self) -> bool:
        """Whether `take` would give something at once. Some are taken together, so that those about one picture are read together. Takes
        nothing itself: it may be asked by any thread."""
        prepared = self._prepared
        enough = prepared.ready_count and (prepared.ready_count >= self._together or prepared.is_all_ready)
        return bool(enough) and self._has_room(self._waiting())

    @property
    def has_news(self) -> bool:
        """Whether it is worth calling `take` now: there is something to take, or to have prepared. As quick, and as harmless."""
        return self._prepared.can_begin or self.can_take

    def take(self) -> Iterator[tuple[int, Request, Prompt, str | None]]:
        """(index, request, prompt, why there is none) while there is room; each belongs into the open ones before the next is asked for.
        On a GPU only what is there is given while some are under way, and the first ones are waited for. A processor waits for all there is
        room for: it has nothing to gain from reading pictures one by one as they are opened."""
        prepared = self._prepared
        prepared.begin()  # has_news is about this too
        waiting = self._waiting()
        needed = self._most if not self._in_thread else 0 if self._open else self._together
        if not needed and not self.can_take:
            return
        while self._has_room(waiting) and (prepared.ready_count or needed > 0 and not prepared.is_over):
            request, prompt, error = next(prepared)
            if prompt.pixels is not None:
                waiting[id(prompt.pixels)] = prompt.pixels.numel()
            yield self._taken if self._order is None else self._order[self._taken], request, prompt, error
            self._taken, needed = self._taken + 1, needed - 1


def by_pictures(requests: Sequence[Request]) -> list[int]:
    """Indices in an order that brings together requests with the same pictures, and puts texts of similar length side by side. Broken
    messages are left where they are; preparing them will say what is wrong."""

    def key(index: int) -> tuple:
        pictures, letters = [], 0
        for message in requests[index].messages if isinstance(requests[index].messages, list) else []:
            content = message.get("content") if isinstance(message, dict) else None
            for part in content if isinstance(content, list) else [content]:
                if isinstance(part, str):
                    letters += len(part)
                elif isinstance(part, dict) and part.get("type") == "text":
                    letters += len(str(part.get("text")))
                elif isinstance(part, dict):
                    source = part.get("image", part.get("image_url", part.get("url", part.get("path"))))
                    pictures.append(str(source) if isinstance(source, str | Path | dict) else id(source))
        return tuple(pictures), letters

    keys = [key(index) for index in range(len(requests))]
    first: dict[tuple, int] = {}
    for index, (pictures, _) in enumerate(keys):
        first.setdefault(pictures, index)
    return sorted(range(len(requests)), key=lambda index: (first[keys[index][0]], keys[index][1]))
