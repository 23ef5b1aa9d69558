"""Every family's features and gradients on a GPU that is not there (tests/pretend_gpu.py): nothing of a tower stays behind."""

import copy

import pytest
import torch
from test_contract import TINY
from torch import nn

import vision_encoders.shared_statistics as shared_statistics
from vision_encoders import build_vision_encoder


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_over_ranks_goes_backwards_on_a_gpu(affine, one_rank, pretend_gpu):
    """CUDA's backward pass reads statistics and weight where a processor's does without."""
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", pretend_gpu.device):
        layer = nn.BatchNorm2d(3, affine=affine)
        layer = layer if device == "cpu" else pretend_gpu.put(layer)
        shared_statistics._wrap(layer)  # one rank alone would be left as it is
        given = x.clone().to(device).requires_grad_()
        (layer(given) * torch.arange(300.0, device=device).view(x.shape)).sum().backward()
        found.append([given.grad.cpu(), *(parameter.grad.cpu() for parameter in layer.parameters())])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


@pytest.fixture(params=TINY)
def encoder(request):
    torch.manual_seed(0)
    name, settings, _, _ = TINY[request.param]
    return build_vision_encoder(name, **settings)


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_features_and_gradients_are_those_of_a_processor(encoder, mode, request):
    pixels = torch.randn(2, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(encoder)
    gpu = request.getfixturevalue("pretend_gpu")  # behind the building, which tries towers on tensors without numbers
    gpu.put(other)
    with torch.inference_mode(mode == "inference"):
        expected, found = encoder(pixels), other(pixels.to(gpu.device))
    assert found.device == gpu.device
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    if mode == "training":
        weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))  # a normed tower's squares have no gradient
        for features in (expected, found):
            (features * weights.to(features.device)).sum().backward()
        largest = max(float(parameter.grad.abs().max()) for parameter in encoder.parameters() if parameter.grad is not None)
        for (name, mine), theirs in zip(encoder.named_parameters(), other.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), name
            if mine.grad is not None:
                torch.testing.assert_close(
                    theirs.grad.cpu(), mine.grad, rtol=1e-3, atol=1e-5 * largest, msg=name
                )  # of a key's bias it is rounding
