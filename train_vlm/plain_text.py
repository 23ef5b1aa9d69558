"""Plain text without turns and pictures: a source of a blend that keeps the language, and what perplexity is measured on.

A file `*.jsonl` holds one document a line ({"text": ...}), any other file is one document. For training a document is cut into pieces at
line breaks and spaces (`python -m train_vlm.shards convert --text FILE`); the pieces are stored as text, so that shards fit any tokenizer.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from train_vlm.json_files import json_lines
from vlm.processing import Prepared, VLMProcessor

__all__ = ["cut_text", "prepare_text", "read_documents", "text_records"]

CHARACTERS_A_TOKEN = 8  # more than tokenizers reach on prose: a first, cheap cut


def read_documents(path: str | Path) -> list[tuple[str, str]]:
    """(name, text) of each document of a file. Raises FileNotFoundError, or ValueError for a malformed line or a file without text."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no text at {path}; expected a plain text file, or .jsonl with {{"text": ...}} a line')
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        documents = [(path.stem, content)]
    else:
        documents = []
        for number, line in json_lines(content):
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{path}, line {number}: {line[:60]!r}; expected {{"text": "..."}}') from error
            if not isinstance(text, str):
                raise ValueError(f'{path}, line {number}: the text is {text!r}; expected {{"text": "..."}}')
            documents.append((f"{path.stem}:{number}", text))
    documents = [(name, text) for name, text in documents if text.strip()]
    if not documents:
        raise ValueError(f"{path} holds no text; expected at least one document")
    return documents


def _break_before(text: str, place: int) -> int:
    """The place behind the last line break, else behind the last space, in the second half of text[:place]; `place` without one."""
    for mark in ("\n", " "):
        found = text.rfind(mark, place // 2, place)
        if found > 0:
            return found + 1
    return place


def cut_text(text: str, longest_tokens: int, count_tokens: Callable[[str], int]) -> list[str]:
    """Pieces of at most `longest_tokens` tokens, which are the text again when joined.

    A single character may be several tokens in a byte-level tokenizer; it is never cut.
    """
    pieces, start, block = [], 0, CHARACTERS_A_TOKEN * longest_tokens
    while start < len(text):
        end = len(text) if len(text) - start <= block else start + _break_before(text[start : start + block], block)
        pieces += _halved(text[start:end], longest_tokens, count_tokens)
        start = end
    return pieces


def _halved(text: str, longest_tokens: int, count_tokens: Callable[[str], int]) -> list[str]:
    if len(text) <= 1 or count_tokens(text) <= longest_tokens:
        return [text]
    middle = (len(text) + 1) // 2
    place = _break_before(text, middle)
    return [piece for half in (text[:place], text[place:]) for piece in _halved(half, longest_tokens, count_tokens)]


def text_records(path: str | Path, processor: VLMProcessor, longest_tokens: int) -> list[dict]:
    """{"id", "text"} of each piece of a file, in order. Raises as `read_documents`."""
    records = []
    for name, text in read_documents(path):
        pieces = cut_text(text, longest_tokens, lambda piece: len(processor.renderer.render_text(piece).input_ids))
        records += [{"id": f"{name}/{number}", "text": piece} for number, piece in enumerate(pieces) if piece.strip()]
    return records


def prepare_text(text: str, processor: VLMProcessor, max_tokens: int | None = None) -> Prepared:
    """What `processor.prepare` gives for messages. Raises ValueError for a text that is too long (it is never cut here)."""
    rendered = processor.renderer.render_text(text)
    if max_tokens is not None and len(rendered.input_ids) > max_tokens:
        raise ValueError(
            f"the text has {len(rendered.input_ids)} tokens; at most {max_tokens} fit; write the shards with a smaller --text-tokens"
        )
    size = processor.image_processor.tile_size
    return Prepared(rendered, torch.zeros(0, size, size, 3, dtype=torch.uint8), [])
