"""A model folder: written whole, opened by transformers' Auto classes, byte for byte; anything else is refused with a reason."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from vlm import VisionLanguageModel, VLMConfig, VLMImageProcessor, VLMProcessor
from vlm.assemble import assemble
from vlm.checkpoint import load_model, save_model

# Every name in the file, with numbers as N. Others read these files: a change here breaks them.
SAVED_KEYS = """
language_model.backbone.embeddings.weight
language_model.backbone.layers.N.mixer.A_log
language_model.backbone.layers.N.mixer.D
language_model.backbone.layers.N.mixer.convNd.bias
language_model.backbone.layers.N.mixer.convNd.weight
language_model.backbone.layers.N.mixer.down_proj.weight
language_model.backbone.layers.N.mixer.dt_bias
language_model.backbone.layers.N.mixer.in_proj.weight
language_model.backbone.layers.N.mixer.k_proj.weight
language_model.backbone.layers.N.mixer.norm.weight
language_model.backbone.layers.N.mixer.o_proj.weight
language_model.backbone.layers.N.mixer.out_proj.weight
language_model.backbone.layers.N.mixer.q_proj.weight
language_model.backbone.layers.N.mixer.up_proj.weight
language_model.backbone.layers.N.mixer.v_proj.weight
language_model.backbone.layers.N.norm.weight
language_model.backbone.norm_f.weight
language_model.lm_head.weight
projector.linear_N.bias
projector.linear_N.weight
projector.norm.bias
projector.norm.weight
""".split()


@pytest.fixture(scope="module")
def changed(tiny):
    """A model whose every weight differs from what initialisation would write, in mixed dtypes."""
    model, processor = assemble("tiny", seed=4)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, processor


@pytest.fixture(scope="module")
def folder(changed, tmp_path_factory):
    return save_model(*changed, tmp_path_factory.mktemp("saved") / "model")


def test_the_names_of_saved_weights_are_pinned(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = {re.sub(r"\d+", "N", key) for key in file.keys()}
    assert sorted(name for name in names if not name.startswith("vision_encoder.")) == sorted(SAVED_KEYS)
    assert all(name.startswith("vision_encoder.tower.") for name in names if name.startswith("vision_encoder"))


def test_every_weight_comes_back_byte_for_byte(folder, changed):
    """A_log, D and dt_bias above all: transformers' Nemotron-H draws them again when it thinks they are new."""
    model, _ = load_model(folder)
    expected = changed[0].state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert not model.training


def test_the_auto_classes_open_the_folder(folder, changed):
    """After `import vlm`, peft, accelerate and evaluation harnesses find everything by these four."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is VisionLanguageModel and type(AutoConfig.from_pretrained(folder)) is VLMConfig
    processor, images = AutoProcessor.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    assert type(processor) is VLMProcessor and type(images) is VLMImageProcessor
    expected = changed[1]
    for name in ("tile_size", "max_tiles", "policy", "thumbnail", "image_mean", "image_std"):
        assert getattr(images, name) == getattr(processor.image_processor, name) == getattr(expected.image_processor, name), name
    assert processor.chat_format == expected.chat_format and processor.visual_tokens_per_tile == expected.visual_tokens_per_tile
    assert processor.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    messages = [{"role": "user", "content": "a <image> b"}]
    assert processor.apply_chat_template(messages) == expected.apply_chat_template(messages)
    assert processor.prepare(messages).rendered == expected.prepare(messages).rendered
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, changed[0].state_dict()[name]), name


def test_logits_and_generation_settings_come_back(folder, changed):
    model, _ = load_model(folder)
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, changed[0](input_ids=ids).logits)
    for name in ("eos_token_id", "pad_token_id", "suppress_tokens"):
        assert getattr(model.generation_config, name) == getattr(changed[0].generation_config, name) is not None


def test_a_second_saving_is_the_same(folder, tmp_path):
    """Renamed back and forth, keys must not drift."""
    again = save_model(*load_model(folder), tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in folder.iterdir())
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja", "generation_config.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_computed_tables_of_a_tower_come_back(tmp_path):
    """Rotary tables are buffers that no checkpoint holds: left as transformers leaves them, features are NaN after loading."""
    pytest.importorskip("timm")
    model, processor = assemble("tiny", vision_encoder="timm:eva02_tiny_patch14_224", vision_settings={"image_size": 56, "depth": 1})
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    loaded, _ = load_model(save_model(model, processor, tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(loaded.encode_tiles(pixels), model.encode_tiles(pixels))


TOWER = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dinov2_with_registers", "radio"])
def test_towers_of_transformers_travel_in_the_folder(tmp_path, kind):
    """transformers renames weights of some of these models on saving; nested in ours, each way of loading must find them."""
    model, processor = assemble("tiny", vision_encoder=f"transformers:{kind}", vision_settings=TOWER, seed=3)
    folder = save_model(model, processor, tmp_path / "model")
    loaded, _ = load_model(folder)
    again = AutoModelForImageTextToText.from_pretrained(folder)
    model.save_pretrained(tmp_path / "by transformers")
    third = AutoModelForImageTextToText.from_pretrained(tmp_path / "by transformers")
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.encode_tiles(pixels)
        for other in (loaded, again.eval(), third.eval()):
            assert torch.equal(other.encode_tiles(pixels), expected)


def test_shards_are_read_too(changed, tmp_path):
    folder = save_model(*changed, tmp_path / "sharded", max_shard_size="2MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    model, _ = load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), changed[0].state_dict().values(), strict=True))


def of_files(tensors: dict[str, torch.Tensor], folder) -> set[str]:
    """Which of the tensors are pages of a file in the folder."""
    pages = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            pages.append(tuple(int(number, 16) for number in line.split()[0].split("-")))
    return {name for name, tensor in tensors.items() if any(start <= tensor.data_ptr() < end for start, end in pages)}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux where a tensor lies")
def test_mapped_parameters_are_pages_of_their_file(changed, tmp_path):
    """Eight ranks that each copied a model of 94 GB would need more memory than a machine has."""
    folder = save_model(*changed, tmp_path / "mapped")
    model, _ = load_model(folder, mapped=True)
    tensors = dict(model.state_dict())
    assert of_files(tensors, folder) == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(tensor, changed[0].state_dict()[name]) for name, tensor in tensors.items())
    cast, _ = load_model(folder, mapped=True, dtype=torch.bfloat16)
    assert {name.rpartition(".")[2] for name in of_files(dict(cast.state_dict()), folder)} == set(SCAN_PARAMETERS)
    assert not of_files(dict(load_model(folder)[0].state_dict()), folder)


SCAN_PARAMETERS = ("A_log", "D", "dt_bias")


def test_half_precision_is_kept_and_the_scan_stays_wide(changed, tmp_path):
    """A_log rounded to bfloat16 with the rest is another decay."""
    model, processor = load_model(save_model(*changed, tmp_path / "wide"), dtype=torch.bfloat16)
    narrow, _ = load_model(save_model(model, processor, tmp_path / "narrow"))
    for name, parameter in narrow.named_parameters():
        wide = name.endswith(SCAN_PARAMETERS)
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
        if wide:
            assert torch.equal(parameter, changed[0].get_parameter(name)), name
    with safe_open(tmp_path / "narrow" / "model.safetensors", "pt") as file:
        assert file.get_slice("language_model.backbone.embeddings.weight").get_dtype() == "BF16"
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_transformers_loading_in_half_precision_leaves_the_scan_wide(folder, changed, dtype):
    """`dtype=torch.bfloat16` is what every user writes; A_log rounded with the rest is another decay."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    for name, parameter in model.named_parameters():
        wide = name.endswith(SCAN_PARAMETERS) or dtype == "auto"
        assert parameter.dtype == (torch.float32 if wide else dtype), name
        if wide:
            assert torch.equal(parameter, changed[0].get_parameter(name)), name


def test_transformers_loading_in_half_precision_leaves_the_router_wide():
    """Its correction decides between experts that differ by less than bfloat16 can say."""
    assert "e_score_correction_bias" in assemble("tiny")[0]._keep_in_fp32_modules_strict


def test_saving_and_loading_is_quiet(changed, tmp_path, capfd):
    """transformers draws a progress bar for every load and save, of two million parameters too."""
    load_model(save_model(*changed, tmp_path / "model"))
    assert capfd.readouterr() == ("", "")


def test_an_older_folder_is_replaced_whole(changed, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "leftover.bin").write_bytes(b"x")
    folder = save_model(*changed, tmp_path / "model")
    assert not (folder / "leftover.bin").exists() and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_saving_leaves_the_older_folder(changed, tmp_path, monkeypatch):
    """The disk fills up in the middle: yesterday's checkpoint must still be there, and nothing else."""
    folder = save_model(*changed, tmp_path / "model")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(VLMProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(*changed, folder)
    assert (folder / "model.safetensors").is_file() and [path.name for path in tmp_path.iterdir()] == ["model"]


def damage(folder, kind):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "weights gone":
        weights.unlink()
    elif kind == "garbage weights":
        weights.write_bytes(b"no safetensors at all")
    elif kind == "config is no JSON":
        config.write_text("{")
    elif kind == "config is a list":
        config.write_text("[]")
    elif kind == "another model":
        config.write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    elif kind == "decoder of another width":
        content = json.loads(config.read_text())
        content["text_config"]["hidden_size"] = 64
        config.write_text(json.dumps(content))
    elif kind == "a layer more":
        content = json.loads(config.read_text())
        content["text_config"]["layers_block_type"].append(content["text_config"]["layers_block_type"][0])
        content["text_config"].pop("num_hidden_layers", None)
        config.write_text(json.dumps(content))
    elif kind == "an unknown encoder":
        content = json.loads(config.read_text())
        content["vision_config"]["encoder"]["name"] = "internvitt"
        config.write_text(json.dumps(content))
    elif kind == "tokenizer is no JSON":
        (folder / "tokenizer.json").write_text("{")
    elif kind == "tokenizer gone":
        (folder / "tokenizer.json").unlink()
    elif kind == "processor is no JSON":
        for name in ("processor_config.json", "preprocessor_config.json"):
            if (folder / name).exists():
                (folder / name).write_text("{")


@pytest.mark.parametrize(
    "kind",
    ["truncated weights", "weights gone", "garbage weights", "config is no JSON", "config is a list", "another model",
     "decoder of another width", "a layer more", "an unknown encoder", "tokenizer is no JSON", "tokenizer gone", "processor is no JSON"],
)  # fmt: skip
def test_a_damaged_folder_is_refused_with_its_name(folder, tmp_path, kind):
    """Loaded as far as it goes, a damaged checkpoint answers with random weights and without a word."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy, kind)
    with pytest.raises(ValueError, match=re.escape(str(copy))):
        load_model(copy)


def test_a_folder_that_is_no_checkpoint_says_what_is_missing(tmp_path, tiny):
    with pytest.raises(ValueError, match=r"is no model checkpoint: config.json, .* missing"):
        load_model(tmp_path)
    tiny[0].language_model.save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="is no model checkpoint"):
        load_model(tmp_path / "decoder")


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="no folder at nowhere"):
        load_model("nowhere")
