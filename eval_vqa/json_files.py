"""Reading the JSON of official files and writing results whole, with messages a user can act on.

`vlm.files` writes whole files too, but importing anything of `vlm` imports torch, which scoring must not need; hence the second copy.
"""

import json
import os
import re
from hashlib import sha256
from pathlib import Path

from eval_vqa.archives import is_archive, members, read_bytes

__all__ = ["file_sha256", "read_json", "write_json"]


def read_json(path: str | Path):
    """The parsed content of a JSON file, or of a folder NAME that holds the pieces NAME_*.json of one object (GQA's layout).

    Both may lie in a zip file (see `eval_vqa.archives`). Raises FileNotFoundError when there is no such file, ValueError with line and
    column when it is not JSON.
    """
    path = Path(path)
    if pieces := _pieces(path):
        merged = {}
        for piece in pieces:
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
    for part in _pieces(path) or [path]:
        if not part.is_file():
            digest.update(read_bytes(part))
            continue
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
    try:
        return json.loads(read_bytes(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not valid JSON: not UTF-8 text") from None


def _pieces(path: Path) -> list[Path]:
    """The pieces NAME_*.json in a folder NAME, on disk or in a zip file, by number; [] for what is no folder."""
    if path.is_dir():
        names = [entry.name for entry in path.iterdir()]
    elif archive := next((parent for parent in path.parents if is_archive(parent)), None):
        inside = f"{path.relative_to(archive).as_posix()}/"
        names = [name.removeprefix(inside) for name in members(archive) if name.startswith(inside)]
        if not names:
            return []
    else:
        return []
    pieces = [path / name for name in names if name.startswith(f"{path.name}_") and name.endswith(".json")]
    if not pieces:
        raise FileNotFoundError(f"{path} holds no {path.name}_*.json")
    return sorted(pieces, key=lambda piece: [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", piece.stem)])
