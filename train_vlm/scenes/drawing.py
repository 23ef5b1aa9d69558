"""From scene to pixels: everything is drawn at four times the size and reduced, so that edges are smooth at 13 px."""

import io
import math

from PIL import Image, ImageDraw

from train_vlm.scenes.printing import SUPERSAMPLING, ink
from train_vlm.scenes.scene import Scene

__all__ = ["RGB", "draw", "encode"]

RGB = {
    "red": (222, 24, 30),
    "green": (24, 150, 60),
    "blue": (28, 86, 226),
    "yellow": (246, 205, 0),
    "purple": (126, 40, 172),
    "orange": (250, 128, 4),
    "black": (16, 16, 16),
    "pink": (255, 128, 190),
}
INK_RGB = (52, 56, 66)


def _star() -> list[tuple[float, float]]:
    points = [
        (math.sin(k * math.pi / 5) * (1.0 if k % 2 == 0 else 0.42), -math.cos(k * math.pi / 5) * (1.0 if k % 2 == 0 else 0.42))
        for k in range(10)
    ]
    return [(x * 1.05, (y + 0.1) * 1.1) for x, y in points]  # stretched to fill the square of its diameter


def _heart() -> list[tuple[float, float]]:
    points = []
    for k in range(40):
        t = k * math.pi / 20
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 16, -(y + 2.5) / 14.5))
    return points


ARM = 0.36  # half the width of a cross's arm
# Outlines in a square from -1 to 1; the circle is an ellipse.
OUTLINES = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.9), (-1, 0.9)],
    "star": _star(),
    "cross": [
        (-ARM, -1),
        (ARM, -1),
        (ARM, -ARM),
        (1, -ARM),
        (1, ARM),
        (ARM, ARM),
        (ARM, 1),
        (-ARM, 1),
        (-ARM, ARM),
        (-1, ARM),
        (-1, -ARM),
        (-ARM, -ARM),
    ],
    "heart": _heart(),
}


def draw(scene: Scene) -> Image.Image:
    """The picture of `scene`, RGB, `scene.width` x `scene.height` px; a pure function."""
    scale = SUPERSAMPLING
    size = (scene.width * scale, scene.height * scale)
    if len(scene.background) == 1:
        canvas = Image.new("RGB", size, scene.background[0])
    else:
        canvas = Image.new("RGB", (1, 2))
        canvas.putpixel((0, 0), scene.background[0])
        canvas.putpixel((0, 1), scene.background[1])
        canvas = canvas.resize((1, size[1]), Image.Resampling.BILINEAR).resize(size)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.objects:
        x, y, radius = thing.x * scale, thing.y * scale, thing.diameter * scale / 2
        if thing.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=RGB[thing.color])
        else:
            pen.polygon([(x + radius * px, y + radius * py) for px, py in OUTLINES[thing.shape]], fill=RGB[thing.color])
    for printed in (scene.number, scene.word):
        if printed:
            mask = ink(printed.text.upper(), printed.font_px)
            corner = (round(printed.x * scale - mask.width / 2), round(printed.y * scale - mask.height / 2))
            canvas.paste(INK_RGB, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
    return canvas.reduce(scale)


def encode(image: Image.Image) -> bytes:
    """JPEG of quality 95 without chroma subsampling: colours of small shapes stay clear."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
