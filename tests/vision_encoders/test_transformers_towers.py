"""Towers of transformers from folders as their publishers wrote them: which layer, which weights, which size."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vision_encoders import build_vision_encoder

SHAPE = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}


def randomise(model):
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def write(folder, model, mean=(0.1, 0.2, 0.3)):
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": list(mean), "image_std": [0.5, 0.5, 0.5]}))
    return folder


@pytest.fixture(scope="module")
def clip():
    return randomise(transformers.CLIPModel(transformers.CLIPConfig(vision_config=SHAPE, text_config=TEXT, projection_dim=16)))


@pytest.fixture(scope="module")
def siglip():
    return randomise(transformers.SiglipModel(transformers.SiglipConfig(vision_config=SHAPE, text_config=TEXT)))


def small_radio(**changes):
    sizes = {"image_size": 64, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_img_size": 128}
    return randomise(transformers.RadioModel(transformers.RadioConfig(**sizes | changes)))


def test_clip_from_the_whole_models_folder_gives_the_last_but_one_layers_patches(clip, tmp_path):
    """The layer that LLaVA reads, through transformers' own list of hidden states; the text tower stays out."""
    encoder = build_vision_encoder("transformers:clip", checkpoint=write(tmp_path / "clip", clip))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(encoder(pixels), expected)
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))


def test_siglip_gives_its_normed_tokens(siglip, tmp_path):
    encoder = build_vision_encoder("transformers:siglip", checkpoint=write(tmp_path / "siglip", siglip))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), siglip.vision_model(pixels).last_hidden_state)


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_gives_patches_without_class_and_registers(tmp_path, registers):
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    sizes = {name: SHAPE[name] for name in SHAPE if name != "intermediate_size"}
    model = randomise(getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes)))
    name = "transformers:dinov2_with_registers" if registers else "transformers:dinov2"
    encoder = build_vision_encoder(name, checkpoint=write(tmp_path / "dinov2", model))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), model(pixels).last_hidden_state[:, 1 + registers :])


def test_radios_own_normalisation_becomes_mean_and_std(tmp_path):
    """Normalised here or in the tower, not in both: twice is the silent fault."""
    model = small_radio(norm_mean=[0.4, 0.5, 0.6], norm_std=[0.2, 0.3, 0.4])
    model.save_pretrained(tmp_path / "radio")
    encoder = build_vision_encoder("transformers:radio", checkpoint=tmp_path / "radio")
    raw = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    with torch.no_grad():
        torch.testing.assert_close(encoder((raw - mean) / std), model(raw).features)
    assert encoder.mean == pytest.approx((0.4, 0.5, 0.6))


def test_radios_original_names_are_read(tmp_path):
    """As on NVIDIA's pages: `radio_model.model.blocks.N.attn.qkv`, no layer scale."""
    model = small_radio(layerscale_value=1.0)
    for layer in model.encoder.layer:
        layer.layer_scale1.lambda1.data.fill_(1.0)
        layer.layer_scale2.lambda1.data.fill_(1.0)
    weights = {}
    parts = {"embeddings.patch_projection": "patch_generator.embedder", "embeddings.position_embedding": "patch_generator.pos_embed",
             "embeddings.cls_register_token": "patch_generator.cls_token.token"}  # fmt: skip
    state = model.state_dict()
    for key, tensor in state.items():
        if "lambda1" in key or ".attention.k_proj" in key or ".attention.v_proj" in key:
            continue
        if key.startswith(("input_conditioner", "summary_idxs")):
            weights[f"radio_model.{key}"] = tensor
            continue
        for ours, theirs in parts.items():
            key = key.replace(ours, theirs)
        key = key.replace("encoder.layer.", "blocks.").replace("attention.o_proj", "attn.proj")
        if ".attention.q_proj" in key:
            names = [key.replace("blocks.", "encoder.layer.").replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
            tensor, key = torch.cat([state[name] for name in names]), key.replace("attention.q_proj", "attn.qkv")
        weights[f"radio_model.model.{key}"] = tensor.contiguous()
    model.config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder = build_vision_encoder("transformers:radio", checkpoint=tmp_path)
    raw = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    with torch.no_grad():
        torch.testing.assert_close(encoder((raw - mean) / std), model(raw).features)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_positions_are_interpolated_for_another_tile_size(clip, siglip, tmp_path, name):
    """Equal to transformers' own interpolation while it runs."""
    model = {"clip": clip, "siglip": siglip}[name]
    encoder = build_vision_encoder(f"transformers:{name}", checkpoint=write(tmp_path / name, model), image_size=64)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        output = model.vision_model(pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        expected = output.hidden_states[-2][:, 1:] if name == "clip" else output.last_hidden_state
        torch.testing.assert_close(encoder(pixels), expected, rtol=1e-4, atol=1e-5)
    assert encoder.encoder_settings["image_size"] == 64


def test_radio_takes_any_tile_size(tmp_path):
    small_radio().save_pretrained(tmp_path)
    encoder = build_vision_encoder("transformers:radio", checkpoint=tmp_path, image_size=96)
    assert encoder(torch.randn(1, 3, 96, 96)).shape == (1, 36, 32)
    rebuilt = build_vision_encoder(**json.loads(json.dumps(encoder.encoder_settings)))
    rebuilt.load_state_dict(encoder.state_dict())


def test_a_missing_weight_is_an_error(clip, tmp_path):
    """transformers would draw it at random with a printed table."""
    folder = write(tmp_path / "clip", clip)
    weights = load_file(folder / "model.safetensors")
    gone = next(key for key in weights if key.startswith("vision_model.encoder.layers.1.") and key.endswith("fc1.bias"))
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing: .*encoder.layers.1.mlp.fc1.bias"):
        build_vision_encoder("transformers:clip", checkpoint=folder)


def test_an_unexpected_weight_is_an_error(siglip, tmp_path):
    folder = write(tmp_path / "siglip", siglip)
    weights = load_file(folder / "model.safetensors") | {"vision_model.surprise": torch.ones(1)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 unexpected: .*surprise"):
        build_vision_encoder("transformers:siglip", checkpoint=folder)


def test_damage_and_contradictions_are_named(clip, siglip, tmp_path):
    folder = write(tmp_path / "clip", clip)
    with pytest.raises(ValueError, match="describes a model of type 'clip'; expected siglip or"):
        build_vision_encoder("transformers:siglip", checkpoint=folder)
    with pytest.raises(ValueError, match="hidden_size=64 contradicts the checkpoint, which has 32"):
        build_vision_encoder("transformers:clip", checkpoint=folder, hidden_size=64)
    with pytest.raises(ValueError, match="needs the folder"):
        build_vision_encoder("transformers:clip", checkpoint=folder / "model.safetensors")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="model.safetensors is damaged or truncated"):
        build_vision_encoder("transformers:clip", checkpoint=folder)


def test_loading_is_quiet(clip, tmp_path, capfd):
    folder = write(tmp_path / "clip", clip)
    capfd.readouterr()
    build_vision_encoder("transformers:clip", checkpoint=folder)
    assert capfd.readouterr() == ("", "")
