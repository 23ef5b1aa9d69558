"""What a benchmark leaves: its figures as JSON, and the page that people read, which is printed too."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vlm.files import write_whole  # noqa: E402

__all__ = ["write_results"]


def write_results(out: Path, result: dict, page: str) -> None:
    """`out` without ending: OUT.json and OUT.md, each whole or not at all. Raises OSError where they cannot be written."""
    write_whole(out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    write_whole(out.with_suffix(".md"), page)
    print(page)
