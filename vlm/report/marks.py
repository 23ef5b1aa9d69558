"""A value that wants to be noticed, and how values become text: one place for every table cell, caption line and headline figure."""

import html
import re
from dataclasses import dataclass
from typing import Any

__all__ = ["MARKS", "Marked", "format_value", "html_value", "is_number", "markdown_text", "markdown_value"]

# mark -> sign behind the value. Colour alone would not reach everybody, nor Markdown.
MARKS = {"best": "", "good": "✓", "bad": "✗", "quiet": ""}


@dataclass(frozen=True)
class Marked:
    """A value with a mark: "best" (of its column), "good" (right, passed), "bad" (wrong, failed) or "quiet" (a remark)."""

    value: Any
    mark: str

    def __post_init__(self):
        if self.mark not in MARKS:
            raise ValueError(f"the mark {self.mark!r} is unknown; expected one of {', '.join(MARKS)}")


def is_number(value) -> bool:
    """Whether a cell holds a number (marked or not); True and False are words."""
    value = value.value if isinstance(value, Marked) else value
    return isinstance(value, int | float) and not isinstance(value, bool)


def format_value(value, decimals: int = 1) -> str:
    """None is a dash; whole numbers get thousands separators, others `decimals` places (scientific where that would show only zeros)."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        text = f"{value:,.{decimals}f}"
        return f"{value:.2g}" if value and not any(character in "123456789" for character in text) and value == value else text
    return str(value)


def _parts(value, decimals: int) -> tuple[str, str | None]:
    mark = value.mark if isinstance(value, Marked) else None
    return format_value(value.value if mark else value, decimals), mark


def html_value(value, decimals: int = 1) -> str:
    """Escaped HTML of a cell or a caption line."""
    text, mark = _parts(value, decimals)
    text = html.escape(text)
    if mark is None:
        return text
    sign = f'<span class="sign">{MARKS[mark]}</span>' if MARKS[mark] else ""
    return f'<span class="{mark}">{text}{sign}</span>'


def markdown_text(text: str) -> str:
    """A text in which nothing is Markdown or HTML, on one line."""
    text = " ".join(str(text).split())
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^([#+=-]|\d+[.)])", lambda found: f"{found[0][:-1]}\\{found[0][-1]}", text)


def markdown_value(value, decimals: int = 1) -> str:
    """Markdown of a cell or a caption line: "best" is bold, "good" and "bad" carry their sign, "quiet" is in italics."""
    text, mark = _parts(value, decimals)
    text = text if is_number(value) else markdown_text(text)
    if not text or mark is None:
        return text
    if mark in ("best", "quiet"):
        return f"**{text}**" if mark == "best" else f"_{text}_"
    return f"{text} {MARKS[mark]}"
