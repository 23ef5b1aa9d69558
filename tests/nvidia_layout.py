"""A small decoder's weights and configuration under the names that NVIDIA's files have, written out by hand; and small mixtures."""

import math
import re

import torch

MIXTURE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "moe_shared_expert_intermediate_size": 56}


def nvidia_weights(decoder) -> dict[str, torch.Tensor]:
    """`backbone.` in front, one entry per expert."""
    weights = {}
    for name, tensor in decoder.state_dict().items():
        name = re.sub("^model\\.", "backbone.", name)
        if match := re.fullmatch(r"(.*experts)\.(up_proj|down_proj)", name):
            for index, expert in enumerate(tensor):
                weights[f"{match.group(1)}.{index}.{match.group(2)}.weight"] = expert.clone()
        else:
            weights[name] = tensor.clone()
    return weights


def nvidia_config(decoder) -> dict:
    config = decoder.config.to_dict()
    for absent in ("layers_block_type", "head_dim", "mtp_layers_block_type", "transformers_version", "dtype"):
        config.pop(absent, None)
    return config | {
        "hybrid_override_pattern": decoder.config.hybrid_override_pattern,
        "attention_head_dim": decoder.config.head_dim,
        "num_hidden_layers": len(decoder.config.layers_block_type),
        "time_step_limit": [0.0, math.inf],
        "torch_dtype": "bfloat16",
        "architectures": ["NemotronHForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"},
    }
