"""Every family's features and gradients on a GPU that is not there (tests/pretend_gpu.py): nothing of a tower stays behind."""

import copy

import pytest
import torch
from test_contract import TINY

from vision_encoders import build_vision_encoder


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
