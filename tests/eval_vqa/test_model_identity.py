"""The fingerprint of a checkpoint notices what changes an answer."""

import json

import pytest

from eval_vqa.model_identity import WHOLE_BYTES, model_fingerprint, preprocessing


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(WHOLE_BYTES + 300_000))
    return tmp_path


def test_it_is_the_same_for_the_same_files(model):
    assert model_fingerprint(model) == model_fingerprint(model)


@pytest.mark.parametrize("place", [0, WHOLE_BYTES - 1, WHOLE_BYTES + 131_072, WHOLE_BYTES + 299_999])
def test_a_changed_stretch_of_weights_changes_it(model, place):
    """A projector trained alone lies in the middle of a large file: looking at both ends would not notice."""
    before = model_fingerprint(model)
    content = bytearray((model / "model.safetensors").read_bytes())
    content[place : place + 70_000] = bytes([1]) * len(content[place : place + 70_000])
    (model / "model.safetensors").write_bytes(content)
    assert model_fingerprint(model) != before


def test_a_folder_without_config_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        model_fingerprint(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        model_fingerprint(tmp_path / "x")


def test_preprocessing_is_read_from_either_file(tmp_path):
    tiles = {"tile_size": 64, "max_tiles": 6, "policy": "closest", "thumbnail": True, "other": 1}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": tiles, "visual_tokens_per_tile": 16}))
    first = preprocessing(tmp_path)
    assert first["tiles"] == {key: tiles[key] for key in ("tile_size", "max_tiles", "policy", "thumbnail")}
    assert first["visual_tokens_per_tile"] == 16
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**tiles, "max_tiles": 12}))
    second = preprocessing(tmp_path)
    assert second["tiles"]["max_tiles"] == 12
    assert len({first["sha256"], second["sha256"]}) == 2


def test_a_changed_chat_template_or_tokenizer_changes_its_hash(tmp_path):
    hashes = {preprocessing(tmp_path)["sha256"]}
    for name in ("chat_template.jinja", "tokenizer.json"):
        (tmp_path / name).write_text("x")
        hashes.add(preprocessing(tmp_path)["sha256"])
    assert len(hashes) == 3


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match="processor_config.json is not valid JSON"):
        preprocessing(tmp_path)
