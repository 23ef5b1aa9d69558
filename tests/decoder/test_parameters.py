"""The count from arithmetic equals the model that transformers builds, and the published figures."""

import pytest
import torch
from transformers import NemotronHForCausalLM

from vlm.decoder.parameters import layer_param_count, param_count
from vlm.decoder.pattern import default_config, small_config
from vlm.decoder.presets import PRESETS, preset_config

CONFIGS = {name: (lambda name=name: preset_config(name)) for name in PRESETS} | {
    "small_config": small_config,
    "default_config": default_config,
    "all kinds, biases": lambda: preset_config("tiny", pattern="ME*-", use_bias=True, mlp_bias=True, use_conv_bias=False),
    "latent experts": lambda: preset_config("tiny", pattern="ME", moe_latent_size=48, mlp_bias=True),
    "tied": lambda: preset_config("tiny", tie_word_embeddings=True),
}


def built_count(config) -> int:
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_count_equals_the_built_model(name):
    config = CONFIGS[name]()
    assert param_count(config) == built_count(config)


@pytest.mark.parametrize(("name", "billions"), [("8b", "8.10"), ("47b", "46.79"), ("56b", "56.32"), ("9b-v2", "8.89"), ("12b-v2", "12.31")])
def test_the_count_has_the_published_digits(name, billions):
    assert f"{param_count(preset_config(name)) / 1e9:.2f}" == billions


def test_an_unknown_layer_letter_is_refused():
    config = preset_config("tiny")
    with pytest.raises(ValueError, match="layer letter 'X'"):
        layer_param_count(config, "X")
