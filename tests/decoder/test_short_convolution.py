"""The hand-written sum over taps: activation, gradients, block borders, dtypes, and what may not cross a sequence border."""

import pytest
import torch
import torch.nn.functional as F

import vlm.decoder.short_convolution as short_convolution
from vlm.decoder.short_convolution import Borders, ShortConvolution

CHANNELS = 6
LENGTHS = (1, 40, 2, 3, 90, 1, 1, 33)


def stock(x, weight, bias, lengths, silu):
    """x (T, F) by torch's depthwise convolution, sequence by sequence."""
    taps = weight.shape[1]
    parts = [
        F.conv1d(F.pad(part.t()[None], (taps - 1, 0)), weight[:, None], bias, groups=weight.shape[0])[0].t() for part in x.split(lengths)
    ]
    return F.silu(torch.cat(parts)) if silu else torch.cat(parts)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 32 positions, so that sequences cross them."""
    monkeypatch.setattr(short_convolution, "BLOCK_ELEMENTS", 32 * CHANNELS)


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_torch(taps, silu, with_bias):
    """Windows over a block border, the first positions of a sequence at a block border, sequences shorter than the window."""
    torch.manual_seed(taps)
    wide = torch.randn(sum(LENGTHS), 3 * CHANNELS)  # a slice of a projection, not contiguous
    x, weight = wide[:, 2 : 2 + CHANNELS].requires_grad_(), torch.randn(CHANNELS, taps, requires_grad=True)
    bias = torch.randn(CHANNELS, requires_grad=True) if with_bias else None
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
    weights = torch.randn(x.shape)
    found, expected = ShortConvolution.apply(x, weight, bias, Borders(LENGTHS, taps, x.device), silu), stock(x, weight, bias, LENGTHS, silu)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_nothing_of_a_neighbour_comes_over_a_border(value):
    """Multiplied by zero, an infinity would still be a NaN; subtracted afterwards, a large number would leave its rounding."""
    torch.manual_seed(0)
    weight, bias = torch.randn(CHANNELS, 4), torch.randn(CHANNELS)
    x = torch.randn(30, CHANNELS)
    spoiled = x.clone()
    spoiled[10:20] = value
    kept = [torch.arange(10), torch.arange(20, 30)]
    results = []
    for tensor in (x, spoiled):
        tensor = tensor.clone().requires_grad_()
        y = ShortConvolution.apply(tensor, weight, bias, Borders((10, 10, 10), 4, x.device), True)
        (gradient,) = torch.autograd.grad(torch.cat([y[rows] for rows in kept]).sum(), tensor)
        results.append([y[rows].detach() for rows in kept] + [gradient[rows] for rows in kept])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_half_precision_is_summed_in_float32():
    torch.manual_seed(1)
    x = torch.randn(sum(LENGTHS), CHANNELS).bfloat16().requires_grad_()
    weight, bias = torch.randn(CHANNELS, 4).bfloat16().requires_grad_(), torch.randn(CHANNELS).bfloat16().requires_grad_()
    wide = [tensor.detach().float().requires_grad_() for tensor in (x, weight, bias)]
    found, expected = ShortConvolution.apply(x, weight, bias, Borders(LENGTHS, 4, x.device), True), stock(*wide, LENGTHS, True)
    assert torch.equal(found, expected.bfloat16())
    weights = torch.randn(x.shape).bfloat16()
    gradients = torch.autograd.grad(found, (x, weight, bias), weights), torch.autograd.grad(expected, wide, weights.float())
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2)
