"""Answer requests: the one path for evaluation, demo and server.

Requests that show the same pictures share the work on them: encoder and prefill run once per distinct prefix (system text, earlier turns,
images), the state after it - convolution window, SSM state, keys and values - is copied for each question, and all questions of a batch are
decoded together. Rows are padded on the right, where a time step of 0 and a mask make the padding invisible, so that a batched answer is
the single one.

Letters: B rows, T positions, N tiles.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .checkpoint import load_model
from .decoder.layers import run_layers
from .decoder.layout import Layout
from .decoder.state import DecoderState
from .modeling import VisionLanguageModel
from .processing import Prepared, VLMProcessor
from .rendering import normalize_messages

__all__ = ["Answer", "Engine", "Request"]


@dataclass(frozen=True)
class Request:
    """One question. messages: OpenAI-style; images as paths or Pillow images. temperature 0 is greedy; stop: texts that end the answer."""

    messages: list
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:  # so written, NaN is refused too
            raise ValueError(f"temperature is {self.temperature} and top_p {self.top_p}; expected temperature >= 0 and 0 < top_p <= 1")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))


@dataclass(frozen=True)
class Answer:
    """text; stop_reason: "end" (end of turn), "length", "stop" or "error"; token counts; seconds from the start of its batch to its end;
    error: why there is no answer."""

    text: str
    stop_reason: str
    prompt_tokens: int = 0
    visual_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None


@dataclass
class _Row:
    """A request on its way: its place in the caller's list, its tokens before and after the shared prefix, and what it has said."""

    index: int
    request: Request
    prepared: Prepared
    said: list[int]
    generator: torch.Generator | None
    text: str = ""
    stop_reason: str = ""

    @property
    def prefix(self) -> list[int]:
        return self.prepared.rendered.input_ids[: self.prepared.rendered.prefix_tokens]

    @property
    def rest(self) -> list[int]:
        return self.prepared.rendered.input_ids[self.prepared.rendered.prefix_tokens :]


class Engine:
    """Answers with one model. `max_batch`: most requests decoded together; `max_tokens`: longest prompt, tiles are reduced to fit.

    Calls from several threads are taken one after the other.
    """

    def __init__(self, model: VisionLanguageModel, processor: VLMProcessor, max_batch: int = 64, max_tokens: int | None = None):
        if max_batch < 1:
            raise ValueError(f"{max_batch = }; expected at least 1")
        self.model, self.processor = model.eval(), processor
        self.max_batch, self.max_tokens = max_batch, max_tokens
        self.device = next(model.parameters()).device
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device=None, dtype=None, **settings) -> "Engine":
        """Raises FileNotFoundError / ValueError as `load_model`."""
        model, processor = load_model(folder, dtype=dtype, device=device)
        return cls(model, processor, **settings)

    def generate(self, requests: list[Request], on_answer: Callable[[int, Answer], None] | None = None) -> list[Answer]:
        """Answers in request order; `on_answer(index, answer)` is called as each one is done. A failing request becomes an Answer with
        `error`; the others go on."""
        answers: list[Answer | None] = [None] * len(requests)

        def done(index: int, answer: Answer) -> None:
            answers[index] = answer
            if on_answer is not None:
                on_answer(index, answer)

        with self._lock:
            for start in range(0, len(requests), self.max_batch):
                rows = []
                for index in range(start, min(start + self.max_batch, len(requests))):
                    row = self._prepare(index, requests[index])
                    if isinstance(row, Answer):
                        done(index, row)
                    else:
                        rows.append(row)
                for index, answer in self._answer_batch(rows):
                    done(index, answer)
        return answers

    def stream(self, request: Request) -> Iterator[str]:
        """Pieces of the answer's text as they come. Raises ValueError when the request cannot be answered."""
        with self._lock:
            row = self._prepare(0, request)
            if isinstance(row, Answer):
                raise ValueError(row.error)
            sent = 0
            for _ in self._decode([row], self._prefill([row])):
                # An unfinished character ends in the replacement mark; wait for its other bytes. A possible stop text is held back too.
                ready = len(row.text) if row.stop_reason else self._safe_length(row)
                if ready > sent:
                    yield row.text[sent:ready]
                    sent = ready

    @staticmethod
    def _safe_length(row: _Row) -> int:
        length = len(row.text.rstrip("\ufffd"))
        for stop in row.request.stop:
            for size in range(min(len(stop) - 1, length), 0, -1):
                if row.text[:length].endswith(stop[:size]):
                    length -= size
                    break
        return length

    def _prepare(self, index: int, request: Request) -> _Row | Answer:
        try:
            messages = normalize_messages(request.messages)
            prepared = self.processor.prepare(messages, max_tokens=self.max_tokens, add_generation_prompt=True)
        except (ValueError, OSError) as error:
            return Answer("", "error", error=str(error))
        generator = None
        if request.temperature > 0:
            seed = request.seed if request.seed is not None else int(torch.randint(2**31, ()))
            generator = torch.Generator().manual_seed(seed % 2**63)
        return _Row(index, request, prepared, [], generator)

    def _answer_batch(self, rows: list[_Row]) -> Iterator[tuple[int, Answer]]:
        if not rows:
            return
        started = time.monotonic()
        for finished in self._decode(rows, self._prefill(rows)):
            for row in finished:
                rendered = row.prepared.rendered
                yield (
                    row.index,
                    Answer(
                        row.text,
                        row.stop_reason,
                        len(rendered.input_ids),
                        rendered.visual_tokens,
                        len(row.said),
                        time.monotonic() - started,
                    ),
                )

    @torch.inference_mode()
    def _prefill(self, rows: list[_Row]) -> tuple[torch.Tensor, DecoderState]:
        """Logits (B, vocabulary) of the first new token of each row, and the state of B rows."""
        shared: dict[tuple, int] = {}
        owners: list[_Row] = []  # one row for each distinct prefix
        belongs = []
        for row in rows:
            pixels = row.prepared.pixels
            key = (tuple(row.prefix), pixels.numpy().tobytes())
            if key not in shared:
                shared[key] = len(owners)
                owners.append(row)
            belongs.append(shared[key])
        lengths = [len(owner.prefix) for owner in owners]
        if max(lengths) == 0:
            state = DecoderState()
        else:
            if min(lengths) == 0:  # text-only rows beside rows with images: their first token is their prefix
                return self._prefill([self._with_first_token(row) for row in rows])
            pixels = torch.cat([owner.prepared.pixels for owner in owners])
            ids, layout = self._rows([owner.prefix for owner in owners])
            tiles = self._normalize(pixels) if len(pixels) else None
            state = DecoderState()
            run_layers(self.model.language_model, self.model.embed(ids, tiles), layout, state)
            state = state.select(torch.tensor(belongs, device=self.device))
        ids, layout = self._rows([row.rest for row in rows])
        hidden = run_layers(self.model.language_model, self.model.embed(ids), layout, state)
        last = torch.tensor(layout.lengths, device=self.device) - 1
        hidden = hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1])).squeeze(1)  # B D
        return self.model.get_output_embeddings()(hidden).float(), state

    @staticmethod
    def _with_first_token(row: _Row) -> _Row:
        if row.prepared.rendered.prefix_tokens == 0:
            row.prepared.rendered = replace(row.prepared.rendered, prefix_tokens=1)
        return row

    def _normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.processor.image_processor.normalize_pixels(pixels).to(self.device)

    def _rows(self, token_rows: list[list[int]]) -> tuple[torch.Tensor, Layout]:
        width = max(len(row) for row in token_rows)
        filler = self.processor.renderer.end_of_turn_id
        ids = torch.tensor([row + [filler] * (width - len(row)) for row in token_rows], device=self.device)
        return ids, Layout.rows([len(row) for row in token_rows], width, self.device)

    @torch.inference_mode()
    def _decode(self, rows: list[_Row], prefilled: tuple[torch.Tensor, DecoderState]) -> Iterator[list[_Row]]:
        """Decode until every row has ended; yields, after each step, the rows that ended in it."""
        logits, state = prefilled
        running = list(rows)
        while True:
            tokens = self._choose(logits, running)
            finished = [row for row, token in zip(running, tokens, strict=True) if self._take(row, token)]
            yield finished
            if len(finished) == len(running):
                return
            if finished:
                keep = [place for place, row in enumerate(running) if not row.stop_reason]
                running = [running[place] for place in keep]
                tokens = [tokens[place] for place in keep]
                state = state.select(torch.tensor(keep, device=self.device))
            ids = torch.tensor(tokens, device=self.device)[:, None]
            hidden = run_layers(self.model.language_model, self.model.embed(ids), Layout.rows([1] * len(running), 1, self.device), state)
            logits = self.model.get_output_embeddings()(hidden[:, -1]).float()

    def _take(self, row: _Row, token: int) -> bool:
        """Add a token to a row; True when the row has ended."""
        if token == self.processor.renderer.end_of_turn_id:
            row.stop_reason = "end"
            return True
        row.said.append(token)
        row.text = self.processor.tokenizer.decode(row.said, skip_special_tokens=True)
        ends = [row.text.index(stop) for stop in row.request.stop if stop and stop in row.text]
        if ends:
            row.text, row.stop_reason = row.text[: min(ends)], "stop"
            return True
        if len(row.said) >= row.request.max_new_tokens:
            row.stop_reason = "length"
            return True
        return False

    def _choose(self, logits: torch.Tensor, rows: list[_Row]) -> list[int]:
        """Greedy, or drawn with the row's own generator, so that batch mates do not matter. A placeholder is never said."""
        logits[:, self.model.config.image_token_id] = float("-inf")
        tokens = logits.argmax(-1).tolist()
        for place, row in enumerate(rows):
            if row.generator is None:
                continue
            probabilities = ((logits[place] - logits[place].max()).cpu().double() / row.request.temperature).softmax(-1)
            if row.request.top_p < 1.0:
                ordered, order = probabilities.sort(descending=True)
                ordered[ordered.cumsum(-1) - ordered >= row.request.top_p] = 0.0
                probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
            tokens[place] = int(torch.multinomial(probabilities / probabilities.sum(), 1, generator=row.generator))
        return tokens
