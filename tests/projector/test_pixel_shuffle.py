"""Pixel shuffle: the order of positions and channels is the one InternVL's projectors were trained with."""

import pytest
import torch

from projector import pixel_shuffle


@pytest.mark.parametrize(("side", "factor"), [(4, 2), (6, 2), (6, 3), (3, 1)])
def test_every_element_stands_where_the_rule_says(side, factor):
    """Guards against a transposed grid and against InternVL's "v1" order: each input element has a value of its own."""
    tiles, width = 2, 5
    features = torch.arange(tiles * side * side * width, dtype=torch.float32).view(tiles, side * side, width)
    shuffled = pixel_shuffle(features, factor)
    out_side = side // factor
    assert shuffled.shape == (tiles, out_side * out_side, factor * factor * width)
    for tile in range(tiles):
        for row in range(side):
            for column in range(side):
                for channel in range(width):
                    token = (row // factor) * out_side + column // factor
                    place = ((row % factor) * factor + column % factor) * width + channel
                    assert shuffled[tile, token, place] == features[tile, row * side + column, channel]


def test_dtype_is_kept_and_a_gradient_reaches_every_feature():
    features = torch.randn(1, 16, 3, dtype=torch.bfloat16, requires_grad=True)
    shuffled = pixel_shuffle(features)
    shuffled.sum().backward()
    assert shuffled.dtype == torch.bfloat16
    assert torch.equal(features.grad, torch.ones_like(features))


def test_a_grid_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="5 x 5 patches does not divide by factor = 2"):
        pixel_shuffle(torch.zeros(1, 25, 4))


def test_tokens_that_are_no_square_are_refused():
    """A class token left in gives 17 tokens instead of 16."""
    with pytest.raises(ValueError, match="17 patches per tile are no square"):
        pixel_shuffle(torch.zeros(1, 17, 4))


def test_features_without_a_tile_dimension_are_refused():
    with pytest.raises(ValueError, match="expected \\(tiles, patches, width\\)"):
        pixel_shuffle(torch.zeros(16, 4))
