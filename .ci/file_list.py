"""Write docs/files.md: every file of the project with its purpose, taken from the first sentence of its docstring.

    python .ci/file_list.py

A test compares, so that the page cannot fall behind.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("vlm", "vision_encoders", "projector", "train_vlm", "eval_vqa", "demo", "benchmarks", ".ci")


def purpose(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.:?!])\s+(?=[A-Z`])", text)[0]


def file_list() -> str:
    """The page."""
    lines = ["# Every file and its purpose", "", "Written by `python .ci/file_list.py` from the files themselves.", ""]
    for top in FOLDERS:
        for folder in sorted({path.parent for path in (ROOT / top).rglob("*.py")}):
            lines += [f"## {folder.relative_to(ROOT).as_posix()}/", "", "| file | purpose |", "|---|---|"]
            for path in sorted(folder.glob("*.py")):
                lines.append(f"| `{path.name}` | {purpose(path).replace('|', '/')} |")
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    (ROOT / "docs" / "files.md").write_text(file_list(), encoding="utf-8")
