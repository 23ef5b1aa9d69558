"""The layers of the project, read from the imports of every file: down only, heavy packages only where they belong, no shadowed modules.

(The file is not called test_layers.py because tests/decoder has one: pytest wants file names apart.)
"""

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "train_vlm": {"vlm", "vision_encoders", "projector"},
    "eval_vqa": {"vlm", "vision_encoders", "projector"},
    "demo": {"vlm", "vision_encoders", "projector"},
    "vlm": {"vision_encoders", "projector"},
    "vision_encoders": set(),
    "projector": set(),
}
ONLY_IN = {
    "deepspeed": "train_vlm",
    "webdataset": "train_vlm",
    "tensorboard": "train_vlm",
    "gradio": "demo",
    "fastapi": "demo",
    "uvicorn": "demo",
}
FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, also inside functions; its own package for relative imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.relative_to(ROOT).parts[0] if node.level else node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path):
    """One import of a sibling, and neither can be used or changed alone any more."""
    package = path.relative_to(ROOT).parts[0]
    foreign = (imported(path) & MAY_IMPORT.keys()) - MAY_IMPORT[package] - {package}
    assert not foreign, f"{package} must not import {', '.join(foreign)}"
    misplaced = {name for name in imported(path) & ONLY_IN.keys() if ONLY_IN[name] != package}
    assert not misplaced, f"{', '.join(misplaced)} belongs elsewhere"


def test_every_package_was_looked_at():
    """A renamed folder would make the test above pass on nothing."""
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == MAY_IMPORT.keys() and len(FILES) > 50


@pytest.mark.parametrize("package", ["train_vlm", "eval_vqa", "demo"])
def test_no_program_shadows_another_module(package):
    """`python eval_vqa/vqav2.py` puts that folder first on the path: a file named like an installed module would be imported instead."""
    installed = set(importlib.metadata.packages_distributions()) - MAY_IMPORT.keys()
    here = {path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()} - {"__init__"}
    assert here and not here & (set(sys.stdlib_module_names) | installed)
