"""Take the decoder of a model folder out again, in the format it came from, from file to file.

With the record that assembling left in `language_model/` (vlm/source_files.py) the result has the names, shards, dtypes, config and
tokenizer of the checkpoint it came from; rows that were added for image tokens are cut off. What was not trained is equal byte for byte:
a wider dtype of training is turned back, which changes nothing in weights that were not trained. Without a record (a decoder that
started from random weights, one that was pruned since) it is written in transformers' format as it stands, added words included.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig, NemotronHForCausalLM

from vision_encoders.checkpoint_files import find_weight_files, raise_on_key_mismatch, read_json
from vision_encoders.stored_tensors import StoredTensor, stored_tensors

from ..checkpoint import replace_folder
from ..configuration import VLMConfig
from ..decoder.stored_weights import EMBEDDINGS, HEAD, file_shapes
from ..files import write_whole
from ..processing import VLMProcessor
from ..shard_files import INDEX, plan_shards, write_shards
from ..source_files import FOLDER, RECORD, read_record

__all__ = ["Extracted", "to_language_model"]

PREFIX = "language_model."


@dataclass(frozen=True)
class Extracted:
    """folder; whether it has the format it came from (else transformers', and `reason` says why); parameters; vocabulary rows cut off."""

    folder: Path
    as_it_came: bool
    reason: str
    parameters: int
    rows_removed: int


def to_language_model(model_folder: str | Path, out: str | Path) -> Extracted:
    """Write the decoder of `model_folder` to the folder `out` (replaced if it exists). Raises FileNotFoundError and ValueError for a
    folder that is no model of this toolkit or is damaged; nothing is then left at `out`."""
    model_folder, out = Path(model_folder), Path(out)
    if not (model_folder / "config.json").is_file():
        raise FileNotFoundError(f"{model_folder} has no config.json; expected a model folder made by python -m vlm.assemble or a run")
    if read_json(model_folder / "config.json").get("model_type") != VLMConfig.model_type:
        raise ValueError(f"{model_folder} is no model of this toolkit; expected a folder made by python -m vlm.assemble or a run")
    if model_folder.resolve() == out.resolve():
        raise ValueError(f"{out} is the model itself; give another folder for the decoder")
    config = VLMConfig.from_pretrained(model_folder)
    stored = dict(stored_tensors(find_weight_files(model_folder)))
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in stored.items() if key.startswith(PREFIX)}
    expected = file_shapes(config.text_config)
    absent = {HEAD} if config.text_config.tie_word_embeddings else set()
    raise_on_key_mismatch(
        model_folder,
        missing=expected.keys() - tensors.keys() - absent,
        unexpected=tensors.keys() - expected.keys(),
        mismatched=[f"{key} {tensor.shape}" for key, tensor in tensors.items() if tensor.shape != expected.get(key, tensor.shape)],
    )
    record_path = model_folder / FOLDER / RECORD
    record = read_record(record_path.read_bytes(), record_path) if record_path.is_file() else None
    reason = "no record of where it came from" if record is None else _difference(tensors, record)
    parameters = sum(_elements(tensor) for tensor in tensors.values())
    if reason:
        _write_as_transformers(model_folder, out, config, tensors)
        return Extracted(out, False, reason, parameters, 0)
    removed = tensors[EMBEDDINGS].shape[0] - record[EMBEDDINGS]["shape"][0]
    restored = {key: _restore(tensors[key], entry) for key, entry in record.items()}
    _write_as_it_came(model_folder / FOLDER, out, restored, record)
    return Extracted(out, True, "", sum(_elements(tensor) for tensor in restored.values()), removed)


def _difference(tensors: Mapping[str, StoredTensor], record: Mapping[str, dict]) -> str:
    """Why these weights are no longer those of the record, but for added rows; "" when they are."""
    if tensors.keys() != record.keys():
        return "its layers are no longer those it came with"
    for key, entry in record.items():
        shape = tensors[key].shape
        if key in (EMBEDDINGS, HEAD) and shape[0] >= entry["shape"][0]:
            shape = (entry["shape"][0], *shape[1:])
        if shape != entry["shape"]:
            return f"{key} has shape {shape}, it came with {entry['shape']}"
    return ""


def _restore(tensor: StoredTensor, entry: dict) -> StoredTensor:
    if tensor.shape != entry["shape"]:
        tensor = tensor.rows(0, entry["shape"][0])
    return tensor.to(entry["dtype"])


def _write_as_it_came(sources: Path, out: Path, tensors: Mapping[str, StoredTensor], record: Mapping[str, dict]) -> None:
    plan: dict[str, list[str]] = {}
    for key, entry in record.items():
        plan.setdefault(Path(entry["file"]).name, []).append(key)
    with replace_folder(out) as folder:
        write_shards(folder, tensors, dict(sorted(plan.items())))
        for path in sources.iterdir():
            if path.name not in (RECORD, INDEX):
                write_whole(folder / path.name, path.read_bytes())


def _write_as_transformers(model_folder: Path, out: Path, config: VLMConfig, tensors: Mapping[str, StoredTensor]) -> None:
    processor = VLMProcessor.from_pretrained(model_folder)
    text = config.text_config
    text.architectures, text.dtype = [NemotronHForCausalLM.__name__], tensors[EMBEDDINGS].dtype
    with replace_folder(out) as folder:
        write_shards(folder, tensors, plan_shards(tensors))
        text.save_pretrained(folder)
        generation = json.loads((model_folder / "generation_config.json").read_text(encoding="utf-8"))
        generation.pop("suppress_tokens", None)  # forbids the placeholder, which a decoder alone has no use for
        GenerationConfig.from_dict(generation).save_pretrained(folder)
        processor.tokenizer.save_pretrained(folder)


def _elements(tensor: StoredTensor) -> int:
    return tensor.size_bytes // tensor.dtype.itemsize
