"""Where sequences stand: the three ways to say it, and what is refused."""

import pytest
import torch

from vlm.decoder.layout import Layout


def test_a_pack_numbers_its_positions():
    """seq_idx and lengths must tell the same story, or convolution and attention would disagree on borders."""
    layout = Layout.packed([2, 1, 3])
    assert layout.is_packed and layout.lengths == (2, 1, 3)
    assert layout.seq_idx.tolist() == [[0, 0, 1, 2, 2, 2]]


@pytest.mark.parametrize("lengths", [[], [3, 0, 2], [-1]])
def test_an_empty_sequence_in_a_pack_is_refused(lengths):
    """An empty sequence would shift the numbers of all after it."""
    with pytest.raises(ValueError, match="expected at least one, each of at least one token"):
        Layout.packed(lengths)


def test_rows_mark_their_padding():
    layout = Layout.rows([3, 1], 3)
    assert layout.valid.tolist() == [[True, True, True], [True, False, False]] and layout.right_padded


def test_full_rows_have_no_mask():
    """A mask that is all true costs the fused attention path."""
    assert Layout.rows([4, 4], 4).valid is None
    assert Layout.from_mask(torch.ones(2, 4), 2, 4).valid is None


@pytest.mark.parametrize("lengths", [[5], [0, 2], []])
def test_a_row_longer_than_the_width_is_refused(lengths):
    with pytest.raises(ValueError, match="expected each between 1 and the width 4"):
        Layout.rows(lengths, 4)


def test_masks_are_read_on_both_sides():
    """Left padding taken for right padding would read the wrong positions as text."""
    right = Layout.from_mask(torch.tensor([[1, 1, 0], [1, 1, 1]]), 2, 3)
    left = Layout.from_mask(torch.tensor([[0, 1, 1], [1, 1, 1]]), 2, 3)
    assert right.right_padded and not left.right_padded
    assert right.lengths == left.lengths == (2, 3)


@pytest.mark.parametrize("mask", [[[1, 0, 1]], [[0, 1, 0]], [[1, 1, 0], [0, 1, 1]]])
def test_padding_in_the_middle_is_refused(mask):
    """A recurrent state cannot skip a hole; computing on would give a wrong answer without a word."""
    with pytest.raises(ValueError, match="padding inside a row"):
        Layout.from_mask(torch.tensor(mask), len(mask), 3)


def test_an_empty_row_is_named():
    with pytest.raises(ValueError, match="row 1 of attention_mask has no token"):
        Layout.from_mask(torch.tensor([[1, 1], [0, 0]]), 2, 2)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected \(B, T\) = \(2, 3\)"):
        Layout.from_mask(torch.ones(2, 4), 2, 3)
