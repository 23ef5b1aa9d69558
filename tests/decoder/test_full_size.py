"""Published checkpoints at their full size, without their weights: files with every name, shape and dtype of the real ones, and holes
where the numbers would stand. Loaded on the meta device, which reads none of them.

The names and shapes are written here from the published figures, not taken from the model: what is compared must not be its own mirror.
"""

import json
import math
import os

import pytest
import torch

from vlm.decoder import load_language_model, param_count, preset_config
from vlm.decoder.presets import PRESETS

FULL = sorted(PRESETS.keys() - {"tiny"})
BYTES = {"BF16": 2, "F32": 4}


def published_tensors(c) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{key: (dtype, shape)} as on NVIDIA's pages: bfloat16, the scan's and the router's own in float32."""
    inner, states = c.mamba_num_heads * c.mamba_head_dim, c.n_groups * c.ssm_state_size
    channels = inner + 2 * states
    kinds = {
        "M": {
            "in_proj.weight": (inner + channels + c.mamba_num_heads, c.hidden_size), "conv1d.weight": (channels, 1, c.conv_kernel),
            "conv1d.bias": (channels,), "A_log": (c.mamba_num_heads,), "D": (c.mamba_num_heads,), "dt_bias": (c.mamba_num_heads,),
            "norm.weight": (inner,), "out_proj.weight": (c.hidden_size, inner),
        },
        "*": {
            "q_proj.weight": (c.num_attention_heads * 128, c.hidden_size), "k_proj.weight": (c.num_key_value_heads * 128, c.hidden_size),
            "v_proj.weight": (c.num_key_value_heads * 128, c.hidden_size), "o_proj.weight": (c.hidden_size, c.num_attention_heads * 128),
        },
        "-": {"up_proj.weight": (c.intermediate_size, c.hidden_size), "down_proj.weight": (c.hidden_size, c.intermediate_size)},
        "E": {
            "gate.weight": (c.n_routed_experts, c.hidden_size), "gate.e_score_correction_bias": (c.n_routed_experts,),
            "shared_experts.up_proj.weight": (c.moe_shared_expert_intermediate_size, c.hidden_size),
            "shared_experts.down_proj.weight": (c.hidden_size, c.moe_shared_expert_intermediate_size),
            **{f"experts.{e}.up_proj.weight": (c.moe_intermediate_size, c.hidden_size) for e in range(c.n_routed_experts)},
            **{f"experts.{e}.down_proj.weight": (c.hidden_size, c.moe_intermediate_size) for e in range(c.n_routed_experts)},
        },
    }  # fmt: skip
    tensors = {"backbone.embeddings.weight": (131072, c.hidden_size), "backbone.norm_f.weight": (c.hidden_size,)}
    tensors["lm_head.weight"] = (131072, c.hidden_size)
    for number, letter in enumerate(c.hybrid_override_pattern):
        tensors[f"backbone.layers.{number}.norm.weight"] = (c.hidden_size,)
        tensors |= {f"backbone.layers.{number}.mixer.{name}": shape for name, shape in kinds[letter].items()}
    wide = ("A_log", ".D", "dt_bias", "e_score_correction_bias")
    return {name: ("F32" if name.endswith(wide) else "BF16", shape) for name, shape in tensors.items()}


def write_hollow(path, tensors) -> None:
    """A safetensors file with a header, and a hole of the right length behind it."""
    header, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + position)


def write_checkpoint(folder, name, shards=7, leave_out=(), **changes):
    config = preset_config(name)
    tensors = {key: value for key, value in published_tensors(config).items() if key not in leave_out}
    fields = config.to_dict() | {"hybrid_override_pattern": config.hybrid_override_pattern, "torch_dtype": "bfloat16", **changes}
    for absent in ("layers_block_type", "mtp_layers_block_type", "transformers_version", "dtype"):
        fields.pop(absent, None)
    fields["num_hidden_layers"] = len(config.hybrid_override_pattern)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    names, index = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in names[shard::shards]}
        write_hollow(folder / file, part)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


@pytest.mark.parametrize("name", FULL)
def test_every_published_size_loads_by_its_names(tmp_path, name):
    """A renamed layer type, a width derived instead of read, one expert more: at full size each of them is a wrong shape here."""
    folder = write_checkpoint(tmp_path / name, name)
    model = load_language_model(folder, device="meta")
    weights = dict(model.named_parameters())
    assert sum(weight.numel() for weight in weights.values()) == param_count(preset_config(name))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    for key, tensor in model.state_dict().items():
        wide = key.endswith(("A_log", ".D", "dt_bias", "e_score_correction_bias"))
        assert tensor.dtype == (torch.float32 if wide else torch.bfloat16), key
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    on_disk = sum(file.stat().st_blocks * 512 for file in folder.glob("*.safetensors"))
    assert stored > 8e9 > 100 * on_disk


def test_one_weight_too_few_is_named_at_full_size(tmp_path):
    lost = "backbone.layers.7.mixer.k_proj.weight"
    with pytest.raises(ValueError, match="1 missing: model.layers.7.mixer.k_proj.weight"):
        load_language_model(write_checkpoint(tmp_path / "8b", "8b", leave_out=(lost,)), device="meta")


def test_the_config_of_another_size_is_refused_at_full_size(tmp_path):
    with pytest.raises(ValueError, match="of another shape: .*in_proj.weight"):
        load_language_model(write_checkpoint(tmp_path / "8b", "8b", mamba_num_heads=112), device="meta")
