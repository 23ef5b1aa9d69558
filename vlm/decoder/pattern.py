"""Layer patterns: the letters of the papers, the names of the installed transformers, and a builder for new ones.

One letter is one layer: M Mamba-2, * attention, - feed-forward (FFN), E mixture of experts. transformers has renamed its layer types
between releases; the letters have not changed. So this project speaks letters, and only this file asks transformers for its names.
"""

from difflib import get_close_matches
from functools import cache

from transformers import NemotronHConfig

__all__ = ["LETTERS", "build_pattern", "config_of", "default_config", "letters_of", "small_config", "type_names"]

LETTERS = {"M": "Mamba-2", "*": "attention", "-": "feed-forward", "E": "mixture of experts"}
PAPER_ATTENTION_FRACTION = 0.08


@cache
def _names_by_letter() -> dict[str, str]:
    """The installed release's own names, by asking its config for one layer of each kind."""
    letters = "".join(LETTERS)
    return dict(zip(letters, NemotronHConfig(hybrid_override_pattern=letters).layers_block_type, strict=True))


def type_names(pattern: str) -> list[str]:
    """Letters -> the installed transformers' names for `layers_block_type`. Raises ValueError for an empty or unknown pattern."""
    unknown = sorted(set(pattern) - LETTERS.keys())
    if unknown or not pattern:
        known = ", ".join(f"{letter!r} {meaning}" for letter, meaning in LETTERS.items())
        raise ValueError(f"layer pattern {pattern!r} holds {unknown or 'no letters'}; the letters are {known}.")
    names = _names_by_letter()
    return [names[letter] for letter in pattern]


def letters_of(layer_types: list[str]) -> str:
    """Names of the installed transformers -> letters. Raises ValueError for a name it does not use."""
    by_name = {name: letter for letter, name in _names_by_letter().items()}
    unknown = sorted(set(layer_types) - by_name.keys())
    if unknown:
        raise ValueError(f"unknown layer types {unknown}; the installed transformers uses {', '.join(by_name)}.")
    return "".join(by_name[name] for name in layer_types)


def build_pattern(
    num_layers: int, attention_every_n: int | None = None, attention_fraction: float | None = None, *, feed_forward: str = "-"
) -> str:
    """A pattern of `num_layers` letters, by one of two rules (the second, at 8 %, when neither is given).

    attention_every_n=n: attention at each index i with i % n == n - 1; the layers between alternate Mamba-2 and FFN, and an FFN follows
    each attention layer.

    attention_fraction: the even spread of Nemotron-H (arXiv 2504.03624). The first layer is Mamba-2, the last an FFN, each
    attention layer stands between a Mamba-2 layer and an FFN, there are as many Mamba-2 layers as FFNs, and attention layer j (from 0)
    of a comes after floor(m (j + 1) / (a + 1)) of the m Mamba-2 layers. At 8 %, 52 layers give the 4B's and 8B's pattern, 118 the 56B's.

    `feed_forward` is "-" or "E" (mixture of experts). Raises ValueError for numbers that allow no such pattern.
    """
    if attention_every_n is not None and attention_fraction is not None:
        raise ValueError(f"give {attention_every_n = } or {attention_fraction = }, not both.")
    if feed_forward not in ("-", "E"):
        raise ValueError(f"{feed_forward = }, expected '-' (FFN) or 'E' (mixture of experts).")
    if num_layers < 2:
        raise ValueError(f"{num_layers = }, expected at least 2: a Mamba-2 layer and an FFN.")
    if attention_every_n is not None:
        return _every_n(num_layers, attention_every_n, feed_forward)
    return _even_spread(num_layers, PAPER_ATTENTION_FRACTION if attention_fraction is None else attention_fraction, feed_forward)


def _every_n(num_layers: int, n: int, feed_forward: str) -> str:
    if n < 2:
        raise ValueError(f"attention_every_n = {n}, expected at least 2 (1 would leave no Mamba-2 layer).")
    pattern = ""
    for index in range(num_layers):
        if index % n == n - 1:
            pattern += "*"
        else:
            pattern += "M" if pattern[-1:] in ("", feed_forward) else feed_forward
    return pattern


def _even_spread(num_layers: int, fraction: float, feed_forward: str) -> str:
    if not 0.0 <= fraction <= 1 / 3:
        raise ValueError(f"attention_fraction = {fraction}, expected 0 to 1/3 (each attention layer stands between Mamba-2 and FFN).")
    # 1. The number of attention layers: nearest to the fraction among those that leave pairs of Mamba-2 and FFN.
    possible = range(num_layers % 2, num_layers // 3 + 1, 2)
    if not possible:
        raise ValueError(f"{num_layers = } allows no pattern with attention_fraction = {fraction}; take an even number or at least 3.")
    attention_layers = min(possible, key=lambda count: abs(count - fraction * num_layers))
    mamba_layers = (num_layers - attention_layers) // 2
    # 2. How many Mamba-2 layers stand before each of them.
    if attention_layers < mamba_layers:
        before = {mamba_layers * (index + 1) // (attention_layers + 1) for index in range(attention_layers)}
    else:  # one each, with nothing left to spread
        before = set(range(1, mamba_layers + 1))
    # 3. Mamba-2, attention where it is due, FFN.
    return "".join("M" + ("*" if count in before else "") + feed_forward for count in range(1, mamba_layers + 1))


def config_of(pattern: str, **fields) -> NemotronHConfig:
    """A NemotronHConfig with these letters as layers. Raises ValueError for unknown letters or fields (transformers takes any)."""
    known = NemotronHConfig.__dataclass_fields__.keys() - {"layers_block_type"}
    for name in fields:
        if name not in known:
            near = get_close_matches(name, [*known, "pattern"], n=1)
            raise ValueError(f"NemotronHConfig has no field {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return NemotronHConfig(layers_block_type=type_names(pattern), **fields)


def small_config(**overrides) -> NemotronHConfig:
    """The published builder's size for prototypes: 8 layers of width 256, attention at indices 3 and 7. See `default_config`."""
    fields = {"hidden_dim": 256, "num_layers": 8, "attention_every_n": 4, "num_heads": 4, "num_kv_heads": 2, "state": 16}
    return _builder_config(**fields, **overrides)


def default_config(**overrides) -> NemotronHConfig:
    """The published builder's default: 32 layers of width 2048, attention at indices 9, 19 and 29, Mamba-2 state 64.

    The builder fixes width, layers, heads and Mamba-2's state, kernel (4) and expansion (2). It does not say how Mamba-2 is cut into
    heads; here they are 64 wide, with one group of B and C. The FFN has the width of Mamba-2's inner state. `overrides` as in
    `presets.preset_config`; the vocabulary has 131,072 words unless `vocab_size` is given.
    """
    fields = {"hidden_dim": 2048, "num_layers": 32, "attention_every_n": 10, "num_heads": 16, "num_kv_heads": 4, "state": 64}
    return _builder_config(**fields, **overrides)


def _builder_config(
    *, hidden_dim: int, num_layers: int, attention_every_n: int, num_heads: int, num_kv_heads: int, state: int, **overrides
) -> NemotronHConfig:
    expand, mamba_head_width = 2, 64
    inner = expand * hidden_dim
    fields = {
        "pattern": build_pattern(num_layers, attention_every_n),
        "hidden_size": hidden_dim,
        "intermediate_size": inner,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": hidden_dim // num_heads,
        "mamba_num_heads": inner // mamba_head_width,
        "mamba_head_dim": mamba_head_width,
        "ssm_state_size": state,
        "n_groups": 1,
        "conv_kernel": 4,
        "expand": expand,
    }
    return config_of(**(fields | overrides))
