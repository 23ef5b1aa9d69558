"""timm and open_clip towers from their own checkpoints: which layer, which weights, which size."""

import json

import pytest
import timm
import torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file

from vision_encoders import build_vision_encoder

CLIP_MODEL = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 3, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}
VIT = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}


def randomise(model):
    torch.manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    return model.eval()


def write_clip(folder, model, config):
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    content = {"model_cfg": config, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def write_timm(folder, model, architecture, **arguments):
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    config = {"architecture": architecture, "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_clip_features_are_the_last_but_one_blocks_patches(tmp_path):
    model = randomise(CLIP(**CLIP_MODEL))
    seen = []
    model.visual.transformer.resblocks[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder = build_vision_encoder("open_clip:ViT-B-32", checkpoint=write_clip(tmp_path / "clip", model, CLIP_MODEL))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model.encode_image(pixels)
        torch.testing.assert_close(encoder(pixels), seen[0][:, 1:])
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (encoder.image_size, encoder.patch_size, encoder.hidden_size) == (32, 8, 32)


def test_quick_gelu_of_the_checkpoint_is_used(tmp_path):
    """The same weights without it give other features: the classic silent fault with OpenAI's weights."""
    model = randomise(CLIP(**CLIP_MODEL))
    folder = write_clip(tmp_path / "clip", model, CLIP_MODEL)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        quick = build_vision_encoder("open_clip:ViT-B-32", checkpoint=folder)(pixels)
        plain = build_vision_encoder("open_clip:ViT-B-32", checkpoint=folder, quick_gelu=False)(pixels)
    assert (quick - plain).abs().max() > 1e-3


def test_clip_positions_are_interpolated_for_another_tile_size(tmp_path):
    folder = write_clip(tmp_path / "clip", randomise(CLIP(**CLIP_MODEL)), CLIP_MODEL)
    small, large = (build_vision_encoder("open_clip:ViT-B-32", checkpoint=folder, image_size=size) for size in (32, 64))
    assert large(torch.randn(1, 3, 64, 64)).shape == (1, 64, 32)
    positions, resized = small.tower.positional_embedding, large.tower.positional_embedding
    assert torch.equal(positions[0], resized[0])
    # The middle of the four new positions that share an old one's place is near the old one only if rows and columns kept their order.
    coarse = torch.nn.functional.avg_pool2d(resized[1:].view(8, 8, 32).permute(2, 0, 1), 2).permute(1, 2, 0).reshape(16, 32)
    distances = torch.cdist(coarse, positions[1:])
    assert torch.equal(distances.argmin(-1), torch.arange(16))


def test_clip_weights_that_do_not_fit_are_listed(tmp_path):
    model = randomise(CLIP(**CLIP_MODEL))
    folder = write_clip(tmp_path / "clip", model, CLIP_MODEL | {"vision_cfg": CLIP_MODEL["vision_cfg"] | {"layers": 4}})
    with pytest.raises(ValueError, match="missing: transformer.resblocks.3.attn.in_proj_bias"):
        build_vision_encoder("open_clip:ViT-B-32", checkpoint=folder)


def test_a_text_model_is_refused(tmp_path):
    save_file({"text.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no keys that start with 'visual.'"):
        build_vision_encoder("open_clip:ViT-B-32", checkpoint=tmp_path)


@pytest.mark.parametrize(("trunk", "pool", "side", "prefix"), [("test_vit3", "map", 10, 1), ("test_vit", "avg", 10, 1)])
def test_a_timm_trunk_inside_open_clip_gives_its_normed_tokens(tmp_path, trunk, pool, side, prefix):
    """SigLIP's construction: the last block after the final norm. Which norm timm builds depends on the pooling ("avg" has none here)."""
    vision = {"image_size": 160, "timm_model_name": trunk, "timm_model_pretrained": False, "timm_pool": pool, "timm_proj": "none"}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": CLIP_MODEL["text_cfg"]}
    model = randomise(CustomTextCLIP(**config))
    encoder = build_vision_encoder("open_clip:ViT-B-16-SigLIP", checkpoint=write_clip(tmp_path / "siglip", model, config))
    pixels = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), model.visual.trunk.forward_features(pixels)[:, prefix:], rtol=1e-4, atol=1e-4)
    assert encoder.encoder_settings["name"] == f"timm:{trunk}"
    assert (encoder.image_size // encoder.patch_size, encoder.mean) == (side, (0.1, 0.2, 0.3))
    rebuilt = build_vision_encoder(**json.loads(json.dumps(encoder.encoder_settings)))
    rebuilt.load_state_dict(encoder.state_dict())


def test_a_timm_vit_loads_from_its_folder_without_class_token_or_head(tmp_path):
    model = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=7, **VIT))
    folder = write_timm(tmp_path / "vit", model, "vit_tiny_patch16_224", **VIT)
    encoder = build_vision_encoder("timm:vit_tiny_patch16_224", checkpoint=folder)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), model.forward_features(pixels)[:, 1:])
    assert (encoder.image_size, encoder.mean) == (32, (0.1, 0.1, 0.1))


def test_a_timm_vit_takes_another_tile_size(tmp_path):
    model = randomise(timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT))
    folder = write_timm(tmp_path / "vit", model, "vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2)
    encoder = build_vision_encoder("timm:vit_tiny_patch16_224", checkpoint=folder, image_size=64)
    assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, 16, 24)


def test_a_timm_file_alone_is_enough_and_keeps_its_dtype(tmp_path):
    model = timm.create_model("resnet10t", num_classes=10).to(torch.bfloat16).eval()
    torch.save(model.state_dict(), tmp_path / "resnet.pth")
    encoder = build_vision_encoder("timm:resnet10t", checkpoint=tmp_path / "resnet.pth", image_size=64, output_stride=8)
    assert encoder.weight_dtype == torch.bfloat16
    assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, 64, 512)


def test_timm_weights_that_do_not_fit_are_listed(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **VIT)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "norm.bias"}
    torch.save(weights | {"surprise": torch.ones(1)}, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="1 missing: norm.bias; 1 unexpected: surprise"):
        build_vision_encoder("timm:vit_tiny_patch16_224", checkpoint=tmp_path / "vit.pth", **VIT)


def test_another_architectures_folder_is_refused(tmp_path):
    folder = write_timm(tmp_path / "vit", timm.create_model("resnet10t"), "resnet10t")
    with pytest.raises(ValueError, match="describes 'resnet10t', not 'resnet18'; ask for 'timm:resnet10t'"):
        build_vision_encoder("timm:resnet18", checkpoint=folder)


def test_timms_internvit_gives_the_same_features_as_ours(tmp_path):
    """Two independent implementations of InternViT-300M on the same weights, made small."""
    name, sizes = "vit_intern300m_patch14_448", {"img_size": 56, "depth": 2, "embed_dim": 32, "num_heads": 4}
    model = randomise(timm.create_model(name, num_classes=0, **sizes))
    rename = {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding"}
    weights = {}
    for key, tensor in model.state_dict().items():
        key = rename.get(key, key).replace("patch_embed.proj", "embeddings.patch_embedding").replace("blocks.", "encoder.layers.")
        weights[key.replace(".ls1.gamma", ".ls1").replace(".ls2.gamma", ".ls2")] = tensor.contiguous()
    config = {"model_type": "intern_vit_6b", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
    config |= {"patch_size": 14, "image_size": 56, "norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = build_vision_encoder("internvit", checkpoint=tmp_path)
    through_timm = build_vision_encoder(f"timm:{name}", checkpoint=write_timm(tmp_path / "timm", model, name, **sizes))
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), through_timm(pixels), rtol=1e-4, atol=1e-4)
