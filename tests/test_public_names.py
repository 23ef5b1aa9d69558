"""Every module says what is public, and every name it lists exists; the names that others call stay."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("projector", "vision_encoders", "vlm", "train_vlm", "eval_vqa", "demo")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "__main__.py"
}


def has_public_code(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") for node in tree.body)


@pytest.mark.parametrize("name", MODULES)
def test_listed_names_exist_and_are_documented(name):
    """A name in __all__ that is not there breaks `from module import *` and every reader's trust."""
    if name.startswith("demo"):
        pytest.importorskip("gradio")
    module = importlib.import_module(name)
    assert module.__doc__ and len(module.__doc__) > 20
    assert hasattr(module, "__all__") or not has_public_code(MODULES[name]), f"{name} lists no public names"
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), public
    assert len(set(getattr(module, "__all__", ()))) == len(getattr(module, "__all__", ()))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vlm.tiling.choose_grid", ["width", "height", "tile_size", "max_tiles", "policy"]),
        ("vlm.tiling.tile_image", ["image", "tile_size", "max_tiles", "policy", "thumbnail"]),
        ("vision_encoders.build_vision_encoder", ["name", "checkpoint", "settings"]),
        ("vlm.decoder.ssd.chunk_scan", ["x", "dt", "A", "B", "C", "chunk_size", "D", "z", "dt_bias", "initial_states", "seq_idx",
                                        "dt_softplus", "dt_limit", "return_final_states"]),
        ("vlm.decoder.preset_config", ["name"]),
        ("vlm.decoder.param_count", ["config"]),
        ("vlm.decoder.load_language_model", ["checkpoint", "dtype", "device"]),
        ("vlm.engine.Request", ["messages", "max_new_tokens", "temperature", "top_p", "seed", "stop"]),
        ("vlm.engine.Answer", ["text", "stop_reason", "prompt_tokens", "visual_tokens", "generated_tokens", "seconds", "error"]),
        ("vlm.engine.Engine.generate", ["self", "requests"]),
        ("vlm.engine.Engine.stream", ["self", "request"]),
    ],
)  # fmt: skip
def test_names_that_others_call_keep_their_parameters(name, parameters):
    """They are called from outside this repository."""
    path = name.split(".")
    module = next(m for end in range(len(path) - 1, 0, -1) if (m := _module(".".join(path[:end]))))
    item = module
    for part in path[len(module.__name__.split(".")) :]:
        item = getattr(item, part)
    assert list(inspect.signature(item).parameters)[: len(parameters)] == parameters


def _module(name):
    return importlib.import_module(name) if name in MODULES else None
