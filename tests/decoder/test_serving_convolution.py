"""The convolution over kept windows is torch's, of the window and the tokens of each segment by itself."""

import pytest
import torch
import torch.nn.functional as F
from small_decoders import small_decoder

from vlm.decoder import serving_convolution
from vlm.decoder.layers import take_over_mixers
from vlm.decoder.packing import Packing
from vlm.decoder.serving_convolution import ServingConvolution


@pytest.fixture(params=["bias", "no bias"])
def mixer(request):
    torch.manual_seed(0)
    model = small_decoder("M", use_conv_bias=request.param == "bias").double()
    take_over_mixers(model)
    return model.model.layers[0].mixer


def obvious(mixer, tokens, window):
    """tokens (L, F), window (K - 1, F) -> (L, F), and the window after."""
    padded = torch.cat([window, tokens])
    summed = F.conv1d(padded.t()[None], mixer.conv1d.weight, mixer.conv1d.bias, groups=padded.shape[1])[0].t()
    return F.silu(summed), padded[len(tokens) :]


@pytest.mark.parametrize("lengths", [(5, 9, 3), (1, 2, 1, 7), (1,), (2, 2), (40, 1, 3, 33)])
@pytest.mark.parametrize("cached_bytes", [1, 2**12, 2**30])
@torch.no_grad()
def test_packed_segments(mixer, monkeypatch, lengths, cached_bytes):
    monkeypatch.setattr(serving_convolution, "CACHED_BYTES", cached_bytes)
    total, channels, taps = sum(lengths), mixer.conv_dim, mixer.conv_kernel_size
    fed = torch.randn(total, channels + 7, dtype=torch.float64)[:, 3 : 3 + channels]  # as split leaves it
    before = torch.randn(len(lengths), taps - 1, channels, dtype=torch.float64)
    packing = Packing(list(lengths), list(range(len(lengths))), [0] * len(lengths), fed.device)
    found, after = ServingConvolution(mixer).packed(fed, before, packing.borders(taps))
    for place, (tokens, piece) in enumerate(zip(fed.split(lengths), found.split(lengths), strict=True)):
        expected, window = obvious(mixer, tokens, before[place])
        torch.testing.assert_close(piece, expected)
        torch.testing.assert_close(after[place], window, rtol=0, atol=0)


@torch.no_grad()
def test_rows(mixer):
    padded = torch.randn(4, mixer.conv_kernel_size, mixer.conv_dim, dtype=torch.float64)
    found = ServingConvolution(mixer).rows(padded)
    for row, result in zip(padded, found, strict=True):
        torch.testing.assert_close(result, obvious(mixer, row[-1:], row[:-1])[0])


@torch.no_grad()
def test_another_activation(mixer):
    mixer.has_silu, mixer.act = False, torch.nn.Tanh()
    padded = torch.randn(2, mixer.conv_kernel_size, mixer.conv_dim, dtype=torch.float64)
    found = ServingConvolution(mixer).rows(padded)[0]
    summed = F.conv1d(padded[:1].mT, mixer.conv1d.weight, mixer.conv1d.bias, groups=mixer.conv_dim)[0].t()
    torch.testing.assert_close(found, summed.tanh())
