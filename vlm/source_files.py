"""What came with a decoder besides its weights, kept word for word in the `language_model/` folder of a model.

A decoder that was given eyes can be taken out again in the format it came from: with its own config, tokenizer, chat template, licence
and, for NVIDIA's format, Python files (which are kept, never run). None of these can be derived from the joined model. A record of its
weights (names, dtypes, shapes, files) goes with them.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from vision_encoders.stored_tensors import DTYPES, StoredTensor

from .files import write_whole

__all__ = ["FOLDER", "RECORD", "read_record", "read_source_files", "record_of", "write_source_files"]

FOLDER, RECORD = "language_model", "weights.json"
SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py", ".md", ".pdf")
LICENCE_WORDS = ("license", "licence", "notice")
LARGEST_BYTES = 64 << 20
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_source_files(checkpoint: str | Path) -> dict[str, bytes]:
    """Names and content of the files in a decoder's folder that are no weights: config, tokenizer, template, licence, code."""
    files = {}
    for path in sorted(Path(checkpoint).iterdir()):
        wanted = path.suffix in SUFFIXES or any(word in path.name.lower() for word in LICENCE_WORDS)
        is_index = path.name.endswith(".index.json")
        if wanted and not is_index and not path.name.startswith(".") and path.is_file() and path.stat().st_size <= LARGEST_BYTES:
            files[path.name] = path.read_bytes()
    files.pop(RECORD, None)
    return files


def record_of(tensors: Mapping[str, StoredTensor], places: Mapping[str, str]) -> bytes:
    """Keys, dtypes and shapes of a decoder's weights, and the file of each, as JSON."""
    entries = {
        key: {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "file": places[key]} for key, tensor in sorted(tensors.items())
    }
    return (json.dumps(entries, indent=0) + "\n").encode()


def read_record(content: bytes, source: str | Path) -> dict[str, dict]:
    """The inverse of `record_of`, with dtypes of torch. Raises ValueError when it is damaged."""
    try:
        return {
            key: {"dtype": DTYPES[entry["dtype"]], "shape": tuple(entry["shape"]), "file": str(entry["file"])}
            for key, entry in json.loads(content).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} is no record of weights ({error}); assemble the model again") from error


def write_source_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write them into `folder`/language_model; nothing when there are none."""
    for name, content in files.items():
        write_whole(folder / FOLDER / Path(name).name, content)
