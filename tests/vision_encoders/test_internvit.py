"""InternViT from both formats against a plain reference written from the description of the architecture.

Reference, one layer at a time: x + ls1 * attention(norm(x)), then x + ls2 * MLP(norm(x)); queries, keys and values from one packed
matrix; the 6B normalises queries and keys over the full width before the heads are split; class token first, position embedding
added, no norm at the end.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import InternVLVisionConfig, InternVLVisionModel

from vision_encoders import build_vision_encoder

WIDTH, HEADS, LAYERS, FFN, PATCH, SIZE, EPS = 24, 3, 3, 40, 4, 16, 1e-3
KINDS = {
    "300M": {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True},
    "6B": {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False},
}


def original_config(kind: str) -> dict:
    return {
        "model_type": "intern_vit_6b",
        "architectures": ["InternVisionModel"],
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "intermediate_size": FFN,
        "patch_size": PATCH,
        "image_size": SIZE,
        "layer_norm_eps": EPS,
        "hidden_act": "gelu",
        "drop_path_rate": 0.0,
        "use_flash_attn": True,
        "torch_dtype": "float32",
    } | KINDS[kind]


def original_weights(kind: str) -> dict[str, torch.Tensor]:
    """Random weights with OpenGVLab's names; nothing is 0 or 1, so that a weight left out shows."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    weights = {
        "embeddings.class_embedding": draw(1, 1, WIDTH),
        "embeddings.patch_embedding.weight": draw(WIDTH, 3, PATCH, PATCH),
        "embeddings.patch_embedding.bias": draw(WIDTH),
        "embeddings.position_embedding": draw(1, (SIZE // PATCH) ** 2 + 1, WIDTH),
    }
    for index in range(LAYERS):
        layer = {
            "attn.qkv.weight": draw(3 * WIDTH, WIDTH),
            "attn.proj.weight": draw(WIDTH, WIDTH),
            "attn.proj.bias": draw(WIDTH),
            "norm1.weight": 1 + draw(WIDTH),
            "norm2.weight": 1 + draw(WIDTH),
            "mlp.fc1.weight": draw(FFN, WIDTH),
            "mlp.fc1.bias": draw(FFN),
            "mlp.fc2.weight": draw(WIDTH, FFN),
            "mlp.fc2.bias": draw(WIDTH),
            "ls1": draw(WIDTH),
            "ls2": draw(WIDTH),
        }
        if kind == "300M":
            layer |= {"attn.qkv.bias": draw(3 * WIDTH), "norm1.bias": draw(WIDTH), "norm2.bias": draw(WIDTH)}
        else:
            layer |= {"attn.q_norm.weight": 1 + draw(WIDTH), "attn.k_norm.weight": 1 + draw(WIDTH)}
        weights |= {f"encoder.layers.{index}.{name}": tensor for name, tensor in layer.items()}
    return weights


def reference_features(weights: dict, kind: str, pixels: torch.Tensor) -> torch.Tensor:
    """pixels N 3 H W -> features N P C, slowly: one tile, one head and one patch at a time where that is plainer."""

    def norm(values, name):
        if kind == "6B":
            return values / (values.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weights[f"{name}.weight"]
        centred = values - values.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    side = pixels.shape[-1] // PATCH
    positions = weights["embeddings.position_embedding"]
    stored = SIZE // PATCH
    grid = positions[:, 1:].view(1, stored, stored, WIDTH).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(1, -1, WIDTH)
    positions = torch.cat([positions[:, :1], grid], dim=1)
    results = []
    for tile in pixels:
        patches = []
        for row in range(side):
            for column in range(side):
                patch = tile[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
                kernel = weights["embeddings.patch_embedding.weight"].flatten(1)
                patches.append(kernel @ patch.flatten() + weights["embeddings.patch_embedding.bias"])
        x = torch.cat([weights["embeddings.class_embedding"][0], torch.stack(patches)]) + positions[0]  # 1+P C
        for index in range(LAYERS):
            name = f"encoder.layers.{index}"
            packed = norm(x, f"{name}.norm1") @ weights[f"{name}.attn.qkv.weight"].T + weights.get(f"{name}.attn.qkv.bias", 0.0)
            q, k, v = packed[:, :WIDTH], packed[:, WIDTH : 2 * WIDTH], packed[:, 2 * WIDTH :]
            if kind == "6B":
                q, k = norm(q, f"{name}.attn.q_norm"), norm(k, f"{name}.attn.k_norm")
            heads, width = [], WIDTH // HEADS
            for head in range(HEADS):
                part = slice(head * width, (head + 1) * width)
                heads.append(torch.softmax(q[:, part] @ k[:, part].T / width**0.5, dim=-1) @ v[:, part])
            attended = torch.cat(heads, dim=-1) @ weights[f"{name}.attn.proj.weight"].T + weights[f"{name}.attn.proj.bias"]
            x = x + weights[f"{name}.ls1"] * attended
            inner = norm(x, f"{name}.norm2") @ weights[f"{name}.mlp.fc1.weight"].T + weights[f"{name}.mlp.fc1.bias"]
            inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
            x = x + weights[f"{name}.ls2"] * (inner @ weights[f"{name}.mlp.fc2.weight"].T + weights[f"{name}.mlp.fc2.bias"])
        results.append(x[1:])
    return torch.stack(results)


def write(folder, weights, config, layout="one"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if layout == "one":
        save_file(weights, folder / "model.safetensors")
    elif layout == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        names = sorted(weights)
        files = {name: f"model-{1 + position % 2:05d}-of-00002.safetensors" for position, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: weights[name] for name in names if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.mark.parametrize("layout", ["one", "sharded", "bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_original_format_gives_the_reference_features(tmp_path, kind, layout):
    weights = original_weights(kind)
    encoder = build_vision_encoder("internvit", checkpoint=write(tmp_path / kind, weights, original_config(kind), layout))
    assert (encoder.image_size, encoder.patch_size, encoder.hidden_size) == (SIZE, PATCH, WIDTH)
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), reference_features(weights, kind, pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [12, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_position_embeddings_are_interpolated_for_another_tile_size(tmp_path, kind, size):
    weights = original_weights(kind)
    encoder = build_vision_encoder("internvit", checkpoint=write(tmp_path / kind, weights, original_config(kind)), image_size=size)
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = encoder(pixels)
    assert features.shape == (1, (size // PATCH) ** 2, WIDTH)
    torch.testing.assert_close(features, reference_features(weights, kind, pixels), rtol=1e-4, atol=1e-4)


def test_transformers_format_gives_transformers_features(tmp_path):
    torch.manual_seed(0)
    config = InternVLVisionConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=2, intermediate_size=FFN, patch_size=PATCH, image_size=SIZE
    )
    model = InternVLVisionModel(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(tmp_path)
    encoder = build_vision_encoder("internvit", checkpoint=tmp_path)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), model(pixels).last_hidden_state[:, 1:])


@pytest.mark.parametrize("prefix", ["vision_model.", "model.vision_tower.", "vision_tower."])
def test_the_encoder_is_taken_out_of_a_whole_model(tmp_path, prefix):
    weights = original_weights("300M")
    whole = {prefix + name: tensor for name, tensor in weights.items()}
    others = ("language_model.lm_head.weight", "mlp1.0.weight", "model.multi_modal_projector.linear_1.weight")
    whole |= {name: torch.ones(2) for name in others}
    config = {"model_type": "internvl_chat", "vision_config": original_config("300M")}
    encoder = build_vision_encoder("internvit", checkpoint=write(tmp_path / "whole", whole, config))
    alone = build_vision_encoder("internvit", checkpoint=write(tmp_path / "alone", weights, original_config("300M")))
    assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in encoder.state_dict().items())


def test_dtype_of_the_checkpoint_is_kept_and_its_normalisation_read(tmp_path):
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in original_weights("6B").items()}
    folder = write(tmp_path / "bf16", weights, original_config("6B"))
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}))
    encoder = build_vision_encoder("internvit", checkpoint=folder)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    assert encoder(torch.randn(1, 3, SIZE, SIZE)).dtype == torch.bfloat16
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))


def test_settings_of_a_loaded_encoder_rebuild_it(tmp_path):
    encoder = build_vision_encoder("internvit", checkpoint=write(tmp_path / "6B", original_weights("6B"), original_config("6B")))
    rebuilt = build_vision_encoder(**json.loads(json.dumps(encoder.encoder_settings)))
    rebuilt.load_state_dict(encoder.state_dict())
    pixels = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(rebuilt(pixels), encoder(pixels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("encoder.layers.1.ls2"), "1 missing: encoder.layer.1.lambda_2"),
        (lambda weights: weights.update({"encoder.layers.0.attn.rope": torch.ones(2)}), "1 unexpected: encoder.layers.0.attn.rope"),
        (lambda weights: weights.update({"encoder.layers.3.ls1": torch.ones(WIDTH)}), "1 unexpected: encoder.layer.3.lambda_1"),
        (lambda weights: weights.update({"embeddings.class_embedding": torch.ones(1, 1, 5)}), "cls_token \\(file \\(1, 1, 5\\)"),
    ],
)
def test_weights_that_do_not_fit_are_listed(tmp_path, change, message):
    weights = original_weights("300M")
    change(weights)
    folder = write(tmp_path / "broken", weights, original_config("300M"))
    with pytest.raises(ValueError, match=message):
        build_vision_encoder("internvit", checkpoint=folder)


def test_a_setting_that_contradicts_the_checkpoint_is_refused(tmp_path):
    folder = write(tmp_path / "300M", original_weights("300M"), original_config("300M"))
    with pytest.raises(ValueError, match="hidden_size=48 contradicts .* which has 24"):
        build_vision_encoder("internvit", checkpoint=folder, hidden_size=48)


def test_another_models_folder_is_refused(tmp_path):
    folder = write(tmp_path / "clip", {"x": torch.ones(1)}, {"model_type": "clip_vision_model"})
    with pytest.raises(ValueError, match="type 'clip_vision_model'; expected 'intern_vit_6b'"):
        build_vision_encoder("internvit", checkpoint=folder)
