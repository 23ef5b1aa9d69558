"""Show the tiles the model saw: cut from the tensor that goes into the encoder, not from the picture a second time.

The tiles stand in their grid as they were cut, each under the tag it has in the prompt, the thumbnail after them.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from vlm.processing import Prepared, VLMProcessor
from vlm.rendering import THUMBNAIL_TAG, tile_tag
from vlm.tiling import Grid, choose_grid

__all__ = ["TILE_STYLE", "PictureView", "tiles_html", "view_pictures"]

SMALL_TILE_PX = 160  # below this a tile is shown with hard edges and stored without loss


@dataclass(frozen=True)
class PictureView:
    """One picture as the model has it. width and height in pixels, upright; tiles: (tag, RGB image) in prompt order, thumbnail last."""

    name: str
    width: int
    height: int
    grid: Grid
    tiles: tuple[tuple[str, Image.Image], ...]
    visual_tokens: int

    @property
    def has_thumbnail(self) -> bool:
        """Whether the whole picture stands beside its tiles; a picture of one tile is its own thumbnail."""
        return len(self.tiles) > self.grid.tiles


def view_pictures(processor: VLMProcessor, pictures: Sequence[tuple[str, Image.Image]], prepared: Prepared) -> list[PictureView]:
    """(name, upright picture) of each image of `prepared`, in order -> what the model gets of it.

    Raises ValueError when pictures and prepared images differ in number.
    """
    if len(pictures) != len(prepared.num_tiles):
        raise ValueError(f"found {len(pictures)} pictures for {len(prepared.num_tiles)} prepared images; expected the same ones")
    settings, start, views = processor.image_processor, 0, []
    for (name, picture), count in zip(pictures, prepared.num_tiles, strict=True):
        # The best grid within a limit is also the best within its own number of tiles, so the limit it was chosen under is not needed.
        in_grid = count - 1 if settings.thumbnail and count > 1 else count
        grid = choose_grid(picture.width, picture.height, tile_size=settings.tile_size, max_tiles=in_grid, policy=settings.policy)
        images = [Image.fromarray(pixels.numpy()) for pixels in prepared.pixels[start : start + count]]  # count of (H, W, 3)
        # The renderer gives the last tile the thumbnail's tag, the only tile of a small picture too.
        tags = [*(tile_tag(number) for number in range(1, count)), THUMBNAIL_TAG]
        tokens = count * processor.visual_tokens_per_tile
        views.append(PictureView(name, picture.width, picture.height, grid, tuple(zip(tags, images, strict=True)), tokens))
        start += count
    return views


def _image_source(tile: Image.Image) -> str:
    buffer = io.BytesIO()
    kind = "png" if tile.width < SMALL_TILE_PX else "jpeg"
    tile.save(buffer, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _tile_html(tag: str, tile: Image.Image) -> str:
    crisp = " crisp" if tile.width < SMALL_TILE_PX else ""
    words = html.escape(tag, quote=True)
    # A hidden checkbox makes a click enlarge the tile, without a script.
    return (
        f'<label class="tile{crisp}" title="{words}: click to enlarge"><input type="checkbox" aria-label="enlarge {words}">'
        f'<img src="{_image_source(tile)}" alt="{words}"><span>{words}</span></label>'
    )


def tiles_html(views: Sequence[PictureView]) -> str:
    """All pictures of the conversation, the newest first and open, the earlier ones folded."""
    parts = []
    for number in range(len(views), 0, -1):
        view = views[number - 1]
        tiles = [_tile_html(tag, tile) for tag, tile in view.tiles]
        thumbnail = ""
        if view.has_thumbnail:
            thumbnail = f'<div class="thumbnail">{tiles.pop()}<p>the whole picture once more, as its thumbnail</p></div>'
        one = len(view.tiles) == 1
        per_tile = view.visual_tokens // len(view.tiles)
        cut = "one tile" if one else f"{view.grid.columns} × {view.grid.rows} grid{' + thumbnail' if view.has_thumbnail else ''}"
        size = view.tiles[0][1].width
        parts.append(
            f"<details{' open' if number == len(views) else ''}><summary>Picture {number}: {html.escape(view.name)}</summary>"
            f'<p class="facts"><b>{view.width} × {view.height}</b> px <i>→</i> <b>{cut}</b> of {size} px <i>→</i> '
            f"<b>{view.visual_tokens:,} visual tokens</b> <span>({len(view.tiles)} × {per_tile})</span></p>"
            f'<div class="grid{" one" if one else ""}" style="--columns:{view.grid.columns}">{"".join(tiles)}</div>{thumbnail}</details>'
        )
    return f'<div class="tile-view">{"".join(parts)}</div>'


TILE_STYLE = """
.tile-view details{margin:0 0 10px}
.tile-view summary{cursor:pointer;font-weight:600;overflow-wrap:anywhere}
.tile-view .facts{margin:6px 0 10px;color:var(--body-text-color-subdued);font-size:var(--text-sm)}
.tile-view .facts span{white-space:nowrap}
.tile-view .facts b{color:var(--body-text-color);font-weight:600}
.tile-view .facts i{font-style:normal;opacity:.6;padding:0 2px}
.tile-view .grid{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,150px));gap:6px}
.tile-view .grid.one{grid-template-columns:minmax(0,220px)}
.tile-view .thumbnail{display:flex;align-items:center;gap:12px;margin-top:10px;padding-top:10px}
.tile-view .thumbnail{border-top:1px dashed var(--border-color-primary)}
.tile-view .thumbnail .tile{flex:0 0 168px}
.tile-view .thumbnail p{margin:0;color:var(--body-text-color-subdued);font-size:var(--text-sm)}
.tile-view .tile{display:block;cursor:zoom-in;min-width:0}
.tile-view .tile input{position:absolute;opacity:0;pointer-events:none}
.tile-view .tile img{display:block;width:100%;aspect-ratio:1;margin:0;border-radius:6px;border:1px solid var(--border-color-primary)}
.tile-view .tile.crisp img{image-rendering:pixelated}
.tile-view .tile span{display:block;font:11px/1.7 ui-monospace,Menlo,Consolas,monospace;color:var(--body-text-color-subdued);
text-align:center;overflow-wrap:anywhere}
.tile-view .tile input:focus-visible+img{outline:2px solid var(--color-accent)}
.tile-view .tile input:checked+img{position:fixed;inset:0;margin:auto;z-index:1000;width:min(86vw,86vh);cursor:zoom-out;
box-shadow:0 0 0 100vmax rgba(0,0,0,.72)}
"""
