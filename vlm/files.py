"""Write a file whole or not at all.

A run can be killed at any moment; a reader must then find the old file or the new one, never a half. Everything in this project
that leaves a result on disk goes through `write_whole`.
"""

import os
import tempfile
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: str | Path, content: bytes | str) -> Path:
    """Write `content` (str is UTF-8) to `path` by a temporary file in the same folder, fsync and rename; returns the path.

    Parent folders are made. Raises OSError when the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode("utf-8") if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
