"""Who is decoded when: requests wait in order, join the running batch as others end, and leave it when they are over.

One step admits whom memory and rows allow, reads their prompts, and gives every running request one more token; a prompt too long for one
step is read over several. It is called by one thread at a time (engine.py sees to that) and never waits for anything.
"""

from collections import deque

import numpy as np
import torch
from torch import Tensor

from ..decoder.serving import ServingDecoder
from ..decoder.slots import Slots
from .memory import StateCost, rounded_span
from .prefill import Prefill
from .sampling import choose_tokens, told_logprobs
from .ticket import Ticket
from .wave import Wave, by_id, shared_prefix_tokens

__all__ = ["Scheduler"]

TOKENS_A_STEP = {"cpu": 16384, "cuda": 65536}  # prompt tokens read in one step: how long those who run stand still


def _said_by(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Scheduler:
    """most_rows: requests decoded together; budget_bytes: of their state."""

    def __init__(self, decoder: ServingDecoder, prefill: Prefill, most_rows: int, budget_bytes: int, graphs=None):
        self.decoder, self.prefill, self.graphs = decoder, prefill, graphs
        self.most_rows, self.budget_bytes = most_rows, budget_bytes
        on_processor = decoder.weight.device.type == "cpu"
        self.cost = StateCost.of(decoder.language_model.config, decoder.weight.dtype, with_tails=on_processor)
        self.arrivals: deque[Ticket] = deque()  # any thread may append here; the others belong to the one that steps
        self.waiting: deque[Ticket] = deque()
        self.running: list[Ticket] = []  # the ticket at place i owns row i
        self.slots = None
        self.steps = 0

    @property
    def is_idle(self) -> bool:
        return not (self.arrivals or self.waiting or self.running)

    def refusal(self, ticket: Ticket) -> str | None:
        """Why this request can never be answered, or None."""
        # Prefixes are shared where there is room for their states; a request alone needs none.
        forks = Wave([ticket]).forks
        need = self.cost.bytes(1 + forks, rounded_span(ticket.most_tokens))
        if need <= self.budget_bytes:
            return None
        room = max(0, self.budget_bytes - self.cost.bytes(1 + forks, 0)) // max((1 + forks) * self.cost.token_bytes, 1)
        return (
            f"prompt and answer may take {ticket.most_tokens} tokens, {need / 1e6:.1f} MB of state; the engine has "
            f"{self.budget_bytes / 1e6:.1f} MB (some {room} tokens): ask for fewer new tokens or give the engine more memory_bytes"
        )

    def _need(self, rows: int, span: int, wave: Wave, held: dict[int, Slots] | None = None) -> int:
        """Bytes of the batch, of what it goes on from (`held`, where that is known), and of what reading the prompts of `wave` holds beside
        it: prompts begun, shared prefixes, and forks to score texts."""
        longest = rounded_span(wave.longest_tokens) if span else 0
        beside = self.cost.bytes(wave.families + wave.forks, longest)
        return self.cost.bytes(rows, span) + beside + self._held_bytes(wave, held)

    def _held(self) -> dict[int, Slots]:
        """The common states that running rows go on from."""
        common = [] if self.slots is None else self.slots.common[: len(self.running)]
        return by_id(each.source for each in common if each is not None)

    def _held_bytes(self, wave: Wave, held: dict[int, Slots] | None = None) -> int:
        """Of those, and of what `wave` has begun to read."""
        states = (self._held() if held is None else held) | wave.begun
        return sum(state.size_bytes() for state in states.values())

    @torch.inference_mode()
    def sweep(self) -> None:
        """Take in what arrived, and out what was cancelled."""
        while self.arrivals:
            self.waiting.append(self.arrivals.popleft())
        for ticket in [ticket for ticket in self.waiting if ticket.is_cancelled]:
            self.waiting.remove(ticket)
            ticket.finish("cancelled")
        for ticket in self.running:
            if ticket.is_cancelled:
                ticket.finish("cancelled")
        self._release()

    @torch.inference_mode()
    def step(self) -> None:
        """Admit, read, and decode one token for each. An error of the model becomes the answer of those it hit."""
        self.steps += 1
        self.sweep()
        if not self._read_on():
            wave = self._admit()
            if wave:
                self._read(wave)
        if self.running:
            self._decode()

    @property
    def _tokens_a_step(self) -> int:
        return TOKENS_A_STEP["cuda" if self.decoder.weight.is_cuda else "cpu"]

    def _read_on(self) -> bool:
        """Read a part of the first prompt in the queue when it is too long for one step; nobody is admitted meanwhile. False: it is not, or
        there is no room for its state twice (its own, and the batch's row that it becomes): then it is read at once."""
        limit = self._tokens_a_step
        if not self.waiting or len(self.waiting[0].prompt) <= limit or len(self.running) == self.most_rows:
            return False
        ticket = self.waiting[0]
        # Half of a step is left to be read with those who share its beginning, which a part must not go beyond.
        left = max(limit // 2, 1)
        if self.prefill.unread(ticket) <= (limit if ticket.begun is None else left):
            return False
        if ticket.begun is None:
            span = max(rounded_span(each.most_tokens) for each in [*self.running, ticket])
            own = self.cost.bytes(1, rounded_span(len(ticket.prompt)))
            if self._need(len(self.running) + 1, span, Wave([ticket])) + own > self.budget_bytes:
                return False
        ticket.admit()
        try:
            self.prefill.read_on(ticket, limit, left)
        except BaseException as error:
            self.waiting.popleft()
            ticket.fail(_said_by(error))
            if not isinstance(error, Exception):
                raise
        return True

    def _admit(self) -> list[Ticket]:
        """Who may join now, in order of arrival. Nobody overtakes: a long request that waits for memory is not starved by short ones."""
        joining = Wave()
        wave, held = joining.tickets, self._held()
        tokens, limit = 0, self._tokens_a_step
        span = max((rounded_span(ticket.most_tokens) for ticket in self.running), default=0)
        for ticket in self.waiting:
            rows = len(self.running) + len(wave) + 1
            is_first = not wave
            known = shared_prefix_tokens(wave[-1], ticket) if wave else ticket.begun.length if ticket.begun else 0
            new = len(ticket.prompt) - known
            wider = max(span, rounded_span(ticket.most_tokens))
            joining.add(ticket)
            too_much = self._need(rows, wider, joining, held) > self.budget_bytes
            if rows > self.most_rows or (not is_first and tokens + new > limit) or (too_much and rows > 1):
                wave.pop()
                break
            tokens, span = tokens + new, wider
        if len(wave) < len(self.waiting) and self.running and len(wave) < self.most_rows // 4 and tokens < limit // 2:
            return []  # many wait and few fit: reading a handful at a time would cost more than it fills
        for ticket in wave:
            self.waiting.popleft()
            ticket.admit()
        if wave and wave[0].begun is not None and self.waiting:
            self.prefill.keep_begun(wave[0], self.waiting[0])
        return wave

    def _read(self, wave: list[Ticket]) -> None:
        rows = list(range(len(self.running), len(self.running) + len(wave)))
        try:
            left = self._reserve(wave)
            logits = self.prefill.read(wave, self.slots, rows, left)
            tokens = self.choose(logits, wave)
        except Exception as error:  # out of memory, a tile that cannot be encoded: the others go on
            self._scrub(rows)
            if len(wave) > 1:
                for ticket in wave:
                    self._read([ticket])
            else:
                wave[0].fail(_said_by(error))
            return
        except BaseException as error:  # Ctrl-C: nobody may wait for these any more
            self._scrub(rows)
            for ticket in wave:
                ticket.fail(_said_by(error))
            raise
        for ticket in wave:
            ticket.prompt.pixels, ticket.begun = None, None  # a caller may hold the ticket for long
        self.running += wave
        self._take(wave, tokens, logits)

    def _scrub(self, rows: list[int]) -> None:
        """Rows that reading has half written."""
        if self.slots is not None:
            self.slots.scrub([row for row in rows if row < self.slots.rows])

    def _reserve(self, wave: list[Ticket]) -> int:
        """Buffers for all that run and `wave`, with room for more where the budget allows; returns the bytes that are left."""
        rows = len(self.running) + len(wave)
        span = max(rounded_span(ticket.most_tokens) for ticket in [*self.running, *wave])
        reading = Wave(wave)
        extra = self._need(0, span, reading)
        for ticket in wave:
            ticket.compared = None  # nobody may be kept alive by the one behind
        roomy = min(1 << (rows - 1).bit_length(), max(self.most_rows, rows))
        if self.slots is not None:
            roomy, longer = max(roomy, self.slots.rows), max(span, self.slots.span)
        else:
            longer = span
        shapes = [(roomy, longer), (rows, longer), (roomy, span), (rows, span)]
        chosen = next((shape for shape in shapes if self.cost.bytes(*shape) + extra <= self.budget_bytes), shapes[-1])
        if self.slots is None:
            self.slots = self.decoder.slots(*chosen, with_tails=True)
        elif chosen != (self.slots.rows, self.slots.span):
            try:
                self.slots.grow(*chosen)
            except BaseException as error:  # out of memory: some layers' buffers are exchanged and some are not
                self._fail_running(error)
                raise
        forks = self.cost.bytes(reading.forks, rounded_span(reading.longest_tokens))
        return self.budget_bytes - self.cost.bytes(*chosen) - self._held_bytes(reading) - forks

    def _decode(self) -> None:
        running = self.running
        counts = self.slots.counts[: len(running)]
        span = max(counts) + 1
        try:
            tokens = torch.tensor([ticket.said[-1] for ticket in running], device=self.decoder.weight.device)
            run = self.decoder.decode if self.graphs is None else self.graphs.decode
            logits = self.prefill.mask(run(tokens, self.slots, span, even=min(counts) == span - 1))
            self.slots.advance(list(range(len(running))), [1] * len(running))
            chosen = self.choose(logits, running)
        except BaseException as error:
            self._fail_running(error)
            if not isinstance(error, Exception):
                raise
            return
        self._take(running, chosen, logits)

    def _fail_running(self, error: BaseException) -> None:
        """Their rows are half written: none of them can go on."""
        for ticket in self.running:
            ticket.fail(_said_by(error))
        self.running = []
        self.slots = None

    def choose(self, logits, tickets):
        """The next token of each; apart so that tests can speak for the model."""
        return choose_tokens(logits, tickets)

    def _take(self, tickets: list[Ticket], tokens: list[int | None], logits: Tensor) -> None:
        try:
            told = told_logprobs(logits, tokens, tickets)
        except Exception as error:  # no memory: those who did not ask for them go on
            told = [None] * len(tickets)
            for ticket in tickets:
                if ticket.request.logprobs is not None:
                    ticket.fail(_said_by(error))
        except BaseException as error:  # Ctrl-C: rows are a token further than what was said
            self._fail_running(error)
            raise
        for ticket, token, words in zip(tickets, tokens, told, strict=True):
            if ticket.answer is None:
                ticket.take(token, words)
        self._release()

    def _release(self) -> None:
        """Free the rows of requests that are over, and close the gaps with the last rows."""
        over = [row for row, ticket in enumerate(self.running) if ticket.answer is not None]
        if not over:
            return
        for row in over:
            if self.running[row].answer.stop_reason == "error":
                self.slots.scrub([row])
            elif self.running[row].keep:
                self._keep(self.running[row], row)
        left = len(self.running) - len(over)
        holes = [row for row in over if row < left]
        movers = [row for row in range(left, len(self.running)) if self.running[row].answer is None]
        self.slots.fork(self.slots, movers, holes)
        for hole, row in zip(holes, movers, strict=True):
            self.running[hole] = self.running[row]
        del self.running[left:]
        self.slots.vacate(range(left, left + len(over)))

    def _keep(self, ticket: Ticket, row: int) -> None:
        """Keep the state behind what was read of the conversation, for its next turn."""
        said = ticket.said[: self.slots.counts[row] - len(ticket.prompt)]
        self.prefill.keep(np.concatenate([ticket.prompt.identity, np.array(said, dtype=np.int64)]), self.slots, row)
