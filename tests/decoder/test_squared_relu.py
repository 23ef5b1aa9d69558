"""The FFN's activation against transformers' own."""

import pytest
import torch
from transformers.activations import ReLUSquaredActivation

from vlm.decoder.squared_relu import HybridSquaredReLU, SquaredReLU


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_stock_activation_to_the_bit(dtype):
    stock, ours = ReLUSquaredActivation(), ReLUSquaredActivation()
    HybridSquaredReLU.take_over(ours)
    torch.manual_seed(0)
    x, weights = torch.randn(3, 50, 7, dtype=dtype, requires_grad=True), torch.randn(3, 50, 7, dtype=dtype)
    x.data[0, 0, 0] = 0.0
    assert torch.equal(ours(x), stock(x))
    assert torch.equal(*(torch.autograd.grad(act(x), x, weights)[0] for act in (ours, stock)))


def test_without_a_gradient_the_stock_activation_runs(monkeypatch):
    ours = ReLUSquaredActivation()
    HybridSquaredReLU.take_over(ours)
    monkeypatch.setattr(SquaredReLU, "apply", lambda *_: pytest.fail("ours ran"))
    with torch.no_grad():
        assert torch.equal(ours(torch.tensor([-1.0, 0.0, 3.0])), torch.tensor([0.0, 0.0, 9.0]))
