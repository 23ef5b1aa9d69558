"""One contract, all families, tiny sizes, nothing downloaded."""

import builtins
import json

import pytest
import torch

from vision_encoders import VISION_ENCODERS, build_vision_encoder
from vision_encoders.contract import VisionEncoder, as_square

# label: (name, settings, grid side, width)
TINY = {
    "internvit": (
        "internvit",
        {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
        4,
        32,
    ),
    "clip": ("open_clip:ViT-B-32", {"image_size": 32, "patch_size": 8, "layers": 3, "width": 64, "head_width": 32}, 4, 64),
    "clip resnet": ("open_clip:RN50", {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}, 2, 256),
    "vit": ("timm:vit_tiny_patch16_224", {"image_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}, 2, 24),
    "registers": ("timm:vit_small_patch14_reg4_dinov2", {"image_size": 56, "depth": 2, "embed_dim": 24, "num_heads": 2}, 4, 24),
    "attention pool": ("timm:vit_base_patch16_siglip_224", {"image_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}, 2, 24),
    "rotary": ("timm:eva02_tiny_patch14_224", {"image_size": 28, "depth": 2, "embed_dim": 24, "num_heads": 2}, 2, 24),
    "convolutional": ("timm:resnet10t", {"image_size": 64, "output_stride": 8}, 8, 512),
    "transformers clip": (
        "transformers:clip",
        {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48},
        4,
        32,
    ),
    "transformers siglip": (
        "transformers:siglip",
        {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
        4,
        32,
    ),
    "transformers dinov2": (
        "transformers:dinov2_with_registers",
        {"image_size": 56, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        4,
        32,
    ),
    "transformers radio": (
        "transformers:radio",
        {"image_size": 64, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_img_size": 128},
        4,
        32,
    ),
    "channels last": (
        "timm:swin_tiny_patch4_window7_224",
        {"image_size": 32, "window_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]},
        4,
        32,
    ),
}


@pytest.fixture(params=TINY)
def tiny(request):
    torch.manual_seed(0)
    name, settings, side, width = TINY[request.param]
    return build_vision_encoder(name, **settings), name, side, width


def test_every_entry_of_the_registry_is_tried_here():
    assert {name.partition(":")[0] for name, *_ in TINY.values()} == {key.partition(":")[0] for key in VISION_ENCODERS}


def test_an_encoder_keeps_the_contract(tiny):
    encoder, name, side, width = tiny
    assert isinstance(encoder, VisionEncoder)
    assert not any(module.training for module in encoder.modules())
    assert type(encoder.image_size) is type(encoder.patch_size) is type(encoder.hidden_size) is int
    assert (encoder.image_size // encoder.patch_size, encoder.hidden_size) == (side, width)
    for figures in (encoder.mean, encoder.std):
        assert isinstance(figures, tuple) and [type(figure) for figure in figures] == [float] * 3
    with torch.no_grad():
        features = encoder(torch.randn(3, 3, encoder.image_size, encoder.image_size))
    assert features.shape == (3, side * side, width)
    assert features.dtype == torch.float32 and features.isfinite().all()


def test_tiles_do_not_see_each_other(tiny):
    encoder, _, _, _ = tiny
    pixels = torch.randn(3, 3, encoder.image_size, encoder.image_size)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels)[1:2], encoder(pixels[1:2]), rtol=1e-4, atol=1e-4)


def test_bfloat16_works_and_every_weight_takes_part(tiny):
    """A weight without a gradient is one the features do not need: heads and last blocks are taken off."""
    encoder, _, _, _ = tiny
    encoder.to(torch.bfloat16)
    features = encoder(torch.randn(2, 3, encoder.image_size, encoder.image_size))
    assert features.dtype == torch.bfloat16
    features.float().pow(2).sum().backward()
    assert [name for name, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_its_settings_rebuild_the_same_architecture(tiny):
    encoder, name, _, _ = tiny
    settings = json.loads(json.dumps(encoder.encoder_settings))
    rebuilt = build_vision_encoder(**settings)
    rebuilt.load_state_dict(encoder.state_dict())
    pixels = torch.randn(2, 3, encoder.image_size, encoder.image_size)
    with torch.no_grad():
        assert torch.equal(rebuilt(pixels), encoder(pixels))
    assert rebuilt.encoder_settings == encoder.encoder_settings
    assert (rebuilt.mean, rebuilt.std, rebuilt.patch_size) == (encoder.mean, encoder.std, encoder.patch_size)


def test_it_can_be_built_on_the_meta_device(tiny):
    """How from_pretrained builds the model around it."""
    encoder, _, _, _ = tiny
    with torch.device("meta"):
        shadow = build_vision_encoder(**encoder.encoder_settings)
    assert {name: tensor.shape for name, tensor in shadow.state_dict().items()} == {
        name: tensor.shape for name, tensor in encoder.state_dict().items()
    }


def test_patches_come_row_by_row():
    """A bright square in the top right corner moves feature number side - 1 (not the bottom left one) of a model without attention."""
    torch.manual_seed(0)
    encoder = build_vision_encoder("timm:resnet10t", image_size=64, output_stride=8)
    dark, bright = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    bright[:, :, :8, -8:] = 5.0
    with torch.no_grad():
        change = (encoder(bright) - encoder(dark)).abs().sum(-1)[0].view(8, 8)
    assert change[0, 7] > 10 * change[7, 0]


@pytest.mark.parametrize("shape", [(1, 3, 32, 40), (1, 3, 40, 40), (1, 1, 32, 32), (3, 32, 32)])
def test_pixels_of_another_shape_are_refused(shape):
    name, settings, _, _ = TINY["internvit"]
    encoder = build_vision_encoder(name, **settings)
    with pytest.raises(ValueError, match="expected \\(tiles, 3, 32, 32\\)"):
        encoder(torch.zeros(shape))


def test_mean_and_std_are_settings():
    name, settings, _, _ = TINY["vit"]
    encoder = build_vision_encoder(name, **settings, mean=[0.1, 0.2, 0.3], std=[1, 1, 1])
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("intern_vit", {}, "valid names: internvit, open_clip:MODEL, timm:MODEL, transformers:MODEL; did you mean 'internvit'"),
        ("openclip:ViT-B-32", {}, "did you mean 'open_clip:MODEL'"),
        ("timm", {}, "did you mean 'timm:MODEL'"),
        ("timm:", {}, "unknown vision encoder 'timm:'"),
        ("internvit:300m", {}, "unknown vision encoder 'internvit:300m'"),
        ("timm:resnet10", {}, "has no model 'resnet10'; did you mean .*resnet10t"),
        ("open_clip:ViT-B32", {}, "has no model 'ViT-B32'; did you mean .*ViT-B-32"),
        ("internvit", {"hiden_size": 8}, "unknown setting 'hiden_size' for 'internvit'; did you mean 'hidden_size'"),
        ("open_clip:ViT-B-32", {"imagesize": 8}, "did you mean 'image_size'"),
        ("open_clip:ViT-B-32", {"layers": 1, "width": 64}, "two are needed"),
        ("timm:resnet10t", {"output_strid": 8}, "does not take these settings"),
        ("timm:vit_tiny_patch16_224", {"image_size": 32, "dept": 8}, "does not take these settings"),
        ("timm:resnet10t", {"image_size": 176}, "which does not divide"),
        ("transformers:clipp", {}, "no encoder 'transformers:clipp'; the types are clip, siglip, .*; did you mean 'clip'"),
        ("transformers:siglip2", {}, "its naflex checkpoints take no pictures"),
        ("transformers:clip", {"hiden_size": 8}, "did you mean 'hidden_size'"),
        ("internvit", {"image_size": 60, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 4}, "no multiple of patch_size"),
        ("internvit", {"image_size": [32, 64], "patch_size": 8}, "tiles are square"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_nearest_name(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build_vision_encoder(name, **settings)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        build_vision_encoder("internvit", checkpoint=tmp_path / "nowhere")


@pytest.mark.parametrize(("name", "package"), [("timm:resnet10t", "timm"), ("open_clip:RN50", "open_clip")])
def test_a_missing_package_is_an_error_with_the_command(monkeypatch, name, package):
    original = builtins.__import__

    def without_package(module, *arguments, **keywords):
        if module.partition(".")[0] == package:
            raise ImportError(f"No module named {module!r}")
        return original(module, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_package)
    with pytest.raises(ImportError, match="pip install 'nemotron-h-vision\\[vision\\]'"):
        build_vision_encoder(name)


def test_a_grid_that_is_no_square_is_refused():
    with pytest.raises(ValueError, match="2 x 3 patches"):
        as_square(torch.zeros(1, 4, 2, 3), prefix_tokens=0, channels=4, channels_last=False)
