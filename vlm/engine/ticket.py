"""A request on its way: what it has said, whether it is over, and the handle by which its caller waits, reads along or cancels."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..decoder.slots import Slots
from ..thinking import THINK_OPEN, decode_answer
from .prompt import Prompt
from .request import Answer, Request, TokenLogprobs

__all__ = ["Begun", "Ticket"]


@dataclass
class Begun:
    """A long prompt that is read over several steps. state: one row that has read `length` tokens; wanted: lengths at which a copy of it is
    kept; shared: tokens it found read."""

    state: Slots
    length: int
    wanted: tuple[int, ...]
    shared: int


class Ticket:
    """Made by `Engine.submit`. Iterate over it for pieces of text as they come; `result()` waits for the Answer; `cancel()` ends it.

    The engine works while somebody waits for something: a ticket nobody waits for goes on when another one is waited for.
    """

    def __init__(self, request: Request, prompt: Prompt, tokenizer, end_id: int, *, keep: bool, opened: bool = False):
        self.request, self.prompt, self.keep = request, prompt, keep
        self.said: list[int] = []
        self.text = ""
        self.scores: dict[str, float] | None = None
        self.logprobs: list[TokenLogprobs] | None = None if request.logprobs is None else []
        self.answer: Answer | None = None
        self.is_cancelled = False
        self.shared_tokens = 0
        self.begun: Begun | None = None
        self.compared: tuple[Ticket, int] | None = None  # the ticket before it in the queue, and the length of their common prefix
        self.generator = None
        if request.temperature > 0:
            seed = request.seed if request.seed is not None else int(torch.randint(2**31, ()))
            self.generator = torch.Generator().manual_seed(seed % 2**63)
        self._tokenizer, self._opened = tokenizer, opened  # opened: the prompt ends inside the thoughts
        self._end_id = end_id
        self._is_read_along = False
        self._submitted, self._admitted, self._first = time.monotonic(), None, None
        self._wait: Callable[[Callable[[], bool]], None] | None = None  # the engine's, set by submit
        self._sweep: Callable[[], None] | None = None

    # What the caller does.

    def result(self) -> Answer:
        """Wait for the answer. Never raises for a failing request: see `Answer.error`."""
        if self.answer is None:
            self._wait(lambda: self.answer is not None)
        return self.answer

    def cancel(self) -> None:
        """End the request now, with what it has said so far; nothing happens when it is over."""
        self.is_cancelled = True
        self._sweep()

    def __iter__(self) -> Iterator[str]:
        """Pieces of the answer's text; joined they are the answer's text. Leaving the loop early does not cancel."""
        self._is_read_along = True  # from the next token on, `text` is kept up to date
        sent = 0
        while True:
            self._wait(lambda sent=sent: self.answer is not None or self._ready_length() > sent)
            ready = len(self.text) if self.answer is not None else self._ready_length()
            if ready > sent:
                yield self.text[sent:ready]
                sent = ready
            elif self.answer is not None:
                return

    def _ready_length(self) -> int:
        """Length of the text that no further token can change: an unfinished character ends in the replacement mark, and what may be the
        beginning of a stop text is held back."""
        text = self.text
        length = len(text.rstrip("\ufffd"))
        for stop in self.request.stop:
            for size in range(min(len(stop) - 1, length), 0, -1):
                if text[:length].endswith(stop[:size]):
                    length -= size
                    break
        return length

    # What the scheduler does.

    def admit(self) -> None:
        self._admitted = self._admitted or time.monotonic()

    def take(self, token: int | None, told: TokenLogprobs | None = None) -> bool:
        """Add a token, and what is told of it; True when the request is over. None: the model gave no numbers."""
        self._first = self._first or time.monotonic()
        if token is None:
            return self.fail("the model gave numbers that are not finite; check its weights and dtype")
        if token == self._end_id:
            return self.finish("end")
        self.said.append(token)
        if told is not None:
            self.logprobs.append(told)
        if self.request.stop or self._is_read_along:
            text = self._decoded()
            ends = [text.index(stop) for stop in self.request.stop if stop and stop in text]
            self.text = text[: min(ends)] if ends else text  # set once: somebody may be reading along in another thread
            if ends:
                return self.finish("stop")
        return len(self.said) >= self.request.max_new_tokens and self.finish("length")

    def _decoded(self) -> str:
        if self._opened:
            return THINK_OPEN + decode_answer(self._tokenizer, self.said)
        return self._tokenizer.decode(self.said, skip_special_tokens=True) if self.said else ""

    def fail(self, error: str) -> bool:
        return self.finish("error", error)

    def finish(self, stop_reason: str, error: str | None = None) -> bool:
        if stop_reason == "error":
            self.text = ""
        elif stop_reason != "stop":
            self.text = self._decoded()
        self.begun = None
        now = time.monotonic()
        admitted = self._admitted or now
        self.answer = Answer(
            self.text,
            stop_reason,
            len(self.prompt),
            self.prompt.visual_tokens,
            len(self.said),
            now - admitted,
            error,
            tokens=tuple(self.said),
            scores=self.scores,
            shared_tokens=self.shared_tokens,
            waited_seconds=admitted - self._submitted,
            first_token_seconds=(self._first or now) - admitted,
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
        )
        return True

    @property
    def most_tokens(self) -> int:
        """Slots it may need at most. The last token said is never read."""
        return len(self.prompt) + self.request.max_new_tokens - 1
