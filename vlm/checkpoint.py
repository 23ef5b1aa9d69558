"""Open and save a model folder: weights, configuration, tokenizer, processor, chat template - one folder, whole or not at all.

Why not from_pretrained and save_pretrained: they cast all weights to one dtype (but those of the scan), draw what does not fit again
with a printed table, and show progress bars for models of two million parameters. The folders are the same, and
transformers' own methods open them; a test pins the names.
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig

from vision_encoders import build_vision_encoder
from vision_encoders.checkpoint_files import assign_weights, find_weight_files, iterate_tensors
from vision_encoders.stored_tensors import StoredTensor

from .adapter_names import refuse_adapters
from .configuration import VLMConfig
from .decoder.key_names import to_file_names, to_module_names
from .decoder.loading import loaded_dtype, mark_initialized
from .files import write_whole
from .golden.pack import write as write_golden_pack
from .model_card import model_card
from .modeling import VisionLanguageModel
from .processing import VLMProcessor
from .shard_files import DEFAULT_SHARD_BYTES, plan_shards, write_shards
from .source_files import FOLDER, write_source_files

__all__ = ["load_model", "replace_folder", "save_model", "write_settings"]

DECODER = "language_model."
BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
MOST_READ_AGAIN_BYTES = 4 * 10**9  # of weights given apart, which are read again for the golden pack


def load_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, device=None, mapped: bool = False
) -> tuple[VisionLanguageModel, VLMProcessor]:
    """Model (in eval mode) and processor of a folder saved by `save_model` or `save_pretrained`.

    Each weight keeps the dtype it has in the file. With `dtype` all float weights are cast to it, but A_log, D, dt_bias and the experts'
    score correction are never made narrower than in the file. With `mapped`, parameters that need no cast and no other device stay pages
    of their files, which all processes of a machine share: for a model whose weights soon go elsewhere. Until then the files must stay.

    Raises FileNotFoundError when the folder is not there and ValueError when it is no checkpoint of this toolkit or its weights do not
    fit: missing, unexpected and mismatched keys are listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}; expected a model folder made by python -m vlm.assemble or a training run")
    missing = [name for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if (folder / "processor_config.json").is_file() and "preprocessor_config.json" in missing:
        missing.remove("preprocessor_config.json")
    if missing:
        raise ValueError(
            f"{folder} is no model checkpoint: {', '.join(missing)} missing; expected a folder made by python -m vlm.assemble or a run"
        )
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        if kind != VLMConfig.model_type:
            raise ValueError(f"its config.json is that of a model of type {kind!r}, not {VLMConfig.model_type!r}")
        model = _build(VLMConfig.from_pretrained(folder), folder, dtype, device, mapped)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        processor = VLMProcessor.from_pretrained(folder)
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} cannot be loaded: {reason}; the checkpoint is damaged or of another kind") from error
    sources = folder / FOLDER
    model.source_files = {path.name: path.read_bytes() for path in sorted(sources.iterdir())} if sources.is_dir() else {}
    return model.eval(), processor


def _build(config: VLMConfig, folder: Path, dtype: torch.dtype | None, device, mapped: bool = False) -> VisionLanguageModel:
    # 1. The model without storage; nothing is drawn.
    with torch.device("meta"):
        model = VisionLanguageModel(config)

    # 2. Every tensor of the files in its place.
    def convert(name: str, tensor: Tensor) -> Tensor:
        return tensor.to(device=device or "cpu", dtype=loaded_dtype(name, tensor.dtype, dtype))

    experts = config.text_config.n_routed_experts
    named = to_module_names(iterate_tensors(find_weight_files(folder)), experts, source=folder, prefix=DECODER)
    tied = bool(config.text_config.tie_word_embeddings)
    head = f"{DECODER}lm_head.weight"
    assign_weights(model, named, source=folder, convert=convert, may_be_absent=lambda name: tied and name == head, mapped=mapped)
    if tied:
        model.language_model.lm_head.weight = model.language_model.model.embeddings.weight

    # 3. Tables that are computed and never saved (rotary embeddings of some towers).
    tables = {name: buffer for name, buffer in model.vision_encoder.named_buffers() if buffer.is_meta}
    if tables:
        with torch.random.fork_rng(devices=[]):
            fresh = dict(build_vision_encoder(**config.vision_config.encoder).named_buffers())
        for name in tables:
            owner, _, leaf = name.rpartition(".")
            model.vision_encoder.get_submodule(owner)._buffers[leaf] = fresh[name].to(device or "cpu")
    mark_initialized(model)
    config.dtype = config.text_config.dtype = model.language_model.model.embeddings.weight.dtype
    return model


def save_model(
    model: VisionLanguageModel,
    processor: VLMProcessor,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_BYTES,
) -> Path:
    """Write the folder beside its place and rename it, so that a reader never sees half a checkpoint. An older folder is replaced.

    `state_dict`: weights to save in place of the model's own (ZeRO-3 gathers them apart). `max_shard_size`: bytes, or "5GB".
    What came with the decoder (vlm/source_files.py) and a model card go along. Raises ValueError when weights are missing, or when there
    are adapters in the model's layers.
    """
    weights = model.state_dict() if state_dict is None else state_dict
    refuse_adapters(weights)
    absent = model.state_dict().keys() - weights.keys()
    if absent:
        raise ValueError(f"{len(absent)} weights are missing from the given state_dict: {', '.join(sorted(absent)[:8])}")
    tied = bool(model.config.text_config.tie_word_embeddings)
    tensors = {}
    for name, tensor in weights.items():
        if not (tied and name == f"{DECODER}lm_head.weight"):
            tensors |= dict(to_file_names(name, StoredTensor.of(tensor), prefix=DECODER))
    if isinstance(max_shard_size, str):
        max_shard_size = int(float(max_shard_size[:-2]) * BYTES[max_shard_size[-2:].upper()])
    dtype = weights[f"{DECODER}model.embeddings.weight"].dtype
    with replace_folder(folder) as temporary:
        write_shards(temporary, tensors, plan_shards(tensors, max_shard_size))
        write_settings(temporary, model.config, model.generation_config, processor, getattr(model, "source_files", None) or {}, dtype=dtype)
        if state_dict is None:
            write_golden_pack(model, processor, temporary)
        elif sum(tensor.size_bytes for tensor in tensors.values()) <= MOST_READ_AGAIN_BYTES:
            # The model's own weights may be in another dtype, or spread over ranks: the pack is made of what was written.
            write_golden_pack(_build(copy.deepcopy(model.config), temporary, None, None), processor, temporary)
        else:
            write_golden_pack(None, processor, temporary, reason="the weights came apart from their model; python -m vlm.golden --write")
    return Path(folder)


def write_settings(
    folder: Path,
    config: VLMConfig,
    generation: GenerationConfig,
    processor: VLMProcessor,
    source_files: Mapping[str, bytes],
    *,
    dtype: torch.dtype,
) -> None:
    """Everything in a model folder that is no weight. `dtype` is the decoder's."""
    config = copy.deepcopy(config)
    config.architectures, config.dtype = [VisionLanguageModel.__name__], dtype
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_source_files(folder, source_files)
    write_whole(folder / "README.md", model_card(config))


@contextmanager
def replace_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and is removed when it does not."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder, or a path where one can be made")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        os.chmod(temporary, 0o755)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
            os.replace(temporary, folder)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
