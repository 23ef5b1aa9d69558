"""Answer requests: the one path for evaluation, demo and server.

Any number of threads may ask at once; their requests are decoded together. There is no thread of the engine's own: whoever waits for
something does the next step for all, so nothing runs behind the caller's back, and a generator that nobody reads holds nothing up.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ..checkpoint import load_model
from ..decoder.serving import ServingDecoder
from ..golden import guard
from ..modeling import VisionLanguageModel
from ..processing import VLMProcessor
from .allocation import keep_freed_memory
from .decode_graphs import DecodeGraphs
from .intake import Intake
from .kept_states import KeptStates
from .memory import default_budget_bytes
from .prefill import Prefill
from .prompt import Prompt, Prompter
from .quantization import quantize_decoder
from .request import Answer, Request
from .scheduler import Scheduler
from .self_check import check_forked_answer
from .ticket import Ticket
from .turns import Turns

__all__ = ["Engine"]

DEFAULT_MAX_BATCH = 128  # measured: docs/decisions.md
KEPT_SHARE = 4  # a quarter of the memory is for states of prefixes and of conversations that may go on


class Engine:
    """Answers with one model.

    max_batch: most requests decoded together. max_tokens: longest prompt; tiles are reduced to fit. memory_bytes: for generation state, a
    quarter of it for kept prefixes (None: a quarter of what is free); requests wait while it is full. packed_bytes: on a CPU, for a second
    copy of weights, laid out as products like best (None: up to an eighth of what is free; 0: none). quantize: None or "int8" (torchao,
    weights of the decoder only; the model given is changed). self_check: compare a forked answer with a full recompute now.

    Raises ValueError for settings that cannot work, RuntimeError when the self-check fails. The weights must not change while it is used.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: VLMProcessor,
        max_batch: int = DEFAULT_MAX_BATCH,
        max_tokens: int | None = None,
        *,
        memory_bytes: int | None = None,
        packed_bytes: int | None = None,
        quantize: str | None = None,
        self_check: bool = True,
    ):
        if max_batch < 1:
            raise ValueError(f"{max_batch = }; expected at least 1")
        if memory_bytes is not None and memory_bytes < 1:
            raise ValueError(f"{memory_bytes = }; expected at least 1, or None for a quarter of the free memory")
        if packed_bytes is not None and packed_bytes < 0:
            raise ValueError(f"{packed_bytes = }; expected 0 or more, or None for up to an eighth of the free memory")
        self.model, self.processor = model.eval(), processor
        self.max_batch, self.max_tokens = max_batch, max_tokens
        self.golden_note = "golden pack: not looked at"  # from_pretrained looks
        self.device = next(model.parameters()).device
        if self.device.type == "cpu":
            keep_freed_memory()
        if quantize is not None:
            quantize_decoder(model.language_model, quantize)
        self.memory_bytes = memory_bytes or default_budget_bytes(self.device)
        packed_bytes = default_budget_bytes(self.device) // 2 if packed_bytes is None else packed_bytes
        decoder = ServingDecoder(model.language_model, packed_bytes)
        self._packed = decoder.packed
        self.kept = KeptStates(self.memory_bytes // KEPT_SHARE)
        self._prompter = Prompter(processor, model.config.image_token_id)
        reading = Prefill(model, processor, decoder, self.kept)
        graphs = DecodeGraphs(decoder) if self.device.type == "cuda" else None
        self._scheduler = Scheduler(decoder, reading, max_batch, self.memory_bytes - self.kept.most_bytes, graphs)
        self._turns = Turns()
        if self_check:
            check_forked_answer(model, processor, decoder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device=None, dtype=None, on_drift: str = "refuse", **settings) -> "Engine":
        """Opens a model folder and compares it with its golden pack (vlm/golden); `golden_note` then says what was found.

        on_drift: "refuse", "warn" or "ignore". Raises FileNotFoundError / ValueError as `load_model`, ValueError when it drifted."""
        model, processor = load_model(folder, dtype=dtype, device=device)
        note = guard(model, processor, folder, on_drift)
        engine = cls(model, processor, **settings)
        engine.golden_note = note
        return engine

    def generate(self, requests: Iterable[Request], on_answer: Callable[[int, Answer], None] | None = None) -> list[Answer]:
        """Answers in request order; `on_answer(index, answer)` is called, in this thread, as each one is done. A failing request becomes an
        Answer with `error`; the others go on. When it is left by an exception, what was still running is cancelled.

        A sequence is worked through in the order that shares most. Of anything else requests are taken one after the other as there is
        room, in this thread, and their pictures are let go of once they are tiled, but for a few that may be asked about again: it may be
        longer than memory."""
        answers: dict[int, Answer] = {}
        open_tickets: dict[int, Ticket] = {}
        self._prompter.forget()
        try:
            with Intake(requests, self._prepare, open_tickets, 2 * self.max_batch, in_thread=self.device.type == "cuda") as intake:
                while open_tickets or not intake.is_over:
                    # 1. Keep enough requests in the queue, so that the batch stays full and shared pictures are seen.
                    for index, request, prompt, error in intake.take():
                        open_tickets[index] = self._enqueue(request, prompt, error, keep=False)
                    # 2. Wait for some of them, or for more to ask.
                    self._wait(lambda: any(ticket.answer is not None for ticket in open_tickets.values()) or intake.has_news)
                    for index in [index for index, ticket in open_tickets.items() if ticket.answer is not None]:
                        answers[index] = open_tickets.pop(index).answer
                        if on_answer is not None:
                            on_answer(index, answers[index])
        finally:
            for ticket in open_tickets.values():
                ticket.cancel()
            self._prompter.forget()
        return [answers[index] for index in range(len(answers))]

    def stream(self, request: Request) -> Iterator[str]:
        """Pieces of the answer's text as they come; closing the iterator cancels the request. Raises ValueError when there is no answer."""
        ticket = self.submit(request)
        try:
            yield from ticket
        finally:
            ticket.cancel()
        if ticket.answer.error is not None:
            raise ValueError(ticket.answer.error)

    def submit(self, request: Request, *, keep: bool = True) -> Ticket:
        """Put a request in the queue and return at once. `keep`: the state at its end is kept, for the conversation to go on from."""
        self._prompter.forget()
        _, prompt, error = self._prepare(request)
        return self._enqueue(request, prompt, error, keep=keep)

    def _prepare(self, request: Request) -> tuple[Request, Prompt, str | None]:
        """(the request without its messages, whose pictures nobody needs any more; its prompt; why there is none). By any thread."""
        try:
            prompt, error = self._prompter.prepare(request.messages, self.max_tokens, request.thinking), None
        except (ValueError, OSError) as found:
            prompt, error = self._prompter.empty(), str(found)
        return replace(request, messages=[]), prompt, error

    def _enqueue(self, request: Request, prompt: Prompt, error: str | None, *, keep: bool) -> Ticket:
        renderer = self.processor.renderer
        ticket = Ticket(
            request,
            prompt,
            self.processor.tokenizer,
            renderer.end_of_turn_id,
            keep=keep,
            opened=renderer.chat_format.starts_thinking(request.thinking),
        )
        ticket._wait, ticket._sweep = self._wait, self._sweep
        error = error or self._scheduler.refusal(ticket)
        if error is not None:
            ticket.fail(error)
        else:
            self._scheduler.arrivals.append(ticket)
        return ticket

    def step(self) -> bool:
        """One step for all that is under way, for callers with a loop of their own; False when there is nothing to do."""
        with self._turns.alone():
            if self._scheduler.is_idle:
                return False
            self._scheduler.step()
            return True

    def _wait(self, is_ready: Callable[[], bool]) -> None:
        """Return when `is_ready()`; until then do steps, or wait while another thread does them."""
        self._turns.wait(is_ready, self._work)

    def _work(self) -> None:
        if self._scheduler.is_idle:
            raise RuntimeError("the engine has nothing to do, and yet a request waits: a fault of the engine; please report it")
        self._scheduler.step()

    def _sweep(self) -> None:
        """Take cancelled requests out now if nobody is stepping; else the next step does."""
        self._turns.try_alone(self._scheduler.sweep)

    def forget(self) -> None:
        """Drop every kept state and packed weight: after a change of the weights. Waits for a step under way, which may be reading them."""
        with self._turns.alone():
            self.kept.clear()
            self._packed.forget()
