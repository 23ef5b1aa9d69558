"""Reading the JSON of official files and writing results whole, with messages a user can act on.

`vlm.files` writes whole files too, but importing anything of `vlm` imports torch, which scoring must not need; hence the second copy.
"""

import json
import os
import re
from hashlib import sha256
from pathlib import Path

__all__ = ["file_sha256", "read_json", "write_json"]


def read_json(path: str | Path):
    """The parsed content of a JSON file, or of a folder NAME that holds the pieces NAME_*.json of one object (GQA's layout).

    Raises FileNotFoundError when there is no such file, ValueError with line and column when it is not JSON.
    """
    path = Path(path)
    if path.is_dir():
        merged = {}
        for piece in _pieces(path):
            content = _read(piece)
            if not isinstance(content, dict):
                raise ValueError(f"{piece}: expected a JSON object with a part of {path.name}, found a {type(content).__name__}")
            merged.update(content)
        return merged
    return _read(path)


def file_sha256(path: str | Path) -> str:
    """SHA-256 (hex) of a file, or of the pieces of a folder one after the other."""
    path = Path(path)
    digest = sha256()
    for part in _pieces(path) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_json(path: str | Path, content, *, indent: int | None = None) -> Path:
    """Writes `content` as JSON by a temporary file in the same folder, fsync and rename: the old file or the new one, never a half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=indent, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _read(path: Path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found")
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not valid JSON: not UTF-8 text") from None


def _pieces(folder: Path) -> list[Path]:
    pieces = [path for path in folder.glob("*.json") if path.name.startswith(f"{folder.name}_")]
    if not pieces:
        raise FileNotFoundError(f"{folder} holds no {folder.name}_*.json")
    return sorted(pieces, key=lambda path: [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", path.stem)])
