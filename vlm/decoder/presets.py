"""The published decoders as configs, and a tiny one for tests and laptops.

Sources: Nemotron-H arXiv 2504.03624, Nemotron Nano 2 arXiv 2508.14444, and the config files of the checkpoints. Mamba-2's inner width
is heads x head width; it is never derived from `expand`, which transformers keeps but does not use. Attention has no position
embedding.
"""

from difflib import get_close_matches

from transformers import NemotronHConfig

from .pattern import config_of

__all__ = ["PRESETS", "preset_config"]

PATTERN_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
PATTERN_47B = "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-"
PATTERN_56B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
PATTERN_9B_V2 = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
PATTERN_12B_V2 = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
PATTERN_30B_A3B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
PATTERN_TINY = "M*-M*-"


def _shape(
    pattern: str, hidden: int, ffn: int, heads: int, kv_heads: int, mamba_heads: int, mamba_head: int, state: int, positions: int, **other
) -> dict:
    """Fields of NemotronHConfig. `positions` is the trained sequence length in tokens; it limits nothing."""
    fields = {
        "pattern": pattern,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "mamba_num_heads": mamba_heads,
        "mamba_head_dim": mamba_head,
        "ssm_state_size": state,
        "n_groups": 8,
        "conv_kernel": 4,
        "chunk_size": 128,
        "max_position_embeddings": positions,
        "vocab_size": 131072,
    }
    return fields | other


MIXTURE_30B = {
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "routed_scaling_factor": 2.5,
}
TINY_WIDTHS = {"head_dim": 32, "n_groups": 1, "chunk_size": 32, "vocab_size": 1024}

PRESETS: dict[str, dict] = {
    #                 pattern          hidden    FFN  heads kv  Mamba heads x width, state, positions
    "tiny": _shape(PATTERN_TINY, 128, 384, 4, 2, 8, 32, 32, 8192, **TINY_WIDTHS),
    "4b": _shape(PATTERN_8B, 3072, 12288, 32, 8, 112, 64, 128, 8192),
    "8b": _shape(PATTERN_8B, 4096, 21504, 32, 8, 128, 64, 128, 8192),
    "47b": _shape(PATTERN_47B, 8192, 30720, 64, 8, 256, 64, 256, 8192),
    "56b": _shape(PATTERN_56B, 8192, 32768, 64, 8, 256, 64, 256, 8192),
    "9b-v2": _shape(PATTERN_9B_V2, 4480, 15680, 40, 8, 128, 80, 128, 131072),
    "12b-v2": _shape(PATTERN_12B_V2, 5120, 20480, 40, 8, 128, 80, 128, 131072),
    "30b-a3b": _shape(PATTERN_30B_A3B, 2688, 1856, 32, 2, 64, 64, 128, 262144, **MIXTURE_30B),
}


def preset_config(name: str, **overrides) -> NemotronHConfig:
    """The config of a published decoder, or of "tiny". `overrides` are fields of NemotronHConfig, or `pattern` (letters).

    Raises ValueError for an unknown name (the valid ones and the nearest stand in it), field or pattern.
    """
    if name not in PRESETS:
        near = get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.4)
        raise ValueError(f"unknown preset {name!r}; valid presets: {', '.join(PRESETS)}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return config_of(**(PRESETS[name] | overrides))
