"""The projector: pixel shuffle, then LayerNorm, Linear, activation, Linear; in the paper the inner width is the decoder's FFN width.

Letters: N tiles, P patches per tile, V visual tokens per tile, C vision width, D decoder width.
"""

from collections.abc import Mapping
from difflib import get_close_matches

from torch import Tensor, nn

from projector.pixel_shuffle import pixel_shuffle

__all__ = ["Projector", "load_internvl_projector"]

# InternVL's Sequential "mlp1" (LayerNorm 0, Linear 1, GELU 2, Linear 3), and transformers' names for the same.
INTERNVL_KEYS = {
    "mlp1.0.": "norm.",
    "mlp1.1.": "linear_1.",
    "mlp1.3.": "linear_2.",
    "multi_modal_projector.layer_norm.": "norm.",
    "multi_modal_projector.linear_1.": "linear_1.",
    "multi_modal_projector.linear_2.": "linear_2.",
}


class Projector(nn.Module):
    """forward(features N P C) -> visual tokens N V D, with V = P / pixel_shuffle_factor^2.

    `vision_hidden_size` is C, `hidden_size` the width between the two linear layers, `text_hidden_size` D; `activation` is a name that
    transformers knows. Raises ValueError for an unknown activation, and in forward for features that do not fit.
    """

    def __init__(
        self, vision_hidden_size: int, hidden_size: int, text_hidden_size: int, pixel_shuffle_factor: int = 2, activation: str = "gelu"
    ):
        super().__init__()
        from transformers.activations import ACT2FN

        if activation not in ACT2FN:
            near = get_close_matches(activation, list(ACT2FN), n=1)
            raise ValueError(f"unknown activation {activation!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        self.vision_hidden_size = vision_hidden_size
        self.pixel_shuffle_factor = pixel_shuffle_factor
        shuffled = vision_hidden_size * pixel_shuffle_factor**2
        self.norm = nn.LayerNorm(shuffled)
        self.linear_1 = nn.Linear(shuffled, hidden_size)
        self.activation = ACT2FN[activation]
        self.linear_2 = nn.Linear(hidden_size, text_hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """features N P C -> N V D. Raises ValueError when C or the grid of patches does not fit."""
        if features.shape[-1] != self.vision_hidden_size:
            raise ValueError(
                f"features are {features.shape[-1]} wide, the projector expects {self.vision_hidden_size}; it belongs to another encoder."
            )
        tokens = pixel_shuffle(features, self.pixel_shuffle_factor)  # N V 4C
        return self.linear_2(self.activation(self.linear_1(self.norm(tokens))))  # N V D


def load_internvl_projector(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pick InternVL's projector out of a checkpoint's tensors and rename it for `Projector.load_state_dict`.

    Reads OpenGVLab's names (mlp1.0, .1, .3) and transformers' (multi_modal_projector.*). Raises ValueError listing absent weights.
    """
    found = {}
    for key, tensor in state_dict.items():
        name = key.removeprefix("model.")
        for prefix, ours in INTERNVL_KEYS.items():
            if name.startswith(prefix):
                found[ours + name.removeprefix(prefix)] = tensor
    expected = [f"{part}.{kind}" for part in ("norm", "linear_1", "linear_2") for kind in ("weight", "bias")]
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"no InternVL projector (mlp1.* or multi_modal_projector.*) in these weights; missing: {', '.join(missing)}.")
    return found
