"""README promises files, commands and a Python example; each must exist and parse."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_file_of_the_table_exists():
    """A renamed file left in the table sends a newcomer nowhere."""
    rows = re.findall(r"^\| (`.+?) \|", README, flags=re.MULTILINE)
    assert len(rows) >= 15
    for row in rows:
        folder = ""
        for name in re.findall(r"`([^`]+)`", row):
            path = ROOT / (name if "/" in name else f"{folder}/{name}")
            folder = str(Path(name).parent) if "/" in name else folder
            assert path.exists(), f"README names {name}"


def test_the_list_of_files_is_up_to_date():
    """docs/files.md names every file and its purpose: `python .ci/file_list.py` writes it again."""
    code = compile((ROOT / ".ci" / "file_list.py").read_text(encoding="utf-8"), str(ROOT / ".ci" / "file_list.py"), "exec")
    names = {"__file__": str(ROOT / ".ci" / "file_list.py"), "__name__": "file_list"}
    exec(code, names)
    assert (ROOT / "docs" / "files.md").read_text(encoding="utf-8") == names["file_list"]()
    assert re.findall(r"\| `[\w.]+` \|  \|", names["file_list"]()) == []  # a file without a purpose


def test_the_python_example_uses_names_that_exist():
    block = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL).group(1)
    tree = ast.parse(block)
    assert len(block.strip().splitlines()) <= 12
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = __import__(node.module, fromlist=[alias.name for alias in node.names])
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z]+)\b", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"README says make {target}"


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "train_vlm" / "recipes").glob("*.yaml")))
def test_recipes_that_come_along_are_valid(recipe):
    from train_vlm.recipe import load_recipe

    loaded = load_recipe(ROOT / "train_vlm" / "recipes" / recipe)
    assert loaded.deepspeed_config(2)["gradient_accumulation_steps"] == loaded.data.micro_batches


def test_import_of_the_library_needs_no_trainer_and_no_demo():
    """A user without DeepSpeed and Gradio must be able to answer questions."""
    code = (
        "import sys, vlm, vlm.engine\n"
        "loaded = {name.split('.')[0] for name in sys.modules} & {'deepspeed', 'webdataset', 'gradio', 'fastapi', 'open_clip'}\n"
        "sys.exit(f'import vlm loads {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
