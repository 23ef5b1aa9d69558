"""Read a Nemotron-H decoder from disk exactly: NVIDIA's original format or transformers', any number of shards.

Why not `from_pretrained`: it casts every weight to one dtype (A_log, D and dt_bias are often kept wider in the file), it builds the
wrong head width from early configs (`attention_head_dim`), it draws missing or mismatched weights again with a printed table where
this must be an error, and the weights it returns are views of the file.

Shards are read one after another into a model on the meta device: the peak is the model and one tensor.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, NemotronHConfig, NemotronHForCausalLM

from vision_encoders.checkpoint_files import assign_weights, find_weight_files, iterate_tensors, read_json
from vision_encoders.stored_tensors import stored_tensors

from .key_names import to_module_names

__all__ = ["load_language_model", "loaded_dtype", "mark_initialized", "read_config"]

# Used in float32 by the scan and the router, so never narrowed below what the file has.
NEVER_NARROWED = ("A_log", "D", "dt_bias", "e_score_correction_bias")


def load_language_model(
    checkpoint: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> NemotronHForCausalLM:
    """Load the decoder in folder `checkpoint`, in eval mode, on `device` (CPU by default; on "meta" names and shapes are compared, and no
    weight is read).

    Each weight keeps the dtype it has in the file. With `dtype` all float weights are cast to it, but A_log, D, dt_bias and the
    experts' score correction are never made narrower than in the file.

    Raises FileNotFoundError for a folder without config or weights or with missing shards, and ValueError for a config of another model,
    a damaged file, and weights that do not fit: the message lists the missing, unexpected and mismatched keys.
    """
    checkpoint = Path(checkpoint)
    config = read_config(checkpoint)
    files = find_weight_files(checkpoint)

    # 1. The model without storage; nothing is drawn.
    with torch.device("meta"):
        model = NemotronHForCausalLM(config)

    # 2. Every tensor of the files in its place.
    def convert(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(device=device or "cpu", dtype=loaded_dtype(name, tensor.dtype, dtype), copy=True)

    tied = bool(config.tie_word_embeddings)
    if torch.device(device or "cpu").type == "meta":
        stored = ((name, torch.empty(kept.shape, dtype=kept.dtype, device="meta")) for name, kept in stored_tensors(files))
    else:
        stored = iterate_tensors(files)
    tensors = to_module_names(stored, config.n_routed_experts, source=checkpoint)
    assign_weights(model, tensors, source=checkpoint, convert=convert, may_be_absent=lambda name: tied and name == "lm_head.weight")
    if tied:
        model.lm_head.weight = model.model.embeddings.weight

    # 3. What from_pretrained would also have set.
    mark_initialized(model)
    config.dtype = model.model.embeddings.weight.dtype
    config._name_or_path = str(checkpoint)
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model.eval()


def mark_initialized(model: nn.Module) -> None:
    """Tell transformers that these weights are loaded: it must not draw them again when a larger model is built around them."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = True


def loaded_dtype(name: str, stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """dtype of a weight after loading: as stored, or `wanted` for floats; A_log, D, dt_bias and the router's bias never narrower."""
    if wanted is None or not stored.is_floating_point:
        return stored
    return wanted if name.rpartition(".")[2] not in NEVER_NARROWED else torch.promote_types(wanted, stored)


def read_config(checkpoint: str | Path) -> NemotronHConfig:
    """The config of a decoder's folder, in NVIDIA's or transformers' format.

    Raises FileNotFoundError without config.json, ValueError when it describes another model, a quantised one, or contradicts itself.
    """
    path = Path(checkpoint) / "config.json"
    if not Path(checkpoint).is_dir():
        raise FileNotFoundError(f"{checkpoint} is no folder; expected the folder of a Nemotron-H checkpoint with config.json and weights.")
    fields = read_json(path)
    if fields.get("model_type") != "nemotron_h":
        raise ValueError(f"{path} describes a model of type {fields.get('model_type')!r}; expected 'nemotron_h', a Nemotron-H decoder.")
    if fields.get("quantization_config"):
        raise ValueError(f"{path} describes quantised weights; load the BF16 checkpoint of this model instead.")
    for code in ("auto_map", "architectures"):  # NVIDIA's point to Python files beside the weights, which are not run
        fields.pop(code, None)
    if fields.get("head_dim") is None and fields.get("attention_head_dim") is not None:
        fields["head_dim"] = fields["attention_head_dim"]
    fields.pop("attention_head_dim", None)
    pattern, types, layers = fields.get("hybrid_override_pattern"), fields.get("layers_block_type"), fields.get("num_hidden_layers")
    if pattern is None and types is None:
        raise ValueError(f"{path} has neither 'hybrid_override_pattern' nor 'layers_block_type'; one of them says what each layer is.")
    count = len(pattern if types is None else types)
    if layers is not None and layers != count:
        raise ValueError(f"{path} says num_hidden_layers {layers}, but its pattern has {count} layers; use the config of these weights.")
    try:
        return NemotronHConfig.from_dict(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no valid Nemotron-H config: {type(error).__name__}: {error}") from error
    except Exception as error:  # huggingface_hub's strict dataclasses have error classes of their own
        raise ValueError(f"{path} is no valid Nemotron-H config: {error}") from error
