"""A decoder's checkpoint looked at without reading it: the same verdict as the loader that reads it all."""

import pytest
import torch
from transformers import NemotronHForCausalLM

from vision_encoders.stored_tensors import StoredTensor
from vlm.decoder.key_names import to_file_names, to_module_names
from vlm.decoder.loading import load_language_model
from vlm.decoder.presets import PRESETS, preset_config
from vlm.decoder.stored_weights import file_shapes, open_language_model

SMALL = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 50, "head_dim": 24, "mamba_num_heads": 4, "n_routed_experts": 3,
         "num_experts_per_tok": 2, "moe_intermediate_size": 40, "moe_shared_expert_intermediate_size": 56}  # fmt: skip


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    return NemotronHForCausalLM(preset_config("tiny", pattern="ME*-M", **SMALL)).eval()


@pytest.fixture
def folder(decoder, tmp_path):
    decoder.save_pretrained(tmp_path / "decoder", max_shard_size="60KB")
    return tmp_path / "decoder"


def test_names_go_there_and_back(decoder):
    """Also inside a larger model, whose other weights pass through."""
    for prefix in ("", "language_model."):
        named = {prefix + name: tensor for name, tensor in decoder.state_dict().items()} | {"projector.x": torch.ones(1)}
        keys = {
            key: entry.read()
            for name, tensor in named.items()
            for key, entry in to_file_names(name, StoredTensor.of(tensor), prefix=prefix)
        }
        assert f"{prefix}backbone.layers.1.mixer.experts.2.up_proj.weight" in keys
        back = dict(to_module_names(keys.items(), 3, source="here", prefix=prefix))
        assert back.keys() == named.keys() and all(torch.equal(back[name], tensor) for name, tensor in named.items())


@pytest.mark.parametrize("name", PRESETS)
def test_expected_shapes_of_every_preset(name):
    """Sizes add up to the exact parameter count (buffers apart), experts one by one."""
    from vlm.decoder import param_count

    config = preset_config(name)
    shapes = file_shapes(config)
    counted = sum(torch.Size(shape).numel() for key, shape in shapes.items() if not key.endswith("e_score_correction_bias"))
    assert counted == param_count(config)
    assert all(key.startswith("backbone.") or key == "lm_head.weight" for key in shapes)


def test_it_finds_what_the_loader_reads(folder, decoder):
    opened = open_language_model(folder)
    assert opened.left_out == [] and opened.dtype == torch.float32
    assert set(opened.places.values()) == {path.name for path in folder.glob("*.safetensors")}
    read = dict(to_module_names(((key, tensor.read()) for key, tensor in opened.tensors.items()), 3, source=folder))
    for name, tensor in load_language_model(folder).state_dict().items():
        assert torch.equal(read[name], tensor), name


def test_it_refuses_what_the_loader_refuses(folder):
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-7])
    for look in (open_language_model, load_language_model):
        with pytest.raises(ValueError, match=f"{shard.name} is damaged or truncated"):
            look(folder)
    shard.unlink()
    for look in (open_language_model, load_language_model):
        with pytest.raises(FileNotFoundError, match=f"lacks 1 of .* shards: {shard.name}"):
            look(folder)
