"""Tell the weights of a plain model from those of one with adapters inside, by their names alone.

A model folder is read by the names of its weights. With adapters in its layers a model has other names (`...base_layer.weight`,
`...lora_A.default.weight`); such a folder would be written without a word and could not be opened again. Both ways of saving ask here.
"""

import re
from collections.abc import Iterable

__all__ = ["refuse_adapters"]

ADAPTER = re.compile(r"(.*)\.(?:base_layer|lora_[A-Za-z_]+)(?:\.|$)")


def refuse_adapters(names: Iterable[str]) -> None:
    """Raises ValueError when some of these names of weights are an adapter's or stand under one; the message says what to do."""
    layers = sorted({match.group(1) for match in map(ADAPTER.match, names) if match})
    if layers:
        raise ValueError(
            f"the model has LoRA adapters in {len(layers)} layers ({', '.join(layers[:3])}{', ...' if len(layers) > 3 else ''}); "
            "add them to its weights first (vlm.lora.merge_adapter), or save them alone (vlm.lora.save_adapter)"
        )
