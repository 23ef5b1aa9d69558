"""Grids against a second, slow reading of the two published rules; tiles against Pillow pixel by pixel; every image mode; damaged files."""

import io
import random
import struct

import numpy as np
import pytest
from PIL import Image

from vlm.tiling import Grid, candidate_grids, choose_grid, open_image, tile_image, to_rgb


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def slow_closest(width, height, size, most):
    """Candidates 1 <= i*j <= most by i*j; least |W/H - i/j|; on a tie the later one only if W*H > 0.5 * size^2 * i * j."""
    pairs = sorted(((i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most), key=lambda pair: pair[0] * pair[1])
    least = min(abs(width / height - i / j) for i, j in pairs)
    nearest = [pair for pair in pairs if abs(width / height - pair[0] / pair[1]) == least]
    chosen = nearest[0]
    for i, j in nearest[1:]:
        if width * height > 0.5 * size**2 * i * j:
            chosen = (i, j)
    return chosen


def slow_area_weighted(width, height, size, most):
    """Largest min(i*j*size^2 / (W*H), 0.6) * min(r_t/r, r/r_t); the first best wins."""
    pairs = sorted(((i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most), key=lambda pair: pair[0] * pair[1])
    ratio = width / height

    def score(pair):
        i, j = pair
        return min(i * j * size * size / (width * height), 0.6) * min((i / j) / ratio, ratio / (i / j))

    return max(pairs, key=score)  # `max` keeps the first of equals


SLOW = {"closest": slow_closest, "area_weighted": slow_area_weighted}


@pytest.mark.parametrize("policy", SLOW)
@pytest.mark.parametrize(("size", "most"), [(448, 12), (448, 6), (64, 6), (448, 1), (336, 2)])
def test_grids_follow_the_published_rule(policy, size, most):
    """Random sizes, and sizes whose ratio is exactly that of a grid: those are the ties on which a wrong rule differs."""
    generator = random.Random(f"{policy}{size}{most}")
    sizes = [(generator.randint(1, 3000), generator.randint(1, 3000)) for _ in range(300)]
    for i in range(1, 7):
        for j in range(1, 7):
            sizes += [(i * scale, j * scale) for scale in (7, size // 2, size, size + 1, 2 * size)]
    for width, height in sizes:
        found = choose_grid(width, height, tile_size=size, max_tiles=most, policy=policy)
        assert tuple(found) == SLOW[policy](width, height, size, most), (width, height)


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (448, 448, (1, 1)),
        (800, 600, (4, 3)),
        (896, 448, (2, 1)),
        (2000, 1000, (4, 2)),
        (300, 3000, (1, 10)),
        (1, 1, (1, 1)),
        (10000, 1, (12, 1)),
    ],
)
def test_grids_worked_out_by_hand(width, height, grid):
    """896 x 448 has less than half the pixels of 4 x 2 tiles, 2000 x 1000 has more."""
    assert choose_grid(width, height) == Grid(*grid)


def test_candidates_are_all_grids_once():
    """A missing candidate would never be chosen, and nobody would see it."""
    grids = candidate_grids(12)
    assert len(grids) == len(set(grids)) == sum(12 // i for i in range(1, 13))
    assert [grid.tiles for grid in grids] == sorted(grid.tiles for grid in grids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0, "height": 5}, "found an image of 0 x 5"),
        ({"width": 5, "height": 5, "max_tiles": 0}, "max_tiles = 0"),
        ({"width": 5, "height": 5, "tile_size": 0}, "tile_size = 0"),
        ({"width": 5, "height": 5, "policy": "nearest"}, "valid ones are 'closest' and 'area_weighted'"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_grid(**arguments)


@pytest.mark.parametrize(("width", "height"), [(1000, 300), (300, 200), (200, 300), (130, 64), (64, 64), (90, 200)])
def test_tiles_are_pillow_s_bicubic_crops_row_by_row(width, height):
    """Columns before rows, another filter, or a crop before the resize moves what the encoder was trained on."""
    image = noise(width, height)
    grid = choose_grid(width, height, tile_size=64, max_tiles=6)
    whole = np.asarray(image.resize((grid.columns * 64, grid.rows * 64), Image.Resampling.BICUBIC))
    tiles = tile_image(image, tile_size=64, max_tiles=6)
    assert len(tiles) == grid.tiles + (grid.tiles > 1)
    for number, tile in enumerate(tiles[: grid.tiles]):
        row, column = divmod(number, grid.columns)
        expected = whole[row * 64 : (row + 1) * 64, column * 64 : (column + 1) * 64]
        assert np.array_equal(np.asarray(tile), expected)
    if grid.tiles > 1:
        assert np.array_equal(np.asarray(tiles[-1]), np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)))


def test_the_thumbnail_can_be_left_out():
    assert len(tile_image(noise(256, 64), tile_size=64, thumbnail=False)) == 4
    assert len(tile_image(noise(256, 64), tile_size=64)) == 5


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (4, 3), (10, 200, 30)), (10, 200, 30)),
        (Image.new("L", (4, 3), 77), (77, 77, 77)),
        (Image.new("1", (4, 3), 1), (255, 255, 255)),
        (Image.new("RGBA", (4, 3), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 3), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("LA", (4, 3), (0, 0)), (255, 255, 255)),
        (Image.new("CMYK", (4, 3), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("I;16", (4, 3), 65535), (255, 255, 255)),
        (Image.new("I;16", (4, 3), 32896), (128, 128, 128)),
        (Image.new("I", (4, 3), 32896), (128, 128, 128)),
        (Image.new("RGB", (4, 3), (0, 0, 255)).convert("P", palette=Image.Palette.ADAPTIVE), (0, 0, 255)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_upright_rgb(image, expected):
    """Pillow clips 16-bit greys to white and lays transparency on black: both make pictures unreadable without an error."""
    result = to_rgb(image)
    assert result.mode == "RGB" and result.size == (4, 3)
    assert max(abs(a - b) for a, b in zip(result.getpixel((1, 1)), expected, strict=True)) <= 1


def test_float_images_are_stretched_over_their_range():
    image = Image.fromarray(np.array([[-1.0, 0.0, 3.0]], dtype=np.float32))
    assert [to_rgb(image).getpixel((x, 0))[0] for x in range(3)] == [0, 63, 255]


def test_a_palette_s_transparent_colour_is_laid_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    content = io.BytesIO()
    image.save(content, "PNG", transparency=0)
    content.seek(0)
    result = open_image(content)
    assert result.getpixel((0, 0)) == (255, 255, 255) and result.getpixel((1, 0)) == (0, 0, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    """Phones store pictures lying on their side; the person who asks sees them upright. All eight ways, by one marked corner."""
    upright = Image.new("RGB", (32, 16), (255, 255, 255))
    upright.paste((255, 0, 0), (0, 0, 8, 8))
    turned = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # the inverse of what a viewer does
    stored = upright if turned is None else upright.transpose(Image.Transpose(turned))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.png"
    stored.save(path, exif=exif)
    result = open_image(path)
    assert result.size == (32, 16)
    assert result.getpixel((2, 2)) == (255, 0, 0) and result.getpixel((29, 13)) == (255, 255, 255)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (9, 7), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((3, 3)) == (255, 0, 0)


def test_the_callers_image_is_not_changed():
    image = Image.new("RGBA", (9, 7), (1, 2, 3, 4))
    tile_image(image, tile_size=16)
    assert image.mode == "RGBA" and image.size == (9, 7) and image.getpixel((0, 0)) == (1, 2, 3, 4)


@pytest.mark.parametrize(("kind", "keep"), [("PNG", 0.5), ("JPEG", 0.5), ("GIF", 0.3), ("PNG", 0.02), ("BMP", 0.5)])
def test_a_truncated_file_is_named(tmp_path, kind, keep):
    """Pillow raises six kinds of errors for damaged files; half a picture must never be answered about."""
    content = io.BytesIO()
    noise(60, 50).save(content, kind)
    path = tmp_path / f"half.{kind.lower()}"
    path.write_bytes(content.getvalue()[: int(len(content.getvalue()) * keep)])
    with pytest.raises(ValueError, match=f"half.{kind.lower()} is not a readable image"):
        open_image(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"<svg></svg>"])
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match="x.png is not a readable image"):
        open_image(tmp_path / "x.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_bytes_raise_nothing_but_value_errors():
    """A worker that reads a million pictures meets them all: 320 damaged files, each opened or refused."""
    generator = random.Random(0)
    refused = 0
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        content = io.BytesIO()
        noise(20, 14).save(content, kind)
        for _ in range(80):
            damaged = bytearray(content.getvalue())
            for _ in range(generator.choice((1, 3, 12))):
                damaged[generator.randrange(min(120, len(damaged)))] = generator.randrange(256)
            try:
                assert open_image(io.BytesIO(bytes(damaged[: generator.choice((None, len(damaged) // 2))]))).mode == "RGB"
            except ValueError:
                refused += 1
    assert refused > 60


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(("tag", "kind"), [(0x0100, 2), (0x011A, 7), (0x9000, 11)], ids=["width", "resolution", "version"])
def test_exif_that_pillow_cannot_write_again_is_a_broken_image(tag, kind):
    """Turning such a picture upright raises struct.error or TypeError: one of them ended a run of eight ranks, or a whole conversion."""
    entries = [struct.pack("<HHI4s", 0x0112, 3, 1, b"\x06"), struct.pack("<HHI4s", tag, kind, 4 if kind < 11 else 1, b"abc")]
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    content = io.BytesIO()
    noise(20, 14).save(content, "JPEG", exif=exif)
    with pytest.raises(ValueError, match="an image in memory is not a readable image"):
        open_image(io.BytesIO(content.getvalue()))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="no image at nowhere/x.png"):
        open_image("nowhere/x.png")


@pytest.mark.parametrize("source", [None, 5, np.zeros((4, 4, 3))])
def test_what_is_neither_path_nor_image_is_refused(source):
    """An AttributeError here would stop a whole batch of requests, not the one that is wrong."""
    with pytest.raises(ValueError, match="expected a path, a binary file or a Pillow image"):
        open_image(source)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm.tiling.MAX_IMAGE_PIXELS", 100)
    noise(11, 10).save(tmp_path / "big.png")
    with pytest.raises(ValueError, match="11 x 10 pixels; at most 100"):
        open_image(tmp_path / "big.png")
