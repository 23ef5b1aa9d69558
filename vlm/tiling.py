"""Cut one image into square tiles at the resolution the vision encoder was trained for.

A picture of any shape becomes a grid of tiles plus, when there is more than one, a thumbnail of the whole (NVLM, arXiv 2409.11402,
section 4.2). The two grid rules are those of the released NVLM / InternVL code ("closest") and of newer NVIDIA recipes
("area_weighted"). Training, evaluation, demo and server all come through here; nothing else in the project resizes a picture for
the encoder.

Letters: N tiles.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

__all__ = ["Grid", "candidate_grids", "choose_grid", "open_image", "tile_image", "to_rgb"]

# A picture that decodes to more than this is refused: it is a decompression bomb or a mistake, and would stall a worker.
MAX_IMAGE_PIXELS = 178_956_970
TRANSPARENT_ON = (255, 255, 255)


class Grid(NamedTuple):
    """Columns and rows of tiles; `columns * rows` tiles without the thumbnail."""

    columns: int
    rows: int

    @property
    def tiles(self) -> int:
        return self.columns * self.rows


@lru_cache(maxsize=64)
def candidate_grids(max_tiles: int) -> tuple[Grid, ...]:
    """All grids of 1..max_tiles tiles, fewest tiles first; among equals, fewer columns first."""
    if max_tiles < 1:
        raise ValueError(f"{max_tiles = }: an image needs at least one tile; give max_tiles >= 1")
    grids = [Grid(columns, rows) for columns in range(1, max_tiles + 1) for rows in range(1, max_tiles // columns + 1)]
    return tuple(sorted(grids, key=lambda grid: (grid.tiles, grid.columns)))


def choose_grid(width: int, height: int, *, tile_size: int = 448, max_tiles: int = 12, policy: str = "closest") -> Grid:
    """The grid of tiles for an image of `width` x `height` pixels.

    "closest": least |width/height - columns/rows|; on a tie the later (larger) grid is taken only if the image has more than half
    its pixels. "area_weighted": the largest min(grid area / image area, 0.6) * min(r_t / r, r / r_t); the first best wins.

    Raises ValueError for a size below one pixel, `tile_size` or `max_tiles` below 1, or an unknown policy.
    """
    if width < 1 or height < 1:
        raise ValueError(f"found an image of {width} x {height} pixels; expected at least 1 x 1")
    if tile_size < 1:
        raise ValueError(f"{tile_size = }; expected at least 1 pixel")
    candidates = candidate_grids(max_tiles)
    ratio, area = width / height, width * height
    if policy == "closest":
        best, best_difference = candidates[0], float("inf")
        for grid in candidates:
            difference = abs(ratio - grid.columns / grid.rows)
            if difference < best_difference:
                best, best_difference = grid, difference
            elif difference == best_difference and area > 0.5 * tile_size * tile_size * grid.tiles:
                best = grid
        return best
    if policy == "area_weighted":
        best, best_score = candidates[0], float("-inf")
        for grid in candidates:
            grid_ratio = grid.columns / grid.rows
            coverage = min(grid.tiles * tile_size * tile_size / area, 0.6)
            score = coverage * min(grid_ratio / ratio, ratio / grid_ratio)
            if score > best_score:
                best, best_score = grid, score
        return best
    raise ValueError(f"unknown tiling policy {policy!r}; valid ones are 'closest' and 'area_weighted'")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to upright RGB: EXIF rotation applied, transparency laid on white, 16 bit scaled, first frame of an animation."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        # Pillow clips 16-bit greys when it converts them; scale to 8 bits instead.
        return image.convert("I").point(lambda value: value * (255 / 65535)).convert("L").convert("RGB")
    if image.mode == "F":
        low, high = image.getextrema()
        scale = 255 / (high - low) if high > low else 0.0
        return image.point(lambda value: value * scale - low * scale).convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*TRANSPARENT_ON, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def open_image(source) -> Image.Image:
    """Open a path, a binary file or a Pillow image as upright RGB, fully decoded.

    Raises FileNotFoundError when the path does not exist and ValueError when the picture cannot be decoded.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if not (isinstance(source, str | Path) or hasattr(source, "read")):
        raise ValueError(f"found an image of type {type(source).__name__}; expected a path, a binary file or a Pillow image")
    name = str(source) if isinstance(source, str | Path) else getattr(source, "name", "an image in memory")
    if isinstance(source, str | Path) and not Path(source).is_file():
        raise FileNotFoundError(f"no image at {name}; check the path and the image folder")
    try:
        with Image.open(source) as image:
            size = (image.width, image.height)
            if size[0] * size[1] <= MAX_IMAGE_PIXELS:
                image.load()
                return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:
        # Not only OSError: of damaged bytes Pillow's readers let through whatever they stumble over, such as struct.error of EXIF.
        why = str(error).replace(repr(source), "its bytes")  # without an address in memory: the same fault, the same words
        raise ValueError(f"{name} is not a readable image ({why}); expected a complete PNG, JPEG, WebP, ... file") from error
    raise ValueError(f"{name} has {size[0]} x {size[1]} pixels; at most {MAX_IMAGE_PIXELS} are read; scale it down")


def tile_image(
    image: Image.Image, *, tile_size: int = 448, max_tiles: int = 12, policy: str = "closest", thumbnail: bool = True
) -> list[Image.Image]:
    """N RGB tiles of `tile_size` pixels a side: row by row, the thumbnail last (only when the grid has more than one tile).

    The image is resized (bicubic) to the grid's size, without keeping its exact aspect ratio, and cut. Errors: see `choose_grid`.
    """
    image = to_rgb(image)
    grid = choose_grid(image.width, image.height, tile_size=tile_size, max_tiles=max_tiles, policy=policy)
    resized = image.resize((grid.columns * tile_size, grid.rows * tile_size), Image.Resampling.BICUBIC)
    tiles = [
        resized.crop((column * tile_size, row * tile_size, (column + 1) * tile_size, (row + 1) * tile_size))
        for row in range(grid.rows)
        for column in range(grid.columns)
    ]
    if thumbnail and grid.tiles > 1:
        tiles.append(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
    return tiles
