"""Turn a conversation into token ids and labels: the only renderer, for training, evaluation, demo and server.

Text pieces are encoded one by one and joined as ids, so a tokenizer cannot merge across the end of the prompt, and the prompt for an
answer is a prefix of the training text by construction. **What a user or a data file writes is plain text**: `<image>`, a tile tag or a
chat mark inside it is encoded letter by letter and never becomes a special token.

An image stands as `<Image>`, then per tile its tag and V placeholders, the thumbnail last, then `</Image>` and a line break (NVLM-D, arXiv
2409.11402, section 4.2: 1-D text tags). An image of one tile has only the thumbnail's tag.

Letters: V visual tokens per tile.
"""

import re
from dataclasses import asdict, dataclass, field
from functools import lru_cache

from .loss import IGNORE_INDEX

__all__ = ["ChatFormat", "Rendered", "Renderer", "chat_formats", "image_tokens", "normalize_messages", "tile_tag"]

IMAGE_OPEN, IMAGE_CLOSE, PLACEHOLDER, THUMBNAIL_TAG = "<Image>", "</Image>", "<image>", "<tile_global_thumbnail>"
MOST_TILES = 12
ROLES = ("system", "user", "assistant")


def tile_tag(number: int) -> str:
    """The tag of the number-th tile, from 1."""
    return f"<tile_{number:02d}>"


def image_tokens() -> list[str]:
    """All tokens an image is written with; `vlm.assemble` adds them to a tokenizer."""
    return [PLACEHOLDER, IMAGE_OPEN, IMAGE_CLOSE, *(tile_tag(number) for number in range(1, MOST_TILES + 1)), THUMBNAIL_TAG]


@dataclass(frozen=True)
class ChatFormat:
    """How turns are marked. It is saved with the processor.

    bos: token before everything ("" for none); turn_open, turn_close: tokens around a turn; system: the system text used when the
    conversation brings none (None: no system turn).
    """

    bos: str = ""
    turn_open: str = "<|im_start|>"
    turn_close: str = "<|im_end|>"
    system: str | None = None

    def chat_template(self) -> str:
        """The same format as a Jinja template, for tools that render text themselves."""
        default = (
            ""
            if self.system is None
            else ("{% if messages[0]['role'] != 'system' %}" + f"{self.turn_open}system\n{self.system}{self.turn_close}\n" + "{% endif %}")
        )
        return (
            self.bos + default + "{% for message in messages %}" + self.turn_open + "{{ message['role'] + '\n' }}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
            "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
            + PLACEHOLDER
            + "{{ '\n' }}{% endif %}{% endfor %}{% endif %}"
            + self.turn_close
            + "{{ '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}" + self.turn_open + "{{ 'assistant\n' }}{% endif %}"
        )

    def to_dict(self) -> dict:
        return asdict(self)


def chat_formats() -> dict[str, ChatFormat]:
    """Named formats: "small" (ChatML without a system turn), "chatml" (NVLM's SFT template), "nemotron" (NVIDIA's for Nemotron-H)."""
    follow = "Follow the user's instruction and answer questions."
    return {
        "small": ChatFormat(),
        "chatml": ChatFormat(system=follow),
        "nemotron": ChatFormat(bos="<s>", turn_open="<SPECIAL_14>", turn_close="<SPECIAL_15>", system=follow),
    }


def normalize_messages(messages: list[dict]) -> list[dict]:
    """OpenAI-style messages -> [{"role", "content": [{"type": "text", "text"} | {"type": "image", "image"}]}].

    A content that is a string becomes one text part; {"type": "image_url", "image_url": {"url"}} becomes an image whose source is the URL
    text (the caller resolves it). Raises ValueError for an unknown role or part, an image outside a user turn, or no message at all.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("found no messages; expected a list of {'role': ..., 'content': ...}")
    result = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"message {number} is {type(message).__name__} {str(message)[:80]!r}; expected a dict with role and content")
        if message["role"] not in ROLES:
            raise ValueError(f"message {number} has role {message['role']!r}; expected one of {', '.join(ROLES)}")
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise ValueError(f"message {number} has content of type {type(content).__name__}; expected a string or a list of parts")
        clean = []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                clean.append({"type": "text", "text": part["text"]})
            elif kind == "image" and message["role"] == "user":
                clean.append({"type": "image", "image": part.get("image", part.get("url", part.get("path")))})
            elif kind == "image_url" and message["role"] == "user":
                url = part.get("image_url")
                clean.append({"type": "image", "image": url.get("url") if isinstance(url, dict) else url})
            else:
                raise ValueError(
                    f"message {number} ({message['role']}) has the part {str(part)[:80]!r}; expected text, or an image in a user turn"
                )
        result.append({"role": message["role"], "content": clean})
    return result


@dataclass
class Rendered:
    """input_ids and labels (same length, labels not shifted, IGNORE_INDEX where nothing is learnt); visual_tokens: placeholders among
    them; prefix_tokens: length up to and including the last image (what several questions about it share)."""

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    visual_tokens: int = 0
    prefix_tokens: int = 0

    def add(self, ids: list[int], supervised: bool = False) -> None:
        self.input_ids.extend(ids)
        self.labels.extend(ids if supervised else [IGNORE_INDEX] * len(ids))


class Renderer:
    """Renders for one tokenizer and one chat format. Raises ValueError when the tokenizer lacks a token it needs."""

    def __init__(self, tokenizer, chat_format: ChatFormat, visual_tokens_per_tile: int):
        self.tokenizer = tokenizer
        self.chat_format = chat_format
        self.visual_tokens_per_tile = visual_tokens_per_tile
        marks = [mark for mark in (chat_format.bos, chat_format.turn_open, chat_format.turn_close) if mark]
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in [*image_tokens(), *marks] if token not in vocabulary]
        if missing:
            raise ValueError(
                f"the tokenizer lacks {len(missing)} needed tokens ({', '.join(missing[:6])} ...); "
                "assemble the model by python -m vlm.assemble"
            )
        self._ids = {token: vocabulary[token] for token in [*image_tokens(), *marks]}
        self._reserved = {index: token for token, index in tokenizer.get_added_vocab().items()} | {i: t for t, i in self._ids.items()}
        self._encode_cached = lru_cache(maxsize=65536)(self._encode)

    @property
    def end_of_turn_id(self) -> int:
        return self._ids[self.chat_format.turn_close]

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special."""
        return list(self._encode_cached(text))

    def _encode(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if not any(index in self._reserved for index in ids):
            return tuple(ids)
        # A tokenizer that matches added tokens whatever it is told: cut each of them after its first letter and encode around the cut.
        tokens = sorted((token for token in self._reserved.values() if token in text), key=len, reverse=True)
        if not tokens:
            raise ValueError(f"the tokenizer turned the plain text {text[:60]!r} into a reserved token; check its added tokens")
        cut = text.index(tokens[0]) + 1
        return self._encode(text[:cut]) + self._encode(text[cut:])

    def image_ids(self, tiles: int) -> list[int]:
        """Ids of one image of `tiles` tiles (the thumbnail counts; 1 means the thumbnail alone), up to and including </Image>."""
        if not 1 <= tiles <= MOST_TILES + 1:
            raise ValueError(f"an image of {tiles} tiles; expected 1 to {MOST_TILES + 1}")
        tags = [tile_tag(number) for number in range(1, tiles)] + [THUMBNAIL_TAG]
        ids = [self._ids[IMAGE_OPEN]]
        for tag in tags:
            ids += [self._ids[tag]] + [self._ids[PLACEHOLDER]] * self.visual_tokens_per_tile
        return ids + [self._ids[IMAGE_CLOSE]]

    def encode_marked(self, text: str, tiles_per_image: list[int]) -> list[int]:
        """Ids of a text that the chat template made: chat marks become their tokens, each `<image>` the next image.

        Cut where `render` cuts (behind the role's line, behind the line break of an image), so that both give the same ids; everything
        between is plain text. Raises ValueError when `<image>` and tile counts differ in number.
        """
        marks = [mark for mark in (self.chat_format.bos, self.chat_format.turn_open, self.chat_format.turn_close, PLACEHOLDER) if mark]
        pieces = re.split("(" + "|".join(map(re.escape, marks)) + ")", text)
        found = pieces.count(PLACEHOLDER)
        if found != len(tiles_per_image):
            raise ValueError(
                f"found {found} times {PLACEHOLDER} in the text for {len(tiles_per_image)} images; expected one for each image"
            )
        counts, ids = iter(tiles_per_image), []
        for before, piece in zip(["", *pieces], pieces, strict=False):
            if piece == PLACEHOLDER:
                ids += self.image_ids(next(counts))
            elif piece in marks:
                ids.append(self._ids[piece])
            else:
                if before == self.chat_format.turn_open or (before == PLACEHOLDER and piece.startswith("\n")):
                    line, line_break, piece = piece.partition("\n")
                    ids += self.encode_plain(line + line_break)
                ids += self.encode_plain(piece)
        return ids

    def render(self, messages: list[dict], tiles_per_image: list[int], *, add_generation_prompt: bool = False) -> Rendered:
        """Messages (see `normalize_messages`) and the number of tiles of each image, in order, -> ids and labels.

        Labels hold the assistant's text and its end-of-turn token. Raises ValueError when images and tile counts differ in number.
        """
        messages = normalize_messages(messages)
        found = sum(part["type"] == "image" for message in messages for part in message["content"])
        if found != len(tiles_per_image):
            raise ValueError(f"found {found} images in the messages and {len(tiles_per_image)} tile counts; expected as many of each")
        if self.chat_format.system is not None and messages[0]["role"] != "system":
            messages = normalize_messages([{"role": "system", "content": self.chat_format.system}]) + messages
        counts = iter(tiles_per_image)
        rendered = Rendered()
        if self.chat_format.bos:
            rendered.add([self._ids[self.chat_format.bos]])
        opening, closing = [self._ids[self.chat_format.turn_open]], [self.end_of_turn_id]
        for message in messages:
            rendered.add(opening + self.encode_plain(message["role"] + "\n"))
            learnt = message["role"] == "assistant"
            for part in message["content"]:
                if part["type"] == "text":
                    rendered.add(self.encode_plain(part["text"]), learnt)
                else:
                    tiles = next(counts)
                    rendered.add(self.image_ids(tiles))
                    rendered.visual_tokens += tiles * self.visual_tokens_per_tile
                    rendered.prefix_tokens = len(rendered.input_ids)
                    rendered.add(self.encode_plain("\n"))
            rendered.add(closing, learnt)
            rendered.add(self.encode_plain("\n"))
        if add_generation_prompt:
            rendered.add(opening + self.encode_plain("assistant\n"))
        return rendered
