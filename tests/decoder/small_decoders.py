"""A decoder small enough for float64 whose layers all matter: matrices three times as large as drawn, time steps spread."""

import torch
from transformers.models.nemotron_h import NemotronHForCausalLM

from vlm.decoder.presets import preset_config

WIDTHS = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "vocab_size": 60,
    "head_dim": 12,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "n_groups": 2,
}


def small_decoder(pattern: str, **overrides) -> NemotronHForCausalLM:
    """transformers' own, nothing of ours set on it."""
    torch.manual_seed(0)
    decoder = NemotronHForCausalLM(preset_config("tiny", pattern=pattern, **(WIDTHS | overrides))).eval()
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3)
            elif name.endswith("dt_bias"):
                parameter.uniform_(-2, 1)
    return decoder
