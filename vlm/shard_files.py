"""Write safetensors shards with an index, a block of bytes at a time.

safetensors' own writer wants all tensors of a file in memory at once; a folder assembled from checkpoints of many gigabytes is mostly
bytes copied from one file to another. Names and layout of the files are those of transformers (`model.safetensors`, or
`model-00001-of-00003.safetensors` with `model.safetensors.index.json`), so that everything opens them.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from vision_encoders.stored_tensors import DTYPES, StoredTensor

from .files import write_whole

__all__ = ["DEFAULT_SHARD_BYTES", "plan_shards", "write_shards"]

DEFAULT_SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def plan_shards(tensors: Mapping[str, StoredTensor], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> dict[str, list[str]]:
    """File names -> keys, in the given order; a file holds at most `max_shard_bytes` of weights, or one larger tensor."""
    if max_shard_bytes < 1:
        raise ValueError(f"{max_shard_bytes = }; expected at least 1")
    groups, filled = [[]], 0
    for key, tensor in tensors.items():
        if groups[-1] and filled + tensor.size_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += tensor.size_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, start=1)}


def write_shards(folder: Path, tensors: Mapping[str, StoredTensor], plan: Mapping[str, list[str]]) -> None:
    """Write the planned files and, when there are several, their index, into an existing folder. Files are synced to disk.

    Raises ValueError when a source file ends too early, OSError when the disk is full.
    """
    for name, keys in plan.items():
        _write_file(folder / name, {key: tensors[key] for key in keys})
    if len(plan) > 1:
        total = sum(tensor.size_bytes for tensor in tensors.values())
        places = {key: name for name, keys in plan.items() for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, tensors: dict[str, StoredTensor]) -> None:
    # Order: widest dtype first, so that every tensor starts at a multiple of its item size.
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key in order:
        begin, end = end, end + tensors[key].size_bytes
        header[key] = {"dtype": NAMES[tensors[key].dtype], "shape": list(tensors[key].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            for block in tensors[key].blocks():
                file.write(block)
        assert file.tell() == 8 + len(text) + end, f"{path}: {file.tell()} bytes written, {8 + len(text) + end} announced"
        file.flush()
        os.fsync(file.fileno())
    os.chmod(path, 0o644)
