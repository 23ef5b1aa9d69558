"""A plain model's weights out of those of a model with adapters, by name alone.

Where an engine shards the model (ZeRO-3), the modules hold nothing: its weights come gathered, as a dict, and adapters must be added into
them, or left out, there. lora.py does the same on a model in one piece; a test holds the two together.
"""

from collections.abc import Mapping

from torch import Tensor

from .lora import adapted_layers
from .modeling import VisionLanguageModel

__all__ = ["plain_weights"]


def plain_weights(model: VisionLanguageModel, weights: Mapping[str, Tensor], *, merge: bool) -> dict[str, Tensor]:
    """`weights`: the state dict of `model`, adapters and all -> that of the model without them; `merge`: with W + scaling B A for W.

    The sum is made in float32 and has W's dtype. Raises ValueError when the model has no adapters.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapters to merge or to leave out")
    plain = {}
    for name, tensor in weights.items():
        if ".lora_" in name:
            continue
        owner, found, leaf = name.partition(".base_layer.")
        plain[f"{owner}.{leaf}" if found else name] = tensor
    if merge:
        for owner, layer in layers.items():
            name = f"{owner}.weight"
            total = plain[name].float()
            for adapter, scaling in layer.scaling.items():
                up, down = (weights[f"{owner}.lora_{kind}.{adapter}.weight"].float() for kind in "BA")
                total = total + scaling * (up @ down)
            plain[name] = total.to(plain[name].dtype)
    return plain
