"""Reading a JSON file of a known layout, with errors that say what was found and what was expected.

And the lines of a JSON lines file, which end at a line feed and nowhere else.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

__all__ = ["json_lines", "read_json"]


def json_lines(content: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of each line of a JSON lines file that is not empty.

    Lines end at a line feed alone: str.splitlines also ends them at U+2028, U+0085 and others, which stand in JSON strings as they are.
    """
    return ((number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip())


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
