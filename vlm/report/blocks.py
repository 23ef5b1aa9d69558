"""What a page is made of. Each block knows itself as HTML and as Markdown; all text that comes in is escaped here, once.

`files` in `markdown(files)` collects what Markdown cannot hold - name -> bytes, to be written beside the page; None leaves it out.
"""

import base64
import html
import io
from dataclasses import dataclass, field

from PIL import Image

from .curves import curves_svg
from .marks import Marked, html_value, is_number, markdown_text, markdown_value

__all__ = ["Code", "Curves", "Figures", "Heading", "Pictures", "Table", "Text"]


# Of a grid of four columns on a page of 1000 pixels: a column, and two of them.
COLUMN_PX, WIDEST_PX = 228, 470
LARGE_BYTES = 40_000  # of a PNG; drawn pictures stay far below


def _caption_html(caption: str | None, tag: str = "figcaption") -> str:
    return f"<{tag}>{html.escape(caption)}</{tag}>" if caption else ""


def _caption_markdown(caption: str | None) -> str:
    return f"\n\n_{markdown_text(caption)}_" if caption else ""


@dataclass
class Heading:
    text: str
    anchor: str

    def html(self) -> str:
        return f'<h2 id="{self.anchor}">{html.escape(self.text)}</h2>'

    def markdown(self, files) -> str:
        return f"## {markdown_text(self.text)}"


@dataclass
class Text:
    """Paragraphs, parted by an empty line."""

    text: str

    @property
    def paragraphs(self) -> list[str]:
        return [part.strip() for part in self.text.split("\n\n") if part.strip()]

    def html(self) -> str:
        return "\n".join(f"<p>{html.escape(part)}</p>" for part in self.paragraphs)

    def markdown(self, files) -> str:
        return "\n\n".join(markdown_text(part) for part in self.paragraphs)


@dataclass
class Code:
    """A command or a file, letter by letter."""

    text: str

    def html(self) -> str:
        return f"<pre><code>{html.escape(self.text)}</code></pre>"

    def markdown(self, files) -> str:
        fence = "```"
        while fence in self.text:
            fence += "`"
        return f"{fence}\n{self.text}\n{fence}"


@dataclass
class Figures:
    """A few headline numbers: (label, value, remark or None)."""

    items: list[tuple]
    decimals: int = 1

    def html(self) -> str:
        cards = []
        for label, value, remark in self.items:
            under = f"<small>{html.escape(remark)}</small>" if remark else ""
            cards.append(f"<div><dt>{html.escape(label)}</dt><dd>{html_value(value, self.decimals)}</dd>{under}</div>")
        return f'<dl class="figures">{"".join(cards)}</dl>'

    def markdown(self, files) -> str:
        lines = []
        for label, value, remark in self.items:
            behind = f" ({markdown_text(remark)})" if remark else ""
            lines.append(f"- {markdown_text(label)}: {markdown_value(value, self.decimals)}{behind}")
        return "\n".join(lines)


@dataclass
class Table:
    """A column is right-aligned when all its cells that are not empty are numbers."""

    headers: list[str]
    rows: list[list]
    caption: str | None = None
    decimals: int = 1

    def __post_init__(self):
        for number, row in enumerate(self.rows):
            if len(row) != len(self.headers):
                names = ", ".join(map(str, self.headers))
                raise ValueError(f"row {number} of the table has {len(row)} cells for {len(self.headers)} headers ({names})")

    def _right(self) -> list[bool]:
        result = []
        for column in range(len(self.headers)):
            cells = [row[column] for row in self.rows]
            cells = [cell for cell in cells if (cell.value if isinstance(cell, Marked) else cell) is not None]
            result.append(bool(cells) and all(is_number(cell) for cell in cells))
        return result

    def html(self) -> str:
        kinds = [' class="number"' if right else "" for right in self._right()]
        head = "".join(f'<th scope="col"{kind}>{html.escape(str(text))}</th>' for text, kind in zip(self.headers, kinds, strict=True))
        body = []
        for row in self.rows:
            cells = "".join(f"<td{kind}>{html_value(cell, self.decimals)}</td>" for cell, kind in zip(row, kinds, strict=True))
            body.append(f"<tr>{cells}</tr>")
        if not body:
            body = [f'<tr><td colspan="{len(self.headers)}"><span class="quiet">no rows</span></td></tr>']
        caption, rows = _caption_html(self.caption, "caption"), "\n".join(body)
        return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>'

    def markdown(self, files) -> str:
        lines = [f"| {' | '.join(markdown_text(text) for text in self.headers)} |"]
        lines.append(f"|{'|'.join('---:' if right else '---' for right in self._right())}|")
        lines += [f"| {' | '.join(markdown_value(cell, self.decimals) for cell in row)} |" for row in self.rows]
        return "\n".join(lines) + _caption_markdown(self.caption)


@dataclass
class Curves:
    curves: dict
    x_label: str
    y_label: str
    caption: str | None = None
    log_y: bool = False
    smooth: int = 1
    svg: str = field(init=False)

    def __post_init__(self):
        self.svg = curves_svg(self.curves, self.x_label, self.y_label, log_y=self.log_y, smooth=self.smooth)

    def html(self) -> str:
        return f'<figure class="plot">{self.svg}{_caption_html(self.caption)}</figure>'

    def markdown(self, files) -> str:
        if files is None:
            last = markdown_text(f"last {self.y_label}")
            ends = [f"- {markdown_text(name)}: {last} {points[-1][1]:.4g}" for name, points in self.curves.items() if points]
            return "\n".join(ends) + _caption_markdown(self.caption)
        name = f"curves_{len(files) + 1:02d}.svg"
        files[name] = self.svg.encode()
        return f"![{markdown_text(f'{self.y_label} over {self.x_label}')}](pictures/{name})" + _caption_markdown(self.caption)


@dataclass
class Pictures:
    """A grid of (RGB image, caption lines); `scale` whole screen pixels for one pixel of the picture, fewer for a picture that would be
    wider than two columns, always whole, so that edges stay hard."""

    items: list[tuple[Image.Image, list]]
    scale: int = 1
    caption: str | None = None

    def _scale(self, image: Image.Image) -> int:
        return max(1, min(self.scale, WIDEST_PX // image.width))

    @staticmethod
    def _encoded(image: Image.Image) -> tuple[bytes, str]:
        """(file, its kind): PNG for what is drawn, JPEG for photographs, which would be ten times as large; a page holds dozens."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        if buffer.tell() <= LARGE_BYTES:
            return buffer.getvalue(), "png"
        smaller = io.BytesIO()
        image.save(smaller, "JPEG", quality=88, subsampling=0)
        return (smaller.getvalue(), "jpeg") if smaller.tell() < buffer.tell() / 2 else (buffer.getvalue(), "png")

    def html(self) -> str:
        figures = []
        for image, lines in self.items:
            words = "".join(f"<div>{html_value(line)}</div>" for line in lines)
            alt = html.escape(str(lines[0].value if isinstance(lines[0], Marked) else lines[0]) if lines else "picture", quote=True)
            width, height = image.width * self._scale(image), image.height * self._scale(image)
            data, kind = self._encoded(image)
            source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            figures.append(
                f'<figure{" class=broad" if width > COLUMN_PX else ""}><div class="frame"><img src="{source}" width="{width}" '
                f'height="{height}" alt="{alt}"></div><figcaption>{words}</figcaption></figure>'
            )
        return f'<div class="pictures">{chr(10).join(figures)}</div>' + _caption_html(self.caption, "p")

    def markdown(self, files) -> str:
        entries = []
        for image, lines in self.items:
            words = "; ".join(markdown_value(line) for line in lines)
            if files is None:
                entries.append(f"- {words}")
                continue
            data, kind = self._encoded(image)
            name = f"picture_{len(files) + 1:02d}.{kind.replace('jpeg', 'jpg')}"
            files[name] = data
            entries.append(f'<img src="pictures/{name}" width="{image.width * self._scale(image)}" alt=""><br>\n{words}')
        return ("\n" if files is None else "\n\n").join(entries) + _caption_markdown(self.caption)
