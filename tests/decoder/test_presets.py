"""Presets against the published table."""

import pytest

from vlm.decoder.presets import PRESETS, preset_config

# name: letters, Mamba-2, attention, FFN or MoE, hidden, FFN width, heads, KV heads, Mamba heads, Mamba head width, state
PUBLISHED = {
    "4b": (52, 24, 4, 24, 3072, 12288, 32, 8, 112, 64, 128),
    "8b": (52, 24, 4, 24, 4096, 21504, 32, 8, 128, 64, 128),
    "47b": (98, 45, 5, 48, 8192, 30720, 64, 8, 256, 64, 256),
    "56b": (118, 54, 10, 54, 8192, 32768, 64, 8, 256, 64, 256),
    "9b-v2": (56, 27, 4, 25, 4480, 15680, 40, 8, 128, 80, 128),
    "12b-v2": (62, 28, 6, 28, 5120, 20480, 40, 8, 128, 80, 128),
    "30b-a3b": (52, 23, 6, 23, 2688, 1856, 32, 2, 64, 64, 128),
    "tiny": (6, 2, 2, 2, 128, 384, 4, 2, 8, 32, 32),
}


def test_the_table_covers_every_preset():
    assert PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_figures(name):
    config = preset_config(name)
    pattern = config.hybrid_override_pattern
    found = (
        *(len(pattern), pattern.count("M"), pattern.count("*"), pattern.count("-") + pattern.count("E")),
        *(config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads),
        *(config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size),
    )
    assert found == PUBLISHED[name]
    assert config.head_dim == (32 if name == "tiny" else 128)
    assert config.n_groups == (1 if name == "tiny" else 8)
    assert config.vocab_size == (1024 if name == "tiny" else 131072)
    assert (config.conv_kernel, config.layer_norm_epsilon, config.mlp_hidden_act, config.tie_word_embeddings) == (4, 1e-5, "relu2", False)


def test_the_mixture_has_the_published_figures():
    config = preset_config("30b-a3b")
    assert (config.n_routed_experts, config.num_experts_per_tok, config.n_shared_experts) == (128, 6, 1)
    assert (config.moe_intermediate_size, config.moe_shared_expert_intermediate_size) == (1856, 3712)
    assert config.routed_scaling_factor == 2.5


def test_overrides_change_fields_and_the_pattern_but_not_the_preset():
    config = preset_config("tiny", vocab_size=2048, pattern="ME*-")
    assert (config.vocab_size, config.hybrid_override_pattern) == (2048, "ME*-")
    assert preset_config("tiny").vocab_size == 1024


def test_an_unknown_preset_lists_the_valid_ones_and_the_nearest():
    with pytest.raises(ValueError, match="tiny, 4b, 8b, 47b, 56b, 9b-v2, 12b-v2, 30b-a3b; did you mean '9b-v2'"):
        preset_config("9B_v2")
