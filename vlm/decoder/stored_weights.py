"""Look into a decoder's checkpoint without reading its weights: what there is, whether it fits its config, where each tensor stands.

`load_language_model` needs the memory of the model. Joining a decoder with an encoder on disk, or taking it out again, only moves bytes;
this file finds every reason to refuse before the first byte is written.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from vision_encoders.checkpoint_files import find_weight_files, raise_on_key_mismatch
from vision_encoders.stored_tensors import StoredTensor, stored_tensors

from .key_names import UNUSED_PREFIXES, to_file_names
from .loading import read_config

__all__ = ["StoredLanguageModel", "file_shapes", "open_language_model"]

EMBEDDINGS, HEAD = "backbone.embeddings.weight", "lm_head.weight"


@dataclass(frozen=True)
class StoredLanguageModel:
    """config, tensors by their key in the files, the safetensors file that each belongs into (the one it stands in, or the same name for
    a pickled one), and the keys that no model of transformers uses."""

    config: NemotronHConfig
    tensors: dict[str, StoredTensor]
    places: dict[str, str]
    left_out: list[str]

    @property
    def dtype(self) -> torch.dtype:
        """That of the embeddings."""
        return self.tensors[EMBEDDINGS].dtype


def open_language_model(checkpoint: str | Path) -> StoredLanguageModel:
    """The decoder in folder `checkpoint`, NVIDIA's or transformers' format. Raises as `load_language_model`, with keys as in the files."""
    checkpoint = Path(checkpoint)
    config = read_config(checkpoint)
    found, places = {}, {}
    for file in find_weight_files(checkpoint):
        for key, tensor in stored_tensors([file]):
            found[key] = tensor
            places[key] = Path(file.name.replace("pytorch_model", "model")).with_suffix(".safetensors").name
    left_out = [key for key in found if key.startswith(UNUSED_PREFIXES)]
    tensors = {key: tensor for key, tensor in found.items() if key not in set(left_out)}
    expected = file_shapes(config)
    absent = {HEAD} if config.tie_word_embeddings else set()
    raise_on_key_mismatch(
        checkpoint,
        missing=expected.keys() - tensors.keys() - absent,
        unexpected=tensors.keys() - expected.keys(),
        mismatched=[
            f"{key} (file {tensor.shape}, model {expected[key]})"
            for key, tensor in tensors.items()
            if tensor.shape != expected.get(key, tensor.shape)
        ],
    )
    return StoredLanguageModel(config, tensors, places, left_out)


def file_shapes(config: NemotronHConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a checkpoint of this config, from the model on the meta device."""
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)
    entries = (
        to_file_names(name, StoredTensor(tensor.dtype, tuple(tensor.shape), compute=tensor.clone))
        for name, tensor in model.state_dict().items()
    )
    return {key: tensor.shape for group in entries for key, tensor in group}
