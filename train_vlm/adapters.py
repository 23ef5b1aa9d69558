"""LoRA in a run: adapters put on, watched in the first step, and taken off again when the model is saved.

What the recipe's `lora` section asks for is done by vlm/lora.py; here is what several ranks add to it. Under ZeRO-3 no rank has the weights
whole, so that what is saved is made from the gathered ones; and an adapter is silent only when no rank gave it a gradient.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from train_vlm.recipe import Lora
from vlm.adapter_weights import plain_weights
from vlm.checkpoint import save_model
from vlm.lora import AdapterWatch, adapted_layers, add_lora, coverage, save_adapter, take_off_adapters
from vlm.modeling import VisionLanguageModel
from vlm.processing import VLMProcessor

__all__ = ["adapter_folder", "check_adapters", "put_on_adapters", "save_trained"]


def adapter_folder(out: str | Path) -> Path:
    return Path(out).with_name(Path(out).name + ".adapter")


def put_on_adapters(model: VisionLanguageModel, lora: Lora) -> str:
    """Adapters on the decoder, in place; returns the table of what they reach. Raises ValueError for a target that matches nothing."""
    targets = None if lora.targets is None else list(lora.targets)
    add_lora(model, targets, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout)
    return "\n".join([f"LoRA of rank {lora.rank} reaches", *(row.line() for row in coverage(model))])


def check_adapters(watch: AdapterWatch) -> None:
    """After the first step with something to learn; every rank calls it.

    Raises ValueError, on every rank, when an adapter had no gradient on any of them.
    """
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, watch.silent)
    watch.check(sorted(set(gathered[0]).intersection(*gathered[1:])))


def save_trained(
    model: VisionLanguageModel, processor: VLMProcessor, folder: str | Path, weights: Mapping[str, Tensor], *, merge: bool = True
) -> None:
    """Write a model folder from the gathered `weights`; called by the rank that has them. Adapters are written beside it (FOLDER.adapter),
    with `merge` added into the decoder's weights, and taken off `model`, which is then of no more use for training."""
    if adapted_layers(model):
        save_adapter(model, adapter_folder(folder), state_dict=weights)
        weights = plain_weights(model, weights, merge=merge)
        take_off_adapters(model)
    save_model(model, processor, folder, state_dict=weights)
