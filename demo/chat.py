"""A conversation about pictures: what was said so far -> messages -> engine -> the next state, piece by piece.

It knows no page: the browser demo shows what comes out of `ask`, and the tests drive it with a fake engine. The turns are the only
memory. Whatever goes wrong becomes one line in the turn it belongs to, and such a turn is never told to the model again.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from vlm.engine import Request
from vlm.tiling import open_image

from .tile_view import PictureView, view_pictures

__all__ = ["Step", "Turn", "ask", "to_messages"]


@dataclass(frozen=True)
class Turn:
    """A question, the pictures that came with it (paths), its answer so far, and why there is none. instruction: a line that the model
    reads under the question, such as the one it was trained with for short answers; the page does not repeat it."""

    question: str
    pictures: tuple[str, ...] = ()
    answer: str = ""
    error: str | None = None
    instruction: str = ""

    @property
    def told(self) -> str:
        """What the model reads."""
        return f"{self.question}\n{self.instruction}" if self.instruction else self.question


@dataclass(frozen=True)
class Step:
    """The conversation after one more piece. views: the tiles of every picture in it; None until they are known.
    seconds: since the question; prompt_tokens and visual_tokens: of the whole prompt; receipts: tiles taken away to make it fit."""

    turns: tuple[Turn, ...]
    views: tuple[PictureView, ...] | None = None
    prompt_tokens: int = 0
    visual_tokens: int = 0
    receipts: tuple[str, ...] = ()
    seconds: float = 0.0
    is_done: bool = False


def to_messages(turns: Sequence[Turn], opened: dict[str, Image.Image] | None = None) -> list[dict]:
    """OpenAI-style messages of the turns that went well and of the last one, whose answer is not part of it.

    opened: path -> picture, for paths that are decoded already; the others stand as paths.
    """
    opened = opened or {}
    messages = []
    for place, turn in enumerate(turns):
        is_last = place == len(turns) - 1
        if turn.error and not is_last:
            continue
        content = [{"type": "image", "image": opened.get(path, path)} for path in turn.pictures]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.told}]})
        if not is_last:
            messages.append({"role": "assistant", "content": turn.answer})
    return messages


def _one_line(error: Exception, paths: Sequence[str]) -> str:
    """An error for the page: one line, and file names without the folders of the machine that serves it."""
    text = str(error) or type(error).__name__
    for path in paths:
        text = text.replace(str(path), Path(path).name)
    return " ".join(text.split())


def ask(
    engine, turns: Sequence[Turn], question: str, pictures: Sequence[str] = (), *, max_new_tokens: int = 128, temperature: float = 0.0,
    instruction: str = "", thinking: bool | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Ask once more, with new pictures or about the ones shown before; `instruction` is a line under the question, `thinking` the switch
    of a reasoning checkpoint. Yields the conversation as it grows, at least twice.

    An error of the request (broken picture, prompt too long) ends in the new turn's `error`; nothing is raised for it. Closing the
    iterator stops the engine. Raises ValueError for a question without words.
    """
    question = question.strip()
    if not question:
        raise ValueError("the question has no words; type what you want to know")
    started = time.monotonic()
    past, turn = tuple(turns), Turn(question, tuple(str(path) for path in pictures), instruction=instruction.strip())
    paths = [path for each in (*past, turn) if each is turn or not each.error for path in each.pictures]
    step = Step((*past, turn))
    yield step
    try:
        # 1. What the model will see. The engine prepares the same messages the same way; this copy is only shown.
        opened = {path: open_image(path) for path in paths}
        messages = to_messages(step.turns, opened)
        prepared = engine.processor.prepare(messages, max_tokens=engine.max_tokens, add_generation_prompt=True, thinking=thinking)
        views = view_pictures(engine.processor, [(Path(path).name, opened[path]) for path in paths], prepared)
        tokens = len(prepared.rendered.input_ids), prepared.rendered.visual_tokens
        step = Step(step.turns, tuple(views), *tokens, tuple(prepared.receipts), time.monotonic() - started)
        yield step

        # 2. What it says.
        request = Request(messages, max_new_tokens=max_new_tokens, temperature=temperature, thinking=thinking)
        with closing(engine.stream(request)) as pieces:
            for piece in pieces:
                turn = replace(turn, answer=turn.answer + piece)
                step = replace(step, turns=(*past, turn), seconds=time.monotonic() - started)
                yield step
    except (ValueError, OSError, RuntimeError) as error:
        turn = replace(turn, error=_one_line(error, paths))
    yield replace(step, turns=(*past, turn), seconds=time.monotonic() - started, is_done=True)
