"""The published encoders by their structure, on the meta device: names that exist, figures of their papers, features of the right shape."""

import pytest
import torch

from vision_encoders import build_vision_encoder

INTERNVIT_6B = {
    "hidden_size": 3200, "num_attention_heads": 25, "num_hidden_layers": 45, "intermediate_size": 12800, "norm_type": "rms_norm",
    "use_qk_norm": True, "attention_bias": False,
}  # fmt: skip
# name, settings, tile in px, patch in px, width, millions of parameters of the tower as we keep it
PUBLISHED = {
    "InternViT-300M": ("internvit", {}, 448, 14, 1024, 304),
    "InternViT-6B V2.5": ("internvit", INTERNVIT_6B, 448, 14, 3200, 5540),
    "InternViT-300M in timm": ("timm:vit_intern300m_patch14_448", {}, 448, 14, 1024, 304),
    "CLIP ViT-L/14-336": ("open_clip:ViT-L-14-336-quickgelu", {}, 336, 14, 1024, 291),
    "CLIP ViT-L/14-336 in transformers": (
        "transformers:clip",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "patch_size": 14,
         "image_size": 336},
        336, 14, 1024, 291,
    ),
    "SigLIP so400m": ("timm:vit_so400m_patch14_siglip_378", {}, 378, 14, 1152, 413),
    "SigLIP 2 so400m": ("open_clip:ViT-SO400M-16-SigLIP2-512", {}, 512, 16, 1152, 413),
    "SigLIP 2 so400m in transformers": (
        "transformers:siglip",
        {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304, "patch_size": 16,
         "image_size": 512},
        512, 16, 1152, 413,
    ),
    "DINOv2 L": ("timm:vit_large_patch14_dinov2", {}, 518, 14, 1024, 304),
    "DINOv2 L with registers": ("timm:vit_large_patch14_reg4_dinov2", {}, 518, 14, 1024, 304),
    "RADIO v4 H": ("transformers:radio", {"image_size": 512}, 512, 16, 1280, 653),
}  # fmt: skip


@pytest.mark.parametrize("label", PUBLISHED)
def test_a_published_encoder_can_be_built(label):
    name, settings, image_size, patch_size, width, millions = PUBLISHED[label]
    pytest.importorskip({"timm": "timm", "open_clip": "open_clip"}.get(name.partition(":")[0], "transformers"))
    with torch.device("meta"):
        encoder = build_vision_encoder(name, **settings)
        features = encoder(torch.empty(2, 3, image_size, image_size))
    assert (encoder.image_size, encoder.patch_size, encoder.hidden_size) == (image_size, patch_size, width)
    assert features.shape == (2, (image_size // patch_size) ** 2, width)
    counted = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    assert abs(counted - millions) / millions < 0.01, counted
