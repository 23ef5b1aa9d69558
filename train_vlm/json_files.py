"""Reading a JSON file of a known layout, with errors that say what was found and what was expected."""

import json
from pathlib import Path
from types import UnionType
from typing import Any

__all__ = ["read_json"]


def read_json(path: str | Path, kind: type | UnionType, expected: str) -> Any:
    """The content of a JSON file, an instance of `kind` (dict, list, or both); `expected` says in words what belongs there.

    Raises FileNotFoundError, or ValueError for malformed JSON and for content of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; expected {expected}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds {type(content).__name__}; expected {expected}")
    return content
