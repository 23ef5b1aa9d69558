"""Read OpenAI-style messages, one sample a line: {"id": ..., "messages": [{"role", "content"}, ...]}.

Content is text, or parts: {"type": "text", "text"}, {"type": "image", "image": PATH}, {"type": "image_url", "image_url": {"url": ...}}.
A path is below the folder of images; `data:` addresses carry the picture themselves; nothing is downloaded. With a list "images" beside the
messages (as other trainers have it), `<image>` in a user's text stands for the next of them, and so does a part {"type": "image"} alone;
without that list `<image>` is text.
"""

import base64
import binascii
import json
from pathlib import Path

from train_vlm.conversations import split_marks
from train_vlm.json_files import json_lines

__all__ = ["from_messages", "read_messages"]

ROLES = ("system", "user", "assistant")
SOURCES = ("image", "image_url", "url", "path")  # keys of an image part under which the picture stands (vlm/rendering.py reads the same)


def _picture(part: dict) -> str | bytes:
    """The path, or the bytes, of an image part. Raises ValueError for an address on the net and for what is neither."""
    source = next((part[key] for key in SOURCES if part.get(key) is not None), None)
    source = source.get("url") if isinstance(source, dict) else source
    if not isinstance(source, str) or not source:
        raise ValueError(f"image part {str(part)[:60]!r}; expected a path or a data: address")
    if source.startswith(("http://", "https://")):
        raise ValueError(f"image {source[:60]!r} is on the net; download it and give its path")
    if source.startswith("data:"):
        _, comma, content = source.partition(",")
        try:
            return base64.b64decode("".join(content.split()), validate=True)  # in lines of 76, as MIME has it, too
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"image {source[:40]!r} is no base64 ({error})") from error
    return source.removeprefix("file://")


def _parts(role: str, content, images: list[str | bytes], left: int) -> tuple[list[dict], int]:
    """Parts of one message; pictures it brings are added to `images`. `left`: marks that still stand for one of the given images."""
    if isinstance(content, str):
        return split_marks(content, left) if role == "user" else ([{"type": "text", "text": content}], left)
    if not isinstance(content, list) or not content:
        raise ValueError(f"content {str(content)[:60]!r}; expected text or a list of parts")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url") and role == "user":
            if left and all(part.get(key) is None for key in SOURCES):
                left -= 1
            else:
                images.append(_picture(part))
            parts.append({"type": "image"})
        else:
            raise ValueError(f"part {str(part)[:60]!r} of a message by {role!r}; expected text, or an image by the user")
    return parts, left


def from_messages(sample: dict) -> tuple[list[dict], list[str | bytes]]:
    """One sample -> messages (image parts without a source), and the paths or bytes of its images in order.

    Raises ValueError for another layout, an unknown role, an image that is on the net, or a list of images that does not fit the marks.
    """
    turns, given = sample.get("messages"), sample.get("images") or []
    if not isinstance(turns, list) or not turns:
        raise ValueError("no messages in the sample; expected a list of {'role', 'content'}")
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(path, str) for path in given):
        raise ValueError(f"'images' is {str(given)[:60]!r}; expected a list of paths")
    messages, images, left = [], [], len(given)
    for turn in turns:
        role = turn.get("role") if isinstance(turn, dict) else None
        if role not in ROLES:
            raise ValueError(f"turn {str(turn)[:60]!r}; expected a role of {', '.join(ROLES)}")
        parts, left = _parts(role, turn.get("content"), images, left)
        messages.append({"role": role, "content": parts})
    if given and images:
        raise ValueError("the sample has both a list of images and images in its messages; expected one of the two")
    if left:
        raise ValueError(f"{len(given)} images but {len(given) - left} <image> marks; expected one for each image")
    return messages, images or given


def read_messages(path: str | Path) -> list[dict]:
    """The samples of a JSONL file. Raises FileNotFoundError, or ValueError for a malformed line or a file without samples."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; expected messages, one JSON object a line")
    samples = []
    for number, line in json_lines(path.read_text(encoding="utf-8")):
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no valid JSON: {error}") from error
        if not isinstance(sample, dict) or "messages" not in sample:
            raise ValueError(f'{path}, line {number}: {line[:60]!r}; expected {{"messages": [...]}}')
        samples.append({"id": f"{path.stem}:{number}"} | sample)
    if not samples:
        raise ValueError(f"{path} holds no samples; expected at least one")
    return samples
