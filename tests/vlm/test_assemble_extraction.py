"""The decoder taken out again: names, bytes, config and tokenizer of the checkpoint it came from."""

import json

import pytest
import torch
from safetensors import safe_open
from small_checkpoints import small_decoder, small_tokenizer, write_nvidia, write_transformers
from transformers import AutoTokenizer, NemotronHForCausalLM

from vlm.assemble import assemble, assemble_folder, to_language_model
from vlm.checkpoint import load_model, save_model
from vlm.decoder import load_language_model


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def decoder(tokenizer):
    return small_decoder(tokenizer)


@pytest.fixture(scope="module")
def checkpoints(decoder, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "nvidia": write_nvidia(root / "nvidia", decoder, tokenizer),
        "transformers": write_transformers(root / "transformers", decoder, tokenizer),
    }


def assert_equal_tensors(found, expected, *, but=()):
    """File by file, key by key, byte by byte."""
    names = sorted(path.name for path in expected.glob("*.safetensors"))
    assert names == sorted(path.name for path in found.glob("*.safetensors")) and names
    for name in names:
        with safe_open(expected / name, "pt") as ours, safe_open(found / name, "pt") as theirs:
            assert set(ours.keys()) == set(theirs.keys())
            for key in ours.keys():
                a, b = ours.get_tensor(key), theirs.get_tensor(key)
                assert a.dtype == b.dtype and a.shape == b.shape, key
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) != (key in but), key


@pytest.mark.parametrize("format", ["nvidia", "transformers"])
def test_it_comes_out_as_it_went_in(checkpoints, tmp_path, format):
    """Every file but the index equal byte for byte, weights as well; the words for images are gone."""
    assemble_folder(tmp_path / "model", language_model=checkpoints[format], preset="tiny")
    made = to_language_model(tmp_path / "model", tmp_path / "out")
    assert made.as_it_came and made.rows_removed >= 16
    assert_equal_tensors(tmp_path / "out", checkpoints[format])
    for path in checkpoints[format].iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    index = "model.safetensors.index.json"
    if (checkpoints[format] / index).is_file():
        maps = [json.loads((folder / index).read_text())["weight_map"] for folder in (checkpoints[format], tmp_path / "out")]
        assert maps[0] == maps[1]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(AutoTokenizer.from_pretrained(checkpoints[format]))
    for name, tensor in load_language_model(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, load_language_model(checkpoints[format]).state_dict()[name]), name
        break


@pytest.mark.parametrize("format", ["nvidia", "transformers"])
def test_training_in_float32_changes_only_what_was_trained(checkpoints, tmp_path, format):
    """A run casts to float32 and saves so; untouched weights must come back to the same bfloat16 bytes."""
    assemble_folder(tmp_path / "model", language_model=checkpoints[format], preset="tiny")
    model, processor = load_model(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        model.language_model.model.layers[0].mixer.in_proj.weight.mul_(1.5)
    save_model(model, processor, tmp_path / "trained")
    made = to_language_model(tmp_path / "trained", tmp_path / "out")
    assert made.as_it_came
    assert_equal_tensors(tmp_path / "out", checkpoints[format], but=("backbone.layers.0.mixer.in_proj.weight",))


def test_nvidias_format_loads_in_transformers_after_the_journey(checkpoints, decoder, tmp_path):
    assemble_folder(tmp_path / "model", language_model=checkpoints["transformers"], preset="tiny")
    to_language_model(tmp_path / "model", tmp_path / "out")
    loaded = NemotronHForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.float()), name


def test_a_decoder_from_random_weights_comes_out_in_transformers_format(tmp_path):
    model, processor = assemble("tiny", seed=2)
    save_model(model, processor, tmp_path / "model")
    made = to_language_model(tmp_path / "model", tmp_path / "out")
    assert not made.as_it_came and "no record" in made.reason
    loaded = load_language_model(tmp_path / "out")
    for name, tensor in model.language_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == processor.tokenizer.get_vocab()
    assert type(NemotronHForCausalLM.from_pretrained(tmp_path / "out")) is NemotronHForCausalLM


def test_a_pruned_decoder_says_that_it_changed(checkpoints, tmp_path):
    """Compression removes layers: the old config would describe another model."""
    assemble_folder(tmp_path / "model", language_model=checkpoints["nvidia"], preset="tiny")
    model, processor = load_model(tmp_path / "model")
    del model.language_model.model.layers[-1]
    model.config.text_config.layers_block_type = model.config.text_config.layers_block_type[:-1]
    save_model(model, processor, tmp_path / "pruned")
    made = to_language_model(tmp_path / "pruned", tmp_path / "out")
    assert not made.as_it_came and "no longer" in made.reason
    assert len(load_language_model(tmp_path / "out").model.layers) == 4


def test_the_model_itself_is_never_overwritten(checkpoints, tmp_path):
    assemble_folder(tmp_path / "model", language_model=checkpoints["nvidia"], preset="tiny")
    with pytest.raises(ValueError, match="is the model itself"):
        to_language_model(tmp_path / "model", tmp_path / "model")
    load_model(tmp_path / "model")


def test_a_truncated_model_leaves_nothing_behind(checkpoints, tmp_path):
    made = assemble_folder(tmp_path / "model", language_model=checkpoints["nvidia"], preset="tiny")
    weights = made.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or truncated"):
        to_language_model(made.folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_decoders_folder_is_no_model(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="is no model of this toolkit"):
        to_language_model(checkpoints["nvidia"], tmp_path / "out")
