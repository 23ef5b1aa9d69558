"""The norm against transformers' own: values and gradients, several blocks, dtypes, what it keeps, and which of the two runs."""

import pytest
import torch
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm

import vlm.decoder.norm as norm_module
from vlm.decoder.norm import HybridNorm, RMSNorm

CHANNELS = 24


def pair(dtype=torch.float32):
    """The stock module with weights that are not ones, and ours with the same."""
    torch.manual_seed(0)
    stock, ours = (NemotronHRMSNorm(CHANNELS, eps=1e-3).to(dtype) for _ in range(2))
    with torch.no_grad():
        stock.weight.uniform_(0.5, 2.0)
    ours.load_state_dict(stock.state_dict())
    HybridNorm.take_over(ours)
    return stock, ours


def with_gradients(norm, x, weights):
    y = norm(x)
    return (y, *torch.autograd.grad(y, (x, norm.weight), weights))


@pytest.mark.parametrize("shape", [(1,), (37,), (2, 50)])
def test_it_equals_the_stock_norm(shape, monkeypatch):
    """Blocks of 16 positions: a block that is forgotten, taken twice, or summed wrongly into the gradient of the weight shows."""
    monkeypatch.setattr(norm_module, "BLOCK_ELEMENTS", 16 * CHANNELS)
    stock, ours = pair()
    x, weights = torch.randn(*shape, CHANNELS, requires_grad=True), torch.randn(*shape, CHANNELS)
    for found, expected in zip(with_gradients(ours, x, weights), with_gradients(stock, x, weights), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_its_gradient_is_that_of_its_values():
    """Without the stock module, which narrows to float32: numeric differences in float64; of a slice, and of x alone too."""
    _, ours = pair(torch.float64)
    x = torch.randn(5, 3 * CHANNELS, dtype=torch.float64)[:, :CHANNELS].requires_grad_()
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradcheck(lambda weight: RMSNorm.apply(x.detach(), weight, 1e-3), ours.weight)
    ours.weight.requires_grad_(False)
    assert torch.autograd.gradcheck(ours, x)


def test_float32_weights_do_not_widen_bfloat16_states():
    """Computed in float32 and rounded once, forwards and backwards."""
    stock, ours = pair()
    x, weights = torch.randn(50, CHANNELS).bfloat16().requires_grad_(), torch.randn(50, CHANNELS).bfloat16()
    wide = x.detach().float().requires_grad_()
    y, of_x, of_weight = with_gradients(ours, x, weights)
    expected = with_gradients(stock, wide, weights.float())
    assert (y.dtype, of_x.dtype, of_weight.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert torch.equal(y, expected[0].bfloat16())
    torch.testing.assert_close(of_x.float(), expected[1], rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(of_weight, expected[2], rtol=1e-5, atol=1e-5)


def test_it_keeps_its_input_and_a_number_a_position():
    _, ours = pair()
    x, saved = torch.randn(9, CHANNELS, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        ours(x)
    assert sorted(tensor.numel() for tensor in saved) == [9, CHANNELS, x.numel()]


def test_a_rest_is_added_to_the_weight_with_and_without_gradients():
    stock, ours = pair()
    ours.weight.data = ours.weight.data.bfloat16()
    x = torch.randn(9, CHANNELS)
    assert not torch.allclose(ours(x), stock(x), rtol=1e-4)
    ours.rests = {"weight": stock.weight.detach() - ours.weight.detach()}
    torch.testing.assert_close(ours(x), stock(x))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x))
    assert HybridNorm.rests == {}


def test_without_a_gradient_the_stock_norm_runs(monkeypatch):
    stock, ours = pair()
    monkeypatch.setattr(RMSNorm, "apply", lambda *_: pytest.fail("ours ran"))
    x = torch.randn(9, CHANNELS)
    with torch.no_grad():
        assert torch.equal(ours(x), stock(x))
        half = x.bfloat16()
        assert ours(half).dtype == torch.bfloat16
        torch.testing.assert_close(ours(half).float(), stock(half.float()), rtol=2**-7, atol=1e-6)
