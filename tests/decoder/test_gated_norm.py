"""The gated norm against transformers' own: values and gradients, several groups, several blocks, dtypes."""

import pytest
import torch
from transformers.models.nemotron_h import modeling_nemotron_h

import vlm.decoder.gated_norm as gated_norm
from vlm.decoder.gated_norm import GatedNorm

# transformers 5.17 takes Zamba2's, later ones have their own.
STOCK = getattr(modeling_nemotron_h, "NemotronHRMSNormGated", None) or modeling_nemotron_h.Zamba2RMSNormGated
CHANNELS = 24


def pair(groups: int, dtype=torch.float32):
    """The stock module with weights that are not ones, and ours with the same."""
    torch.manual_seed(0)
    stock = STOCK(CHANNELS, CHANNELS // groups, eps=1e-5).to(dtype)
    with torch.no_grad():
        stock.weight.uniform_(0.5, 2.0)
    return stock, lambda y, gate: GatedNorm.apply(y, gate, stock.weight, groups, 1e-5)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("length", [1, 37, 64])
def test_it_equals_the_stock_norm(groups, length, monkeypatch):
    """Blocks of 16 positions: a block that is forgotten, taken twice, or summed wrongly into the gradient of the weight shows."""
    monkeypatch.setattr(gated_norm, "BLOCK_ELEMENTS", 16 * CHANNELS)
    stock, ours = pair(groups)
    wide = torch.randn(length, 3 * CHANNELS)  # the gate is a slice of a projection, not contiguous
    y, gate = (torch.randn(length, CHANNELS).requires_grad_(), wide[:, :CHANNELS].requires_grad_())
    weights = torch.randn(length, CHANNELS)
    for found, expected in zip(
        (ours(y, gate), *torch.autograd.grad(ours(y, gate), (y, gate, stock.weight), weights)),
        (stock(y, gate), *torch.autograd.grad(stock(y, gate), (y, gate, stock.weight), weights)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_its_gradient_is_that_of_its_values():
    """Without the stock module: numeric differences in float64."""
    stock, ours = pair(2, torch.float64)
    inputs = [torch.randn(5, CHANNELS, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradcheck(lambda weight: GatedNorm.apply(*(t.detach() for t in inputs), weight, 2, 1e-5), (stock.weight,))


def test_half_precision_is_computed_in_float32():
    """The mean square of bfloat16 numbers in bfloat16 is off by a percent."""
    stock, ours = pair(1, torch.bfloat16)
    y, gate = (torch.randn(50, CHANNELS, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    assert torch.equal(ours(y, gate), stock(y, gate))
    weights = torch.randn(50, CHANNELS).bfloat16()
    wide = [tensor.detach().float().requires_grad_() for tensor in (y, gate)]
    expected = torch.autograd.grad(GatedNorm.apply(*wide, stock.weight.float(), 1, 1e-5), wide, weights.float())
    for found, true in zip(torch.autograd.grad(ours(y, gate), (y, gate), weights), expected, strict=True):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), true, rtol=1e-2, atol=1e-2)


def test_it_keeps_only_its_inputs():
    """Seven tensors of the size of y are what the stock norm keeps for its backward pass."""
    _, ours = pair(1)
    y, gate = (torch.randn(9, CHANNELS).requires_grad_() for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ours(y, gate)
    assert sum(tensor.numel() >= y.numel() for tensor in saved) == 2
