"""Between an event loop and the engine: requests are handed over, and waited for, in threads."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["Desk"]


class Desk:
    """Hands requests to the engine and waits for them in threads, for an event loop that must not stand still."""

    def __init__(self, engine, most_open: int):
        self.engine, self.most_open = engine, most_open
        self.tickets: set = set()
        self._places = 0
        self._threads = ThreadPoolExecutor(max_workers=most_open, thread_name_prefix="answer")

    async def submit(self, requests: Sequence) -> list:
        """Tickets of the requests. Raises ProtocolError: 429 when too many are open, 400 for what the engine refuses."""
        from demo.openai_protocol import ProtocolError

        if self._places + len(requests) > self.most_open:
            raise ProtocolError(429, f"{self._places} answers are open and at most {self.most_open} may be; try again later",
                                type="rate_limit_error", code="rate_limit_exceeded")  # fmt: skip
        self._places += len(requests)
        tickets = []
        try:
            for request in requests:  # in a thread: pictures are tiled here
                tickets.append(await asyncio.to_thread(self.engine.submit, request))
                self.tickets.add(tickets[-1])
                if tickets[-1].answer is not None and tickets[-1].answer.error is not None:
                    raise ProtocolError(400, tickets[-1].answer.error)
        except BaseException:
            self.leave(tickets, len(requests))
            raise
        return tickets

    def leave(self, tickets: Sequence, places: int | None = None) -> None:
        """Nobody waits for these any more: what is not over ends now."""
        self._places -= len(tickets) if places is None else places
        for ticket in tickets:
            self.tickets.discard(ticket)
            ticket.cancel()

    def results(self, tickets: Sequence) -> asyncio.Future:
        """The answers, once all are there."""
        return asyncio.get_running_loop().run_in_executor(self._threads, lambda: [ticket.result() for ticket in tickets])

    def read_along(self, tickets: Sequence) -> asyncio.Queue:
        """(place, piece of text), (place, Answer) at the end of each, or (place, exception)."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def read(place: int, ticket) -> None:
            def put(item) -> None:
                loop.call_soon_threadsafe(queue.put_nowait, (place, item))

            try:
                for piece in ticket:
                    put(piece)
                put(ticket.answer)
            except Exception as error:
                put(error)

        for place, ticket in enumerate(tickets):
            self._threads.submit(read, place, ticket)
        return queue

    def close(self) -> None:
        for ticket in list(self.tickets):
            ticket.cancel()
        self._threads.shutdown()
