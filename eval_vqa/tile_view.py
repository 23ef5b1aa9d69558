"""A picture as the model saw it: its tiles in their grid, with a gap where it was cut, and the thumbnail beside them."""

from pathlib import Path

from PIL import Image

from eval_vqa.image_files import load_image

__all__ = ["shown_or_why_not", "tile_view"]

WIDEST_PX, CELL_PX = 456, 152  # of the whole view, and of a tile
GAP_PX, APART_PX = 3, 10
BETWEEN = (255, 255, 255)
NOTHING = (225, 225, 225)  # where a picture should stand


def tile_view(path: Path, tiles: dict, used: int | None = None) -> Image.Image:
    """An RGB picture of the tiles that `vlm.tiling.tile_image` cuts; small ones are enlarged by whole steps, so that pixels stay square.

    tiles: settings of the image processor (tile_size, max_tiles, policy, thumbnail); without tile_size the picture is shown whole. used:
    how many tiles the model was given, when the engine had to reduce them. Raises FileNotFoundError / ValueError as `load_image`.
    """
    from vlm.tiling import choose_grid, tile_image, to_rgb

    image = to_rgb(load_image(path)[0])
    if "tile_size" not in tiles:
        image.thumbnail((WIDEST_PX, WIDEST_PX))
        return image
    settings = {name: tiles[name] for name in ("tile_size", "max_tiles", "policy") if name in tiles}
    has_thumbnail = tiles.get("thumbnail", True)
    if used is not None and used < settings.get("max_tiles", 12):
        settings["max_tiles"] = max(1, used - 1 if has_thumbnail and used > 1 else used)
    grid = choose_grid(*image.size, **settings)
    pieces = tile_image(image, thumbnail=has_thumbnail, **settings)
    columns = grid.columns + (1 if len(pieces) > grid.tiles else 0)
    room = min(CELL_PX, (WIDEST_PX - APART_PX - GAP_PX * columns) // columns)
    size = settings["tile_size"] * max(1, room // settings["tile_size"]) if settings["tile_size"] <= room else room
    resample = Image.Resampling.NEAREST if size >= settings["tile_size"] else Image.Resampling.LANCZOS
    width = grid.columns * (size + GAP_PX) - GAP_PX + (APART_PX + size if columns > grid.columns else 0)
    view = Image.new("RGB", (width, grid.rows * (size + GAP_PX) - GAP_PX), BETWEEN)
    for number, piece in enumerate(pieces):
        row, column = divmod(number, grid.columns)
        place = (column * (size + GAP_PX), row * (size + GAP_PX)) if number < grid.tiles else (width - size, 0)
        view.paste(piece.resize((size, size), resample), place)
    return view


def shown_or_why_not(path: Path, tiles: dict, used: int | None = None) -> tuple[Image.Image, str | None]:
    """`tile_view`, and None; of a picture that is not there or broken (a run may go on without it) a grey one, and what is wrong."""
    try:
        return tile_view(path, tiles, used), None
    except (FileNotFoundError, ValueError) as error:
        return Image.new("RGB", (CELL_PX, CELL_PX), NOTHING), str(error)
