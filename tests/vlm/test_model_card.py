"""The card of a model folder: parts, licences as far as their folders named them, a head that the hub can read."""

import pytest
import yaml

from vlm.assemble.origins import origins_of
from vlm.model_card import model_card


def head_of(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_every_saved_folder_has_one(tiny_folder):
    card = (tiny_folder / "README.md").read_text()
    head = head_of(card)
    assert head["library_name"] == "transformers" and head["pipeline_tag"] == "image-text-to-text" and head["license"] == "other"
    assert "`internvit`, 128 wide, tiles of 64 px" in card and "`M*-M*-`" in card
    assert card.count("random weights when it was assembled") == 2


def test_it_repeats_what_the_folders_said(tiny_model, tmp_path):
    """The licence stands in the folder that was downloaded; a guess from the name could be wrong."""
    decoder, encoder = tmp_path / "decoder", tmp_path / "encoder"
    decoder.mkdir()
    encoder.mkdir()
    (decoder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: some-licence\nlicense_link: 'https://example.org/terms'\n---\nlicense: no\n"
    )
    (decoder / "LICENSE.txt").write_text("terms")
    (decoder / "config.json").write_text('{"_name_or_path": "nvidia/Some-Model"}')
    (encoder / "config.json").write_text('{"_name_or_path": "/home/somebody/encoder"}')
    config = tiny_model.config.__class__(**tiny_model.config.to_dict() | {"origins": origins_of(decoder, encoder)})
    assert config.origins["language_model"] == {
        "name": "nvidia/Some-Model", "license": "other", "license_name": "some-licence", "license_link": "https://example.org/terms",
        "license_files": ["LICENSE.txt"],
    }  # fmt: skip
    assert config.origins["vision_encoder"] == {"name": "encoder"}
    card = model_card(config)
    assert "license name `some-licence`, license link `https://example.org/terms`, licence files `LICENSE.txt`" in card
    assert "Vision encoder `encoder`: its folder named no licence. InternViT (OpenGVLab) is published under: MIT" in card
    assert head_of(card)["base_model"] == ["nvidia/Some-Model"]
    assert "somebody" not in card


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("timm:vit_intern300m_patch14_448", "MIT"),
        ("open_clip:ViT-L-14-336", "CLIP \\(OpenAI"),
        ("open_clip:ViT-SO400M-16-SigLIP2-512", "SigLIP \\(Google\\) is published under: Apache-2.0"),
        ("transformers:dinov2_with_registers", "DINOv2"),
        ("transformers:radio", "NVIDIA Open Model License"),
        ("timm:resnet10t", "named no licence.$"),
    ],
)
def test_encoders_are_told_apart(tiny_model, name, words):
    import re

    config = tiny_model.config.__class__(**tiny_model.config.to_dict() | {"origins": {"vision_encoder": {"name": "x"}}})
    config.vision_config.encoder = {"name": name}
    line = next(line for line in model_card(config).splitlines() if line.startswith("- Vision encoder"))
    assert re.search(words, line), line
