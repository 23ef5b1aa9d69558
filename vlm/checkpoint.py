"""Open and save a model folder: weights, configuration, tokenizer, processor, chat template - one folder, whole or not at all."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from .configuration import VLMConfig
from .modeling import VisionLanguageModel
from .processing import VLMProcessor

__all__ = ["load_model", "save_model"]


def load_model(folder: str | Path, *, dtype: torch.dtype | None = None, device=None) -> tuple[VisionLanguageModel, VLMProcessor]:
    """Model (in eval mode) and processor of a folder saved by `save_model` or `save_pretrained`.

    Raises FileNotFoundError when the folder is not there and ValueError when it is no checkpoint of this toolkit or its weights do not fit.
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
        model, report = VisionLanguageModel.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
        processor = VLMProcessor.from_pretrained(folder)
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} cannot be loaded: {reason}; the checkpoint is damaged or of another kind") from error
    wrong = {name: sorted(map(str, report[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if report.get(name)}
    if wrong:
        lines = "; ".join(
            f"{name.replace('_', ' ')}: {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''}" for name, keys in wrong.items()
        )
        raise ValueError(f"{folder} does not fit its configuration: {lines}")
    if device is not None:
        model = model.to(device)
    return model.eval(), processor


def save_model(
    model: VisionLanguageModel, processor: VLMProcessor, folder: str | Path, *, state_dict: dict | None = None, max_shard_size: str = "5GB"
) -> Path:
    """Write the folder beside its place and rename it, so that a reader never sees half a checkpoint. An older folder is replaced."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
    try:
        model.save_pretrained(temporary, state_dict=state_dict, max_shard_size=max_shard_size)
        processor.save_pretrained(temporary)
        for path in temporary.iterdir():
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
    return folder
