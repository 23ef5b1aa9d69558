"""Read a Nemotron-H decoder from disk exactly: NVIDIA's original format or transformers', any number of shards.

Why not `from_pretrained`: it casts every weight to one dtype (A_log, D and dt_bias are often kept wider in the file), it builds the
wrong head width from early configs (`attention_head_dim`), it draws missing or mismatched weights again with a printed table where
this must be an error, and the weights it returns are views of the file.

Both formats name the weights `backbone.layers.N.mixer...`, one file entry per expert; transformers' module says `model.` and stacks
the experts. Shards are read one after another into a model on the meta device: the peak is the model and one tensor.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, NemotronHConfig, NemotronHForCausalLM

from vision_encoders.checkpoint_files import assign_weights, find_weight_files, iterate_tensors, raise_on_key_mismatch, read_json

__all__ = ["load_language_model", "read_config"]

# Used in float32 by the scan and the router, so never narrowed below what the file has.
NEVER_NARROWED = ("A_log", "D", "dt_bias", "e_score_correction_bias")
EXPERT_KEY = re.compile(r"(.*\.mixer\.experts)\.(\d+)\.(up_proj|down_proj)\.weight")
# Heads for predicting several tokens ahead: in some checkpoints, in no model of transformers.
UNUSED_PREFIXES = ("mtp.",)


def load_language_model(
    checkpoint: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> NemotronHForCausalLM:
    """Load the decoder in folder `checkpoint`, in eval mode, on `device` (CPU by default).

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
        target = tensor.dtype
        if dtype is not None and tensor.is_floating_point():
            target = dtype if name.rpartition(".")[2] not in NEVER_NARROWED else torch.promote_types(dtype, tensor.dtype)
        return tensor.to(device=device or "cpu", dtype=target, copy=True)

    tied = bool(config.tie_word_embeddings)
    tensors = _stack_experts(_rename(iterate_tensors(files)), config.n_routed_experts, source=checkpoint)
    assign_weights(model, tensors, source=checkpoint, convert=convert, may_be_absent=lambda name: tied and name == "lm_head.weight")
    if tied:
        model.lm_head.weight = model.model.embeddings.weight

    # 3. What from_pretrained would also have set.
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = True  # a larger model around this one must not draw its weights again
    config.dtype = model.model.embeddings.weight.dtype
    config._name_or_path = str(checkpoint)
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    return model.eval()


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


def _rename(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in tensors:
        if not key.startswith(UNUSED_PREFIXES):
            yield (f"model.{key.removeprefix('backbone.')}" if key.startswith("backbone.") else key), tensor


def _stack_experts(tensors: Iterable[tuple[str, Tensor]], num_experts: int, *, source: Path) -> Iterator[tuple[str, Tensor]]:
    """Collect `experts.N.up_proj.weight` (out, in) into `experts.up_proj` (experts, out, in); all else passes through.

    Raises ValueError listing the experts that are missing or too many, or of another shape than their neighbours.
    """
    stacks: dict[str, Tensor] = {}
    waiting: dict[str, set[int]] = {}
    unexpected, mismatched = [], []
    for key, tensor in tensors:
        match = EXPERT_KEY.fullmatch(key)
        if match is None:
            yield key, tensor
            continue
        name, index = f"{match.group(1)}.{match.group(3)}", int(match.group(2))
        if index >= num_experts:
            unexpected.append(key)
            continue
        if name not in stacks:
            stacks[name] = tensor.new_empty((num_experts, *tensor.shape))
            waiting[name] = set(range(num_experts))
        if tensor.shape != stacks[name].shape[1:]:
            mismatched.append(f"{key} (file {tuple(tensor.shape)}, its neighbours {tuple(stacks[name].shape[1:])})")
            continue
        stacks[name][index] = tensor
        waiting[name].discard(index)
        if not waiting[name]:
            yield name, stacks.pop(name)
            del waiting[name]
    missing = [f"{name.rpartition('.')[0]}.{index}.{name.rpartition('.')[2]}.weight" for name in waiting for index in sorted(waiting[name])]
    raise_on_key_mismatch(source, missing=missing, unexpected=unexpected, mismatched=mismatched)
