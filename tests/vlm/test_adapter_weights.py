"""Adapters merged, or left out, by names alone: what a model in one piece does by itself."""

import copy

import pytest
import torch

from vlm.adapter_weights import plain_weights
from vlm.lora import add_lora, merge_adapter, take_off_adapters

pytest.importorskip("peft")


@pytest.fixture
def taught(tiny_model):
    """A model whose adapters do something."""
    model = add_lora(copy.deepcopy(tiny_model), rank=3, alpha=7.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return model


def test_merging_by_name_is_merging_in_place(taught, tiny_model):
    found = plain_weights(taught, taught.state_dict(), merge=True)
    expected = merge_adapter(copy.deepcopy(taught)).state_dict()
    assert found.keys() == expected.keys() == tiny_model.state_dict().keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    moved = [name for name, tensor in tiny_model.state_dict().items() if not torch.equal(found[name], tensor)]
    assert len(moved) == sum(".lora_A." in name for name in taught.state_dict())


def test_left_out_they_leave_the_model_as_it_was(taught, tiny_model):
    found = plain_weights(taught, taught.state_dict(), merge=False)
    assert all(torch.equal(found[name], tensor) for name, tensor in tiny_model.state_dict().items())
    plain = take_off_adapters(taught)
    assert plain.state_dict().keys() == tiny_model.state_dict().keys() and not hasattr(plain, "lora_config")


def test_the_sum_is_made_in_float32(taught):
    """In bfloat16 a small update is lost beside a large weight, term by term."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in taught.state_dict().items()}
    found = plain_weights(taught, weights, merge=True)
    name = "language_model.model.layers.0.mixer.in_proj"
    up, down = (weights[f"{name}.lora_{kind}.default.weight"].float() for kind in "BA")
    expected = (weights[f"{name}.base_layer.weight"].float() + 7.0 / 3 * (up @ down)).bfloat16()
    assert torch.equal(found[f"{name}.weight"], expected) and found[f"{name}.weight"].dtype == torch.bfloat16


def test_there_must_be_adapters(tiny_model):
    with pytest.raises(ValueError, match="no adapters to merge or to leave out"):
        plain_weights(tiny_model, tiny_model.state_dict(), merge=True)
