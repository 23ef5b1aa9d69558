"""Letters and names; the patterns that the builder makes; the builder's two sizes."""

import pytest
from transformers import NemotronHConfig

from vlm.decoder.pattern import LETTERS, build_pattern, config_of, default_config, letters_of, small_config, type_names
from vlm.decoder.presets import PATTERN_8B, PATTERN_12B_V2, PATTERN_56B


def test_letters_and_names_of_the_installed_transformers_are_inverse():
    letters = "".join(LETTERS)
    assert letters_of(type_names(letters)) == letters
    assert NemotronHConfig(layers_block_type=type_names("M*-E")).hybrid_override_pattern == "M*-E"


@pytest.mark.parametrize("pattern", ["", "M-X"])
def test_an_empty_or_unknown_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="the letters are 'M' Mamba-2"):
        type_names(pattern)


def test_an_unknown_layer_type_is_refused():
    with pytest.raises(ValueError, match="unknown layer types \\['hyena'\\]"):
        letters_of(["hyena"])


def test_the_even_spread_gives_the_published_patterns():
    assert build_pattern(52) == PATTERN_8B
    assert build_pattern(118) == PATTERN_56B
    assert build_pattern(52, attention_fraction=4 / 52) == PATTERN_8B
    assert build_pattern(62, attention_fraction=6 / 62) == PATTERN_12B_V2


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.08, 0.2, 1 / 3])
def test_the_even_spread_keeps_the_papers_rules(fraction):
    """Mamba-2 first, FFN last, attention between Mamba-2 and FFN, as many Mamba-2 as FFN layers, gaps that differ by one at most."""
    for num_layers in range(3, 120):
        if fraction == 0.0 and num_layers % 2:
            continue
        pattern = build_pattern(num_layers, attention_fraction=fraction)
        assert len(pattern) == num_layers
        assert pattern[0] == "M" and pattern[-1] == "-"
        assert pattern.count("M") == pattern.count("-")
        assert pattern.count("*") == pattern.count("M*-")
        assert abs(pattern.count("*") - fraction * num_layers) <= 4 / 3 + 1e-9  # parity, and the room in tiny patterns
        gaps = [part.count("M") for part in pattern.split("*")]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("num_layers", "n"), [(32, 10), (8, 4), (9, 2), (20, 7), (2, 5)])
def test_attention_every_n_stands_where_the_index_says(num_layers, n):
    pattern = build_pattern(num_layers, attention_every_n=n)
    assert len(pattern) == num_layers and pattern[0] == "M"
    assert [letter == "*" for letter in pattern] == [index % n == n - 1 for index in range(num_layers)]
    assert "*M" not in pattern


def test_experts_can_take_the_place_of_ffns():
    assert build_pattern(52, feed_forward="E") == PATTERN_8B.replace("-", "E")
    assert build_pattern(8, 4, feed_forward="E") == build_pattern(8, 4).replace("-", "E")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 52, "attention_every_n": 10, "attention_fraction": 0.1}, "not both"),
        ({"num_layers": 1}, "at least 2"),
        ({"num_layers": 52, "attention_every_n": 1}, "at least 2"),
        ({"num_layers": 52, "attention_fraction": 0.5}, "0 to 1/3"),
        ({"num_layers": 52, "feed_forward": "M"}, "expected '-'"),
    ],
)
def test_numbers_without_a_pattern_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_pattern(**arguments)


def test_the_builders_default_has_its_published_figures():
    config = default_config()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (2048, 32, 16, 4)
    assert (config.ssm_state_size, config.conv_kernel, config.mamba_num_heads * config.mamba_head_dim) == (64, 4, 2 * 2048)
    assert [index for index, letter in enumerate(config.hybrid_override_pattern) if letter == "*"] == [9, 19, 29]


def test_the_builders_small_config_has_its_published_figures():
    config = small_config(vocab_size=300)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (256, 8, 4, 2)
    assert (config.ssm_state_size, config.vocab_size, config.head_dim) == (16, 300, 64)
    assert [index for index, letter in enumerate(config.hybrid_override_pattern) if letter == "*"] == [3, 7]


def test_an_unknown_field_names_the_nearest():
    """transformers would keep a misspelt field as an attribute and build the default."""
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        config_of("M-", hiden_size=64)
