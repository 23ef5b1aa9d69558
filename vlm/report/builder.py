"""`Report`: collect blocks in reading order, then write the page. Every call returns the report, so calls can be chained."""

import html
import re
from collections.abc import Iterable
from pathlib import Path

from ..files import write_whole
from ..tiling import open_image
from .blocks import Code, Curves, Figures, Heading, Pictures, Table, Text
from .marks import markdown_text
from .style import STYLE

__all__ = ["Report"]


class Report:
    """A page. title and subtitle stand at its head; the subtitle is the place for the command and the date."""

    def __init__(self, title: str, subtitle: str | None = None):
        self.title, self.subtitle = title, subtitle
        self.blocks: list = []

    def heading(self, text: str) -> "Report":
        """Start a section. Three or more of them make a list of contents."""
        word = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "section"
        taken = {block.anchor for block in self.blocks if isinstance(block, Heading)}
        anchor = next(name for name in (word, *(f"{word}-{number}" for number in range(2, len(taken) + 3))) if name not in taken)
        self.blocks.append(Heading(text, anchor))
        return self

    def text(self, text: str) -> "Report":
        """Paragraphs; an empty line parts them. Nothing in it is HTML or Markdown."""
        self.blocks.append(Text(text))
        return self

    def code(self, text: str) -> "Report":
        """A command or a file, shown as it is."""
        self.blocks.append(Code(text))
        return self

    def figures(self, items: Iterable[tuple], decimals: int = 1) -> "Report":
        """Headline numbers: (label, value) or (label, value, remark)."""
        self.blocks.append(Figures([(*item, None)[:3] for item in items], decimals))
        return self

    def table(self, headers: Iterable[str], rows: Iterable[Iterable], caption: str | None = None, decimals: int = 1) -> "Report":
        """A table; cells are text, numbers, None (a dash) or `Marked`. `decimals` is for numbers that are not whole.

        Raises ValueError when a row has another number of cells than there are headers.
        """
        self.blocks.append(Table(list(headers), [list(row) for row in rows], caption, decimals))
        return self

    def curves(
        self, curves: dict[str, list[tuple[float, float]]], x_label: str, y_label: str, caption: str | None = None, *, log_y=False, smooth=1
    ) -> "Report":
        """Several curves in one plot; see `vlm.report.curves.curves_svg` for log_y, smooth and errors."""
        self.blocks.append(Curves(curves, x_label, y_label, caption, log_y, smooth))
        return self

    def pictures(self, items: Iterable[tuple], scale: int = 1, caption: str | None = None) -> "Report":
        """A grid of (Pillow image or path, caption lines); a line is text or `Marked`. scale: whole screen pixels per pixel, hard edges.

        Raises FileNotFoundError / ValueError for a picture that is not there or broken, ValueError for a scale below 1.
        """
        if scale < 1:
            raise ValueError(f"{scale = }; expected at least 1 screen pixel for a pixel")
        opened = [(open_image(image), [lines] if isinstance(lines, str) else list(lines)) for image, lines in items]
        self.blocks.append(Pictures(opened, scale, caption))
        return self

    def html(self) -> str:
        """The whole page; it refers to nothing outside itself."""
        headings = [block for block in self.blocks if isinstance(block, Heading)]
        links = "".join(f'<a href="#{block.anchor}">{html.escape(block.text)}</a>' for block in headings)
        contents = f"<nav>{links}</nav>" if len(headings) >= 3 else ""
        subtitle = f'<p class="subtitle">{html.escape(self.subtitle)}</p>' if self.subtitle else ""
        title = html.escape(self.title)
        body = "\n".join(block.html() for block in self.blocks)
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n'
            f"<header><h1>{title}</h1>{subtitle}{contents}</header>\n{body}\n</main></body></html>\n"
        )

    def markdown(self, files: dict[str, bytes] | None = None) -> str:
        """The page as Markdown. With `files` (a dict to fill: name -> bytes, to stand in `pictures/`) it shows pictures and curves;
        without, only their captions and last values."""
        head = [f"# {markdown_text(self.title)}"] + ([markdown_text(self.subtitle)] if self.subtitle else [])
        return "\n\n".join([*head, *(block.markdown(files) for block in self.blocks)]) + "\n"

    def write(self, folder: str | Path) -> Path:
        """Write report.html, report.md and the Markdown page's pictures/; returns the path of report.html."""
        folder = Path(folder)
        files: dict[str, bytes] = {}
        markdown = self.markdown(files)
        for name, content in files.items():
            write_whole(folder / "pictures" / name, content)
        write_whole(folder / "report.md", markdown)
        return write_whole(folder / "report.html", self.html())
