"""Printed numbers and words as ink masks, made once per text and size.

The font is the one inside Pillow, so that the same pictures come out wherever the same Pillow is installed; a stroke makes it bold
enough to survive 64 px tiles. Masks are four times the picture's resolution, as everything is drawn before it is reduced.
"""

from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

__all__ = ["SUPERSAMPLING", "ink", "ink_size"]

SUPERSAMPLING = 4
STROKE = 0.028  # of the font size, on each side


@lru_cache(maxsize=1024)
def ink(text: str, font_px: int) -> Image.Image:
    """Mode "L" mask of `text`, cropped to its ink, at `SUPERSAMPLING` times the picture's resolution."""
    size = font_px * SUPERSAMPLING
    font = ImageFont.load_default(size)
    stroke = max(1, round(size * STROKE))
    left, top, right, bottom = font.getbbox(text, stroke_width=stroke)
    mask = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
    ImageDraw.Draw(mask).text((4 - left, 4 - top), text, fill=255, font=font, stroke_width=stroke)
    return mask.crop(mask.getbbox())


def ink_size(text: str, font_px: int) -> tuple[float, float]:
    """Width and height of the ink in px of the picture."""
    width, height = ink(text, font_px).size
    return width / SUPERSAMPLING, height / SUPERSAMPLING
