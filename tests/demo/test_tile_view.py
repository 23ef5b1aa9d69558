import re

import numpy as np
import pytest
from PIL import Image
from scripted_engine import ScriptedEngine

from demo.tile_view import tiles_html, view_pictures
from vlm.rendering import THUMBNAIL_TAG


def _prepared(processor, pictures, **settings):
    content = [{"type": "image", "image": picture} for picture in pictures]
    return processor.prepare([{"role": "user", "content": content}], **settings)


def test_tiles_are_the_pixels_of_the_model_in_prompt_order():
    processor = ScriptedEngine().processor
    pictures = [("a", Image.radial_gradient("L").convert("RGB").resize((48, 16))), ("b", Image.new("RGB", (16, 16)))]
    prepared = _prepared(processor, [picture for _, picture in pictures])
    views = view_pictures(processor, pictures, prepared)
    shown = np.stack([np.asarray(tile) for view in views for _, tile in view.tiles])
    assert (shown == prepared.pixels.numpy()).all()
    tags = [tag for view in views for tag, _ in view.tiles]
    ids = processor.tokenizer.convert_ids_to_tokens(prepared.rendered.input_ids)
    assert tags == [token for token in ids if token.startswith("<tile_")]
    assert [(view.grid, view.has_thumbnail, view.visual_tokens) for view in views] == [((3, 1), True, 16), ((1, 1), False, 4)]
    assert views[1].tiles[0][0] == THUMBNAIL_TAG


@pytest.mark.parametrize("policy", ["closest", "area_weighted"])
@pytest.mark.parametrize("size", [(70, 20), (20, 70), (64, 48), (500, 500), (33, 90)])
def test_the_grid_shown_is_the_one_that_was_cut_when_tiles_were_taken_away(policy, size):
    processor = ScriptedEngine(max_tiles=12).processor
    processor.image_processor.policy = policy
    picture = Image.radial_gradient("L").convert("RGB").resize(size)
    for limit in range(1, 13):
        prepared = _prepared(processor, [picture], max_tiles=limit)
        grid = view_pictures(processor, [("a", picture)], prepared)[0].grid
        resized = np.asarray(picture.resize((grid.columns * 16, grid.rows * 16), Image.Resampling.BICUBIC))
        last_of_first_row = resized[:16, -16:]
        assert (prepared.pixels[grid.columns - 1].numpy() == last_of_first_row).all()


def test_another_number_of_pictures_is_refused():
    processor = ScriptedEngine().processor
    with pytest.raises(ValueError, match="found 0 pictures for 1 prepared images"):
        view_pictures(processor, [], _prepared(processor, [Image.new("RGB", (16, 16))]))


def test_the_newest_picture_is_open_and_names_are_escaped():
    processor = ScriptedEngine().processor
    pictures = [("<b>old</b>", Image.new("RGB", (16, 16))), ("new", Image.new("RGB", (32, 32)))]
    page = tiles_html(view_pictures(processor, pictures, _prepared(processor, [picture for _, picture in pictures])))
    assert re.findall(r"<details( open)?><summary>([^<]*)<", page) == [
        (" open", "Picture 2: new"),
        ("", "Picture 1: &lt;b&gt;old&lt;/b&gt;"),
    ]
    assert "2 × 2 grid + thumbnail" in page and "20 visual tokens" in page and page.count("<img") == 6
    assert re.findall(r"<span>(&lt;[^<]*)</span>", page)[0] == "&lt;tile_01&gt;"
