"""Turn a conversation into token ids and labels: the only renderer, for training, evaluation, demo and server.

Text pieces are encoded one by one and joined as ids, so a tokenizer cannot merge across the end of the prompt, and the prompt for an
answer is a prefix of the training text by construction. **What a user or a data file writes is plain text**: `<image>`, a tile tag or a
chat mark inside it is encoded letter by letter and never becomes a special token.

An image stands as `<Image>`, then per tile its tag and V placeholders, the thumbnail last, then `</Image>` and a line break (NVLM-D, arXiv
2409.11402, section 4.2: 1-D text tags). An image of one tile has only the thumbnail's tag.

Letters: V visual tokens per tile.
"""

import re
from dataclasses import dataclass, field
from functools import lru_cache

from .chat_format import PLACEHOLDER, ROLES, ChatFormat, chat_formats
from .loss import IGNORE_INDEX
from .thinking import THINKING_MARKS, strip_thinking

__all__ = ["PLACEHOLDER", "ChatFormat", "Rendered", "Renderer", "chat_formats", "image_tokens", "normalize_messages", "tile_tag"]

CACHED_LENGTH = 256  # characters: questions and answers come again, whole pages do not, and their ids are a hundred times as large


IMAGE_OPEN, IMAGE_CLOSE, THUMBNAIL_TAG = "<Image>", "</Image>", "<tile_global_thumbnail>"
MOST_TILES = 12


def tile_tag(number: int) -> str:
    """The tag of the number-th tile, from 1."""
    return f"<tile_{number:02d}>"


def image_tokens() -> list[str]:
    """All tokens an image is written with; `vlm.assemble` adds them to a tokenizer."""
    return [PLACEHOLDER, IMAGE_OPEN, IMAGE_CLOSE, *(tile_tag(number) for number in range(1, MOST_TILES + 1)), THUMBNAIL_TAG]


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
        marks = chat_format.marks()
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in [*image_tokens(), *marks] if token not in vocabulary]
        if missing:
            raise ValueError(
                f"the tokenizer lacks {len(missing)} needed tokens ({', '.join(missing[:6])} ...); "
                "assemble the model by python -m vlm.assemble"
            )
        self._ids = {token: vocabulary[token] for token in [*image_tokens(), *marks]}
        # An added token with a space in it that is not special is a phrase of plain text (vlm/small_tokenizer.py).
        added = tokenizer.added_tokens_decoder.items()
        self._reserved = {index: token.content for index, token in added if token.special or " " not in token.content}
        self._reserved |= {index: token for token, index in self._ids.items()}
        thoughts = [token for token in THINKING_MARKS if chat_format.think_open and token in vocabulary]
        self._marks = {token: vocabulary[token] for token in [*marks, *thoughts]}
        self._mark_pattern = re.compile("(" + "|".join(map(re.escape, self._marks)) + ")")
        self._marked_pattern = self._pattern_of_template_text()
        self._encode_cached, self._encode_long_cached = (lru_cache(maxsize=size)(self._encode) for size in (65536, 256))

    @property
    def end_of_turn_id(self) -> int:
        return self._ids[self.chat_format.turn_close]

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special."""
        return list((self._encode_cached if len(text) <= CACHED_LENGTH else self._encode_long_cached)(text))

    def _encode(self, text: str) -> tuple[int, ...]:
        if not text:
            return ()
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a pair of surrogates, as broken JSON escapes leave it
            raise ValueError(f"the text {text[:60]!r} holds {text[error.start]!r}, which is no character; expected valid Unicode") from None
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

    def _pattern_of_template_text(self) -> re.Pattern:
        """Every piece of text that the chat template itself writes, longest first."""
        chat = self.chat_format
        openings = [chat.opening(role) for role in ROLES]
        answers = [chat.opening("assistant") + text for text in (chat.think_open, chat.think_skip) if text]
        closings = {chat.closing(role) for role in ROLES}
        pieces = sorted({*openings, *answers, *closings, PLACEHOLDER + "\n", PLACEHOLDER, *self._marks}, key=len, reverse=True)
        next_turn = "(?=" + "|".join(map(re.escape, {text[: text.index(">") + 1] for text in openings if ">" in text})) + r"|\Z)"
        # A closing without a token of its own (a line break) is one only where the next turn follows.
        bare = {text for text in closings if not self._mark_pattern.search(text)}
        return re.compile("(" + "|".join(re.escape(piece) + (next_turn if piece in bare else "") for piece in pieces) + ")")

    def _encode_format(self, text: str) -> list[int]:
        """Ids of a text of the chat format itself: its marks become their tokens, the rest is plain."""
        ids = []
        for piece in self._mark_pattern.split(text):
            ids += [self._marks[piece]] if piece in self._marks else self.encode_plain(piece)
        return ids

    def encode_marked(self, text: str, tiles_per_image: list[int]) -> list[int]:
        """Ids of a text that the chat template made: chat marks become their tokens, each `<image>` the next image.

        Cut where `render` cuts (behind the role's line, behind the line break of an image), so that both give the same ids; everything
        between is plain text. Raises ValueError when `<image>` and tile counts differ in number.
        """
        pieces = self._marked_pattern.split(text)
        found = sum(piece.startswith(PLACEHOLDER) for piece in pieces[1::2])
        if found != len(tiles_per_image):
            raise ValueError(
                f"found {found} times {PLACEHOLDER} in the text for {len(tiles_per_image)} images; expected one for each image"
            )
        counts, ids = iter(tiles_per_image), []
        for place, piece in enumerate(pieces):
            if place % 2 == 0:
                ids += self.encode_plain(piece)
            elif piece.startswith(PLACEHOLDER):
                ids += self.image_ids(next(counts)) + self.encode_plain(piece[len(PLACEHOLDER) :])
            else:
                opening = self.chat_format.opening("assistant")
                cut = len(opening) if piece.startswith(opening) else 0
                ids += self._encode_format(piece[:cut]) + self._encode_format(piece[cut:])
        return ids

    def render(
        self, messages: list[dict], tiles_per_image: list[int], *, add_generation_prompt: bool = False, thinking: bool | None = None
    ) -> Rendered:
        """Messages (see `normalize_messages`) and the number of tiles of each image, in order, -> ids and labels.

        Labels hold the assistant's text and its end-of-turn token. `thinking` is the switch of a reasoning checkpoint for the answer to
        come (None: its own habit); answers in `messages` stand behind the mark of a model that did not think, and thoughts of earlier turns
        are left out. The switch is this argument alone: `/no_think` in a text stays text. Raises ValueError when images and tile
        counts differ in number, or when thinking is asked of a checkpoint without the switch.
        """
        messages = normalize_messages(messages)
        chat = self.chat_format
        found = sum(part["type"] == "image" for message in messages for part in message["content"])
        if found != len(tiles_per_image):
            raise ValueError(f"found {found} images in the messages and {len(tiles_per_image)} tile counts; expected as many of each")
        if chat.system is not None and messages[0]["role"] != "system":
            messages = normalize_messages([{"role": "system", "content": chat.system}]) + messages
        counts = iter(tiles_per_image)
        rendered = Rendered()
        rendered.add(self._encode_format(chat.bos))
        for number, message in enumerate(messages):
            role = message["role"]
            rendered.add(self._encode_format(chat.opening(role)))
            learnt = role == "assistant"
            if learnt:
                rendered.add(self._encode_format(chat.think_skip))
            for part in message["content"]:
                if part["type"] == "text":
                    text = strip_thinking(part["text"]) if learnt and chat.think_open and number + 1 < len(messages) else part["text"]
                    rendered.add(self.encode_plain(text), learnt)
                else:
                    tiles = next(counts)
                    rendered.add(self.image_ids(tiles))
                    rendered.visual_tokens += tiles * self.visual_tokens_per_tile
                    rendered.prefix_tokens = len(rendered.input_ids)
                    rendered.add(self.encode_plain("\n"))
            before, end, after = chat.closing(role).partition(chat.turn_close)
            rendered.add(self._encode_format(before + end), learnt)
            rendered.add(self._encode_format(after))
        if add_generation_prompt:
            rendered.add(self._encode_format(chat.opening("assistant")))
            rendered.add(self._encode_format(chat.answer_opening(thinking)))
        return rendered

    def render_text(self, text: str) -> Rendered:
        """Plain text without turns, what a base language model was trained on: behind the format's first token all of it is supervised."""
        rendered = Rendered()
        rendered.add(self._encode_format(self.chat_format.bos))
        rendered.add(self.encode_plain(text), supervised=True)
        return rendered
