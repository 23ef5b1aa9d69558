"""Count a decoder's parameters from its config, before anything is built: to choose a preset, plan memory, search for a candidate.

The arithmetic follows the matrices that transformers' NemotronHForCausalLM builds; a test compares it with that model on the meta
device. Buffers (the experts' score correction) are no parameters.
"""

from transformers import NemotronHConfig

from .pattern import letters_of

__all__ = ["layer_param_count", "param_count"]


def param_count(config: NemotronHConfig) -> int:
    """The exact number of parameters of NemotronHForCausalLM(config), embeddings and output head included."""
    embedding = config.vocab_size * config.hidden_size
    head = embedding  # transformers builds it apart, whatever tie_word_embeddings says
    layers = sum(layer_param_count(config, letter) for letter in letters_of(config.layers_block_type))
    return embedding + layers + config.hidden_size + head


def layer_param_count(config: NemotronHConfig, letter: str) -> int:
    """Parameters of one layer of kind `letter` (M * - E), with the norm before it. Raises ValueError for another letter."""
    counts = {"M": _mamba, "*": _attention, "-": _feed_forward, "E": _mixture}
    if letter not in counts:
        raise ValueError(f"layer letter {letter!r}, expected one of {', '.join(counts)}.")
    return config.hidden_size + counts[letter](config)


def _mamba(config: NemotronHConfig) -> int:
    hidden, heads = config.hidden_size, config.mamba_num_heads
    inner = heads * config.mamba_head_dim
    convolved = inner + 2 * config.n_groups * config.ssm_state_size  # x, B, C
    in_proj = _linear(hidden, inner + convolved + heads, config.use_bias)  # gate | x, B, C | dt
    convolution = convolved * config.conv_kernel + (convolved if config.use_conv_bias else 0)
    per_head = 3 * heads  # A_log, D, dt_bias
    return in_proj + convolution + per_head + inner + _linear(inner, hidden, config.use_bias)  # inner: the gated norm


def _attention(config: NemotronHConfig) -> int:
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    return config.hidden_size * (2 * queries + 2 * keys)  # q and o, k and v; transformers builds no bias here


def _feed_forward(config: NemotronHConfig) -> int:
    return _two_layers(config, config.intermediate_size)


def _mixture(config: NemotronHConfig) -> int:
    latent = config.moe_latent_size
    expert_input = config.hidden_size if latent is None else latent
    experts = config.n_routed_experts * 2 * expert_input * config.moe_intermediate_size
    router = config.n_routed_experts * config.hidden_size
    shared = _two_layers(config, config.moe_shared_expert_intermediate_size)
    projections = 0
    if latent is not None:
        projections = _linear(config.hidden_size, latent, config.mlp_bias) + _linear(latent, config.hidden_size, config.mlp_bias)
    return experts + router + shared + projections


def _two_layers(config: NemotronHConfig, width: int) -> int:
    return _linear(config.hidden_size, width, config.mlp_bias) + _linear(width, config.hidden_size, config.mlp_bias)


def _linear(inputs: int, outputs: int, bias: bool) -> int:
    return inputs * outputs + (outputs if bias else 0)
