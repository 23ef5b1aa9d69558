"""The encoder's in-place way equals the tower's own forward, and steps aside where it would not."""

import pytest
import torch

from vision_encoders import build_vision_encoder
from vision_encoders.internvit_inference import can_run_in_place, features_in_place

SHAPE = {"image_size": 56, "patch_size": 14, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}


def small(**settings):
    torch.manual_seed(0)
    encoder = build_vision_encoder("internvit", **(SHAPE | settings))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [{}, {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}, {"use_mean_pooling": False}],
    ids=["layer norm", "rms norm and q, k norms", "norm at the end"],
)
def test_in_place_equals_the_tower_s_own_forward(settings, dtype):
    encoder = small(**settings).to(dtype)
    pixels = torch.randn(5, 3, 56, 56, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        expected = encoder.features(pixels)
    kept = pixels.clone()
    with torch.inference_mode():
        assert can_run_in_place(encoder.tower)
        found = encoder(pixels)
        whole = features_in_place(encoder.tower, pixels)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert (found - expected).abs().max() <= bound * expected.abs().max()
    assert torch.equal(whole[:, 1:], found) and torch.equal(pixels, kept)


def test_weights_are_not_written(tmp_path):
    """In place means activations: position embeddings and class token are added to fresh memory."""
    encoder = small()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with torch.inference_mode():
        first = encoder(torch.zeros(2, 3, 56, 56))
        assert torch.equal(first, encoder(torch.zeros(2, 3, 56, 56)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_training_goes_through_the_tower(monkeypatch):
    """Gradients need every activation: outside of inference mode nothing changes."""
    encoder = small()
    monkeypatch.setattr("vision_encoders.internvit.features_in_place", lambda *a: pytest.fail("not in inference mode"))
    encoder(torch.zeros(1, 3, 56, 56)).sum().backward()
    assert encoder.tower.encoder.layer[0].mlp.fc1.weight.grad is not None


def test_changed_layers_go_through_the_tower():
    """Another activation, a wrapped layer, a hook: what was put there must be what runs."""
    assert not can_run_in_place(small(hidden_act="gelu_new").tower)
    wrapped, hooked, training = small(), small(), small()
    wrapped.tower.encoder.layer[1].mlp.fc1 = torch.nn.Sequential(wrapped.tower.encoder.layer[1].mlp.fc1)
    hooked.tower.encoder.layer[0].attention.q_proj.register_forward_hook(lambda module, given, result: result * 0)
    training.train()
    for encoder in (wrapped, hooked, training):
        assert not can_run_in_place(encoder.tower)
    with torch.inference_mode():
        assert hooked(torch.zeros(1, 3, 56, 56)).isfinite().all()
