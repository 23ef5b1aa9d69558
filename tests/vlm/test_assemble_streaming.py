"""Joined from file to file equals joined in memory: the same folder, byte for byte, in a few megabytes."""

import json

import pytest
import torch
from safetensors import safe_open
from small_checkpoints import THINKING_TEMPLATE, small_decoder, small_tokenizer, write_internvit, write_nvidia, write_transformers

from vlm.assemble import assemble, assemble_folder
from vlm.assemble.embedding_rows import added_rows, row_blocks
from vlm.checkpoint import load_model, save_model
from vlm.decoder import load_language_model

SCAN = ("A_log", "D", "dt_bias", "e_score_correction_bias")


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
        "transformers": write_transformers(root / "transformers", decoder, tokenizer, max_shard_size="100KB"),
        "encoder": write_internvit(root / "encoder", shards=2),
    }


def contents(folder):
    """Every weight of a folder by name: (dtype, bytes as a tensor)."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            tensors |= {key: file.get_tensor(key) for key in file.keys()}
    return tensors


def other_files(folder):
    """All but the weights, whose shards may be cut at other places."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in names if not name.startswith("model")]


def without_numbers(path):
    pack = json.loads(path.read_text())
    pictures = [{**entry, "numbers": None, "why_no_numbers": None} for entry in pack["pictures"]]
    return {**pack, "dtype": None, "device": None, "pictures": pictures}


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("format", ["nvidia", "transformers"])
@pytest.mark.parametrize(
    "request_",
    [
        {"vision_encoder": "internvit", "vision_checkpoint": "encoder"},
        {"vision_encoder": "internvit", "vision_checkpoint": "encoder", "vision_settings": {"image_size": 64}},
        {"preset": "tiny"},
        {"vision_encoder": "timm:resnet10t", "vision_settings": {"image_size": 64, "output_stride": 8}},
    ],
    ids=["internvit", "internvit, other tile size", "random encoder", "timm"],
)
def test_the_folder_equals_the_one_made_in_memory(checkpoints, tmp_path, format, request_):
    """The obvious way builds the whole model and saves it; the other never holds more than a few tensors."""
    if request_.get("vision_encoder", "").startswith("timm"):
        pytest.importorskip("timm")
    arguments = request_ | {"language_model": checkpoints[format], "seed": 3}
    if "vision_checkpoint" in arguments:
        arguments["vision_checkpoint"] = checkpoints["encoder"]
    slow = save_model(*assemble(**arguments), tmp_path / "slow", max_shard_size=200_000)
    fast = assemble_folder(tmp_path / "fast", **arguments, max_shard_bytes=200_000).folder
    files = other_files(slow)
    assert files == other_files(fast) and len(files) >= 12
    for name in files:
        if name == "golden/pack.json":  # its logits want a model in memory
            assert without_numbers(fast / name) == without_numbers(slow / name)
        else:
            assert (fast / name).read_bytes() == (slow / name).read_bytes(), name
    assert_same_weights(contents(fast), contents(slow))
    index = json.loads((fast / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == contents(fast).keys()


def test_loading_it_gives_the_decoder_and_the_encoder_bit_for_bit(checkpoints, decoder, tmp_path):
    """A_log, D and dt_bias above all; dtypes as in the checkpoints; the rows of new words below the old ones."""
    made = assemble_folder(tmp_path / "model", language_model=checkpoints["nvidia"], vision_checkpoint=checkpoints["encoder"])
    model, _ = load_model(made.folder)
    expected, found = decoder.state_dict(), model.language_model.state_dict()
    assert found.keys() == expected.keys()
    rows = decoder.config.vocab_size
    assert made.vocabulary_rows == (rows, model.config.text_config.vocab_size) and made.vocabulary_rows[1] >= rows + 16
    for name, tensor in expected.items():
        kept = found[name][:rows] if "embeddings" in name or "lm_head" in name else found[name]
        assert kept.dtype == tensor.dtype == (torch.float32 if name.endswith(SCAN) else torch.bfloat16), name
        assert torch.equal(kept, tensor), name
    assert made.parameters == model.parameter_counts()
    assert {parameter.dtype for parameter in model.projector.parameters()} == {torch.bfloat16}


def test_the_loaded_model_answers_as_its_decoder_does(checkpoints, tmp_path):
    """Text alone: the joined model is the decoder."""
    made = assemble_folder(tmp_path / "model", language_model=checkpoints["nvidia"], vision_checkpoint=checkpoints["encoder"])
    model, _ = load_model(made.folder, dtype=torch.float32)
    alone = load_language_model(checkpoints["nvidia"], dtype=torch.float32)
    ids = torch.randint(6, 200, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        difference = (model(input_ids=ids).logits[..., : alone.config.vocab_size] - alone(ids).logits).abs().max()
    assert difference <= 1e-4


def test_names_of_the_weights_are_those_of_saved_models(checkpoints, tmp_path):
    """Both ways of writing a folder, and transformers' own, must agree; experts stand one by one."""
    made = assemble_folder(tmp_path / "model", language_model=checkpoints["nvidia"], preset="tiny")
    model, _ = load_model(made.folder)
    model.save_pretrained(tmp_path / "transformers")
    names = contents(made.folder).keys()
    assert names == contents(tmp_path / "transformers").keys()
    assert "language_model.backbone.layers.1.mixer.experts.3.down_proj.weight" in names
    assert "language_model.backbone.embeddings.weight" in names and "projector.linear_1.weight" in names


def test_transformers_opens_the_folder_without_a_complaint(checkpoints, tmp_path):
    from transformers import AutoModelForImageTextToText

    made = assemble_folder(tmp_path / "model", language_model=checkpoints["nvidia"], preset="tiny", max_shard_bytes=200_000)
    model, report = AutoModelForImageTextToText.from_pretrained(made.folder, output_loading_info=True)
    assert made.shards > 2
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = dict(load_model(made.folder)[0].named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name].to(parameter.dtype)), name


def test_a_reasoning_checkpoint_keeps_its_chat_template(decoder, tmp_path):
    tokenizer = small_tokenizer(chat_template=THINKING_TEMPLATE)
    folder = write_nvidia(tmp_path / "reasoning", decoder, tokenizer)
    made = assemble_folder(tmp_path / "model", language_model=folder, preset="tiny")
    _, processor = load_model(made.folder)
    messages = [{"role": "user", "content": "a red circle"}]
    for thinking in (True, False):
        asked = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
        assert processor.apply_chat_template(messages, **asked) == tokenizer.apply_chat_template(messages, **asked)
    assert (made.folder / "language_model" / "chat_template.jinja").read_text() == THINKING_TEMPLATE


def test_sources_travel_through_loading_and_saving(checkpoints, tmp_path):
    """A training run loads and saves: licence, config and record of the decoder must still be there."""
    made = assemble_folder(tmp_path / "model", language_model=checkpoints["nvidia"], preset="tiny")
    again = save_model(*load_model(made.folder), tmp_path / "again")
    names = sorted(path.name for path in (made.folder / "language_model").iterdir())
    assert {"LICENSE", "README.md", "config.json", "modeling_nemotron_h.py", "tokenizer.json", "weights.json"} <= set(names)
    for name in names:
        assert (again / "language_model" / name).read_bytes() == (made.folder / "language_model" / name).read_bytes()
    assert_same_weights(contents(again), contents(made.folder))


def test_rows_of_new_words_are_like_the_old_ones():
    """Inputs: as large as trained words and all different. Outputs: the mean, so that no new word starts above the trained ones."""
    weight = torch.randn(9000, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13) + 5

    def blocks():
        return row_blocks(len(weight), lambda start, stop: weight[start:stop])

    inputs, outputs = (added_rows(blocks(), 64, scattered=scattered, seed=1) for scattered in (True, False))
    torch.testing.assert_close(outputs, weight.mean(0).expand(64, 12))
    assert torch.cdist(inputs, inputs).fill_diagonal_(9.0).min() > 1.0
    assert 0.7 < (inputs.std(0) / weight.std(0)).mean() < 1.3
    assert torch.equal(inputs, added_rows(blocks(), 64, scattered=True, seed=1))
