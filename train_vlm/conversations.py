"""Read LLaVA JSON into messages. In that format `<image>` in a human turn marks the place of the next image of the sample."""

from pathlib import Path

from train_vlm.json_files import read_json

__all__ = ["from_llava", "has_answer", "read_llava", "split_marks"]

MARK = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def split_marks(text: str, left: int) -> tuple[list[dict], int]:
    """Parts of a text in which up to `left` marks stand for an image each, and how many images are left after it.

    A line break beside a mark belongs to the mark: the renderer writes its own.
    """
    parts = []
    while left and MARK in text:
        before, _, text = text.partition(MARK)
        if before.strip():
            parts.append({"type": "text", "text": before.removesuffix("\n")})
        parts.append({"type": "image"})
        text, left = text.removeprefix("\n"), left - 1
    if text or not parts:
        parts.append({"type": "text", "text": text})
    return parts, left


def has_answer(messages: list[dict]) -> bool:
    """Whether an assistant says anything. A blank answer has a token to learn, the end of its turn: to say nothing."""
    said = [part["text"] for message in messages if message["role"] == "assistant" for part in message["content"]]
    return any(text.strip() for text in said)


def from_llava(sample: dict) -> tuple[list[dict], list[str]]:
    """One LLaVA sample -> messages (image parts without a source) and the image paths, in order.

    Marks beyond the sample's images stay text. Raises ValueError for a sample without conversations, an unknown speaker, or more images
    than marks.
    """
    turns = sample.get("conversations") if isinstance(sample, dict) else None
    if not isinstance(turns, list) or not turns:
        raise ValueError("no conversations in the sample; expected a list of {'from', 'value'}")
    images = sample.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise ValueError(f"'image' is {str(images)[:60]!r}; expected a path or a list of paths")
    left, messages = len(images), []
    for turn in turns:
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(speaker, str) or speaker not in ROLES or not isinstance(text, str):
            raise ValueError(f"turn {str(turn)[:60]!r}; expected 'from' human or gpt and 'value' text")
        parts, left = split_marks(text, left) if ROLES[speaker] == "user" else ([{"type": "text", "text": text}], left)
        messages.append({"role": ROLES[speaker], "content": parts})
    if left:
        raise ValueError(f"{len(images)} images but {len(images) - left} {MARK} marks; expected one for each image")
    return messages, images


def read_llava(path: str | Path) -> list[dict]:
    """The samples of a LLaVA JSON file. Raises FileNotFoundError, or ValueError for malformed JSON, another layout or an empty list."""
    samples = read_json(path, list, "a list of samples (LLaVA JSON)")
    if not samples:
        raise ValueError(f"{path} holds no samples; expected at least one")
    return samples
