"""The size of a picture, and where its things stand.

Sizes are drawn per grid, well inside the range of aspect ratios in which the "closest" rule (64 px tiles, at most six) gives that
grid: 65 % of the pictures need one tile, 25 % two or three, 10 % four to six. Places come from rejection sampling: nothing
overlaps, and centres keep off the borders of the 3x3 places that captions speak of, as long as there is room.
"""

import random
from dataclasses import dataclass

__all__ = ["Element", "place_elements", "plan_size", "size_group"]

# Share of pictures, and the grids (columns, rows) they are drawn from.
GRID_SHARES = (
    (0.65, ((1, 1),)),
    (0.25, ((2, 1), (1, 2), (3, 1), (1, 3))),
    (0.10, ((2, 2), (2, 2), (3, 2), (2, 3), (3, 2), (2, 3), (4, 1), (1, 4))),
)
GAP_PX = 2.0  # kept free between two things
MARGIN_PX = 2.0  # kept free along the edge of the picture


@dataclass(frozen=True)
class Element:
    """Something to place: its width and height in px."""

    width: float
    height: float
    is_print: bool = False


def size_group(position: float) -> tuple[tuple[int, int], ...]:
    """The grids at `position` (0 to 1) on a line cut into the shares above."""
    for share, grids in GRID_SHARES[:-1]:
        if position < share:
            return grids
        position -= share
    return GRID_SHARES[-1][1]


def plan_size(rng: random.Random) -> tuple[int, int, int, int]:
    """Columns and rows of the grid, width and height in px."""
    shares, grids = zip(*GRID_SHARES, strict=True)
    columns, rows = rng.choice(rng.choices(grids, shares)[0])
    if (columns, rows) == (1, 1):
        area, ratio = rng.uniform(62, 80) ** 2, rng.uniform(0.86, 1.2)
    else:
        scale = rng.uniform(60, 74)
        area = columns * rows * scale**2
        ratio = columns / rows * rng.uniform(0.93, 1.08)
        if (columns, rows) == (2, 2):
            area = max(area, 4 * 64**2 * 0.6)
    width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    return columns, rows, width, height


def place_elements(
    rng: random.Random, width: int, height: int, grid: tuple[int, int], elements: list[Element]
) -> list[tuple[float, float] | None]:
    """Centres in px, one per element, in order, none overlapping; None for one that found no room: never for a print, nor for all
    the others."""
    best: list[tuple[float, float] | None] = []
    for attempt in range(200):
        centres: list[tuple[float, float] | None] = []
        boxes: list[tuple[float, float, float, float]] = []
        for element in elements:
            centre = _find_room(rng, width, height, grid, element, boxes)
            centres.append(centre)
            if centre:
                boxes.append((centre[0], centre[1], element.width, element.height))
        placed = [element.is_print for element, centre in zip(elements, centres, strict=True) if centre]
        is_fit = sum(placed) == sum(element.is_print for element in elements) and not all(placed)
        if is_fit and len(placed) > sum(centre is not None for centre in best):
            best = centres
        if len(placed) == len(elements) or best and attempt >= 5:
            return best
    raise AssertionError(f"no room for {elements} in {width} x {height} px")


def _find_room(rng, width, height, grid, element, boxes, tries: int = 50) -> tuple[float, float] | None:
    half_width, half_height = element.width / 2 + MARGIN_PX, element.height / 2 + MARGIN_PX
    for attempt in range(tries):
        x = round(rng.uniform(half_width, width - half_width), 2)
        y = round(rng.uniform(half_height, height - half_height), 2)
        if any(
            abs(x - bx) < (element.width + bw) / 2 + GAP_PX and abs(y - by) < (element.height + bh) / 2 + GAP_PX for bx, by, bw, bh in boxes
        ):
            continue
        if attempt < tries // 2:  # wishes, as long as there is patience: a clear place word, printed text within one tile
            if _near_border(3 * x / width) or _near_border(3 * y / height):
                continue
            if element.is_print and (_crosses(x, element.width, width / grid[0]) or _crosses(y, element.height, height / grid[1])):
                continue
        return x, y
    return None


def _near_border(thirds: float) -> bool:
    """Whether a coordinate in thirds of the picture lies within 3 % of the picture from a border between places."""
    return min(abs(thirds - 1), abs(thirds - 2)) < 0.09


def _crosses(centre: float, length: float, tile: float) -> bool:
    return int((centre - length / 2) / tile) != int((centre + length / 2) / tile)
