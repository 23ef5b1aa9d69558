"""The causal convolution against torch's own, in packs, padded rows and pieces."""

import pytest
import torch
import torch.nn.functional as F

from vlm.decoder.convolution import causal_convolution
from vlm.decoder.layout import Layout

CHANNELS = 5


def stock(x, weight, bias):
    """x (B, T, F) by torch's depthwise convolution with zeros before the text."""
    taps = weight.shape[1]
    return F.conv1d(F.pad(x.transpose(1, 2), (taps - 1, 0)), weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)


@pytest.fixture(params=[1, 2, 4])
def kernel(request):
    generator = torch.Generator().manual_seed(request.param)
    return torch.randn(CHANNELS, request.param, generator=generator), torch.randn(CHANNELS, generator=generator)


@pytest.mark.parametrize("length", [1, 2, 3, 9])
@pytest.mark.parametrize("with_bias", [True, False])
def test_full_rows_equal_torch(kernel, length, with_bias):
    weight, bias = kernel[0], kernel[1] if with_bias else None
    x = torch.randn(2, length, CHANNELS)
    y, window = causal_convolution(x, weight, bias, Layout.rows([length] * 2, length))
    torch.testing.assert_close(y, stock(x, weight, bias))
    assert window.shape == (2, weight.shape[1] - 1, CHANNELS)


def test_a_pack_equals_its_sequences(kernel):
    """A window that reaches over a border lets three tokens of one sample into the next; also where samples are shorter than the window."""
    lengths = [1, 1, 2, 7, 3, 1]
    x = torch.randn(1, sum(lengths), CHANNELS, requires_grad=True)
    y, window = causal_convolution(x, *kernel, Layout.packed(lengths))
    assert window is None
    parts = [stock(part, *kernel) for part in x.split(lengths, dim=1)]
    torch.testing.assert_close(y, torch.cat(parts, dim=1))
    (gradient,) = torch.autograd.grad(y[:, 2:4].sum(), x)
    assert not gradient[:, :2].any() and not gradient[:, 4:].any()


def test_pieces_equal_the_whole(kernel):
    """The window kept between calls must hold the last K - 1 inputs, also when a piece is shorter than that."""
    x = torch.randn(2, 12, CHANNELS)
    state, outputs = None, []
    for piece in x.split([1, 1, 5, 2, 3], dim=1):
        y, state = causal_convolution(piece, *kernel, Layout.rows([piece.shape[1]] * 2, piece.shape[1]), state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), stock(x, *kernel))


def test_padding_is_not_kept_as_a_row_s_last_inputs(kernel):
    """Ragged rows: what follows a short row must see its text, not its padding."""
    x = torch.randn(3, 6, CHANNELS)
    lengths = [6, 2, 4]
    _, window = causal_convolution(x, *kernel, Layout.rows(lengths, 6))
    more = torch.randn(3, 3, CHANNELS)
    y, _ = causal_convolution(more, *kernel, Layout.rows([3] * 3, 3), window)
    for row, length in enumerate(lengths):
        alone = stock(torch.cat([x[row, :length], more[row]])[None], *kernel)
        torch.testing.assert_close(y[row], alone[0, length:])


def test_a_pack_cannot_continue_a_state():
    """Whose state would it be?"""
    with pytest.raises(ValueError, match="packed row cannot continue"):
        causal_convolution(torch.zeros(1, 3, CHANNELS), torch.zeros(CHANNELS, 4), None, Layout.packed([1, 2]), torch.zeros(1, 3, CHANNELS))
