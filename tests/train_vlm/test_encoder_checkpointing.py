"""Checkpointed encoder blocks give the same features and gradients, keep less, and run twice; running statistics are refused."""

import copy

import pytest
import torch
from torch import nn

from train_vlm.encoder_checkpointing import checkpoint_encoder
from train_vlm.freezing import encoder_blocks
from train_vlm.saved_activations import kept_by_encoder
from vision_encoders import build_vision_encoder

SMALL = {"image_size": 32, "patch_size": 8}
ENCODERS = {
    "internvit": SMALL | {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "num_attention_heads": 2},
    "timm:vit_tiny_patch16_224": SMALL | {"embed_dim": 32, "depth": 3, "num_heads": 2},
    "transformers:siglip": SMALL | {"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "num_attention_heads": 2},
}


@pytest.fixture(params=ENCODERS)
def encoder(request):
    torch.manual_seed(0)
    return build_vision_encoder(request.param, **ENCODERS[request.param]).train()


def bytes_kept(function) -> int:
    """What a forward pass leaves for the backward pass, in bytes, tensors of one memory once."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        function()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_features_and_gradients_are_the_same_and_less_is_kept(encoder):
    lean = copy.deepcopy(encoder)
    names = list(lean.state_dict())
    assert checkpoint_encoder(lean) == 3
    pixels, weights = torch.randn(2, 3, 32, 32), torch.randn(2, 16, 32)
    for each in (encoder, lean):
        (each(pixels) * weights).sum().backward()
    torch.testing.assert_close(lean(pixels), encoder(pixels), rtol=0, atol=0)
    for (name, expected), found in zip(encoder.named_parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=0, msg=name)
    assert list(lean.state_dict()) == names
    assert bytes_kept(lambda: lean(pixels)) < 0.5 * bytes_kept(lambda: encoder(pixels))


def test_blocks_run_twice_where_they_train_and_once_where_not(encoder):
    calls = []
    blocks = encoder_blocks(encoder)
    for place, block in enumerate(blocks):
        attention = next(module for module in block.modules() if isinstance(module, nn.LayerNorm))
        attention.register_forward_hook(lambda *_, place=place: calls.append(place))
    blocks[0].requires_grad_(False)
    checkpoint_encoder(encoder)
    encoder(torch.randn(1, 3, 32, 32)).sum().backward()
    assert sorted(calls) == [0, 1, 1, 2, 2]
    calls.clear()
    with torch.no_grad():
        encoder(torch.randn(1, 3, 32, 32))
    assert calls == [0, 1, 2]


def test_the_plan_counts_block_inputs_and_one_open_block(encoder):
    everything, lean = kept_by_encoder(encoder), kept_by_encoder(encoder, checkpointing=True)
    positions = lean - everything // 3
    assert positions in (3 * 16 * 32, 3 * 17 * 32)  # three inputs, with or without a class token
    assert lean < everything


def test_running_statistics_are_refused():
    tower = build_vision_encoder("timm:resnet10t", image_size=32).train()
    with pytest.raises(ValueError, match="keeps running statistics, which a second pass would count twice"):
        checkpoint_encoder(tower)
    assert checkpoint_encoder(tower.eval()) > 1
