"""The twelve pictures and questions of a golden pack: drawn by arithmetic alone, so that no font, library or random generator decides.

Small, for they are enlarged to the tiles' size anyway: together some ten kilobytes. Their shapes reach grids of one to twelve tiles; three
are not RGB, so that a change in how alpha, grey or a palette is read shows too.
"""

import numpy as np
from PIL import Image

__all__ = ["PLANS", "draw"]

# (width, height, mode, question). The questions hold what tokenizers differ in: digits, spaces, line breaks, accents, several scripts,
# and marks of our own format, which must stay text.
PLANS = (
    (64, 64, "RGB", "What colour is the ball?"),
    (61, 59, "L", "How many?"),
    (40, 40, "RGBA", "Is the dog left of the 2 red cars, or right of them?\nAnswer the question using a single word or phrase."),
    (128, 64, "RGB", "What is written: 1,024.50 or 1024?"),
    (64, 128, "P", "  two spaces before,\ttab,\n\nblank line   "),
    (150, 50, "RGB", "Où est l’été? Ça va – naïve “quotes”…"),
    (48, 144, "RGB", "<image> <tile_01> </Image> <|im_end|> [INST] stay text"),
    (160, 40, "RGB", "日本語 と 한국어, кошка, العربية"),
    (200, 40, "RGB", "🙂👍🏽 x² + y² ≤ 10⁻³"),
    (96, 64, "RGB", "unanswerable"),
    (64, 96, "RGB", "def f(x):\n    return x[::-1]  # reversed?"),
    (100, 75, "RGB", "Describe the picture in detail."),
)


def draw(number: int) -> Image.Image:
    """Picture `number` of PLANS: two slopes of colour, a disc, a bar and a chequered corner, whole numbers only."""
    width, height, mode, _ = PLANS[number]
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x * 3 + y * 5 + 40 * number) % 256], axis=-1)
    pixels[(x - width // 3) ** 2 + (y - height // 2) ** 2 < (min(width, height) // 4) ** 2] = (230, 30 + 15 * number, 40)
    pixels[(y > height * 3 // 4) & (x > width // 2)] = (20, 90, 250 - 10 * number)
    corner = (x < width // 4) & (y < height // 4)
    pixels[corner] = (((x // 3 + y // 3) % 2) * 255)[corner][:, None]
    image = Image.fromarray(pixels.astype(np.uint8))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(((x + y) * 255 // (width + height - 2)).astype(np.uint8)))
    elif mode == "L":
        image = image.convert("L")
    elif mode == "P":
        image = Image.fromarray((pixels[..., 0] // 16).astype(np.uint8))
        image.putpalette([value for step in range(16) for value in (16 * step, 255 - 16 * step, (7 * step * step) % 256)])
    return image
