"""What a drawn picture holds, and how one is made up from a seed.

A scene is the truth behind a picture: every caption, question and box is computed from it, never from the pixels. `make_scene`
decides everything (contents, sizes, places), so that drawing is a pure function of the scene. Lengths are pixels of the picture;
the model's tile is 64 px, and objects keep their pixel size in every picture: a larger picture holds more of them.
"""

import random
from dataclasses import dataclass

from train_vlm.scenes.layout import Element, place_elements, plan_size
from train_vlm.scenes.printing import ink_size

__all__ = ["COLORS", "NUMBERS", "SHAPES", "SIZES", "WORDS", "Print", "Scene", "SceneObject", "make_scene"]

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "pink")
SIZES = ("small", "large")
NUMBERS = tuple(str(number) for number in range(1, 21))
WORDS = (
    "arm",
    "bus",
    "cat",
    "dog",
    "egg",
    "fish",
    "gym",
    "hat",
    "ice",
    "jam",
    "key",
    "lamp",
    "moon",
    "nest",
    "owl",
    "pie",
    "quiz",
    "road",
    "sun",
    "taxi",
    "van",
    "wolf",
    "yak",
    "zoo",
)

DIAMETER_PX = {"small": (12.5, 14.5), "large": (21.0, 24.0)}
NUMBER_FONT_PX = (21, 22, 23, 24)  # digit height 14.7 to 16.8 px
WORD_FONT_PX = (16, 17, 18)  # capital height 11.2 to 12.6 px, and the stroke
PRINT_SHARE = 0.53  # of pictures that carry a number; as many, independently, carry a word

# Number of objects and its weight, by the number of grid tiles.
OBJECT_COUNTS = {1: ((1, 6), (2, 26), (3, 36), (4, 32)), 2: ((3, 25), (4, 30), (5, 30), (6, 15)), 4: ((4, 30), (5, 35), (6, 35))}
BACKGROUNDS = ((250, 250, 248), (232, 236, 240), (222, 236, 250), (250, 238, 222), (228, 245, 228), (243, 232, 246), (214, 218, 222))


@dataclass(frozen=True)
class SceneObject:
    """One drawn shape: `x`, `y` its centre and `diameter` its width and height, all in px."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    diameter: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, width, height in px."""
        return (self.x - self.diameter / 2, self.y - self.diameter / 2, self.diameter, self.diameter)


@dataclass(frozen=True)
class Print:
    """A printed number or word: `text` as an answer has it (lower case), centre `x`, `y`, ink `width` and `height` in px."""

    text: str
    font_px: int
    x: float
    y: float
    width: float
    height: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, width, height in px."""
        return (self.x - self.width / 2, self.y - self.height / 2, self.width, self.height)


@dataclass(frozen=True)
class Scene:
    """The whole truth of one picture. `background` is one or two RGB tones (two: a gradient from top to bottom);
    `grid` is (columns, rows) of 64 px tiles that the "closest" rule with at most six tiles gives this size."""

    width: int
    height: int
    background: tuple[tuple[int, int, int], ...]
    objects: tuple[SceneObject, ...]
    number: Print | None
    word: Print | None
    seed: int
    grid: tuple[int, int]


def make_scene(seed: int) -> Scene:
    """The scene of this seed: the same seed gives the same scene, on any machine with the same Pillow."""
    rng = random.Random(seed)
    columns, rows, width, height = plan_size(rng)
    background = (rng.choice(BACKGROUNDS),) if rng.random() < 0.6 else tuple(rng.sample(BACKGROUNDS, 2))
    number, word = rng.random() < PRINT_SHARE, rng.random() < PRINT_SHARE

    prints = []
    if number:
        prints.append(("number", rng.choice(NUMBERS), rng.choice(NUMBER_FONT_PX)))
    if word:
        prints.append(("word", rng.choice(WORDS), rng.choice(WORD_FONT_PX)))
    looks = _looks(rng, columns * rows, len(prints))

    # Largest first, as they are hardest to place; an object that finds no room is left out, a print never is.
    elements = [Element(*ink_size(text.upper(), font_px), is_print=True) for _, text, font_px in prints]
    elements += [Element(diameter, diameter) for *_, diameter in looks]
    centres = place_elements(rng, width, height, (columns, rows), elements)

    made = {}
    for (name, text, font_px), element, (x, y) in zip(prints, elements, centres, strict=False):
        made[name] = Print(text, font_px, x, y, element.width, element.height)
    placed = zip(looks, centres[len(prints) :], strict=True)
    objects = [SceneObject(shape, color, size, *centre, diameter) for (shape, color, size, diameter), centre in placed if centre]
    return Scene(width, height, background, tuple(objects), made.get("number"), made.get("word"), seed, (columns, rows))


def _looks(rng: random.Random, tiles: int, prints: int) -> list[tuple[str, str, str, float]]:
    """Shape, colour, size and diameter of the objects, largest first; repeats are wanted, or nothing could be counted."""
    choices = OBJECT_COUNTS[1 if tiles == 1 else 2 if tiles <= 3 else 4]
    count = rng.choices([n for n, _ in choices], [weight for _, weight in choices])[0]
    if tiles == 1:
        count = min(count, 4 if prints < 2 else 3)
    theme = rng.random()  # now and then all objects share their shape, or their colour
    repeat_shape, repeat_color = (1.0, 0.15) if theme < 0.11 else (0.1, 1.0) if theme < 0.21 else (0.25, 0.22)
    looks = []
    for _ in range(count):
        shape = rng.choice(looks)[0] if looks and rng.random() < repeat_shape else rng.choice(SHAPES)
        color = rng.choice(looks)[1] if looks and rng.random() < repeat_color else rng.choice(COLORS)
        size = rng.choice(SIZES)
        looks.append((shape, color, size, round(rng.uniform(*DIAMETER_PX[size]), 2)))
    return sorted(looks, key=lambda look: -look[3])
