"""Read weights from a checkpoint folder or file, and put them into a module without a silent gap.

Every encoder family and the decoder start from files that others wrote: one safetensors file, shards with an index, or pickled
`.bin` files. What goes wrong there (a shard that was not downloaded, a truncated file, a config of another model) must stop the
run with one sentence that says what to do. That is why the strictness lives here, once, and not in each family.

Tensors from safetensors are views of the mapped file. `assign_weights` copies what it keeps, if it is not told otherwise: a parameter that
still points into a file would crash the process when that file is overwritten.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["assign_weights", "find_weight_files", "iterate_tensors", "raise_on_key_mismatch", "raise_on_shape_mismatch", "read_json"]

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
SHARD_NAME = re.compile(r"-\d+-of-(\d+)\.(safetensors|bin)$")
MAX_LISTED_KEYS = 100


def read_json(path: Path) -> dict:
    """Parse one JSON file. Infinity and NaN may stand as NVIDIA's configs write them, or as transformers does ({"__float__": ...}).

    Raises FileNotFoundError when it is not there and ValueError when it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint folder needs it. Check the path, or download the checkpoint again.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=_decode_float)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def _decode_float(content: dict) -> dict | float:
    return float(content["__float__"]) if content.keys() == {"__float__"} else content


def find_weight_files(checkpoint: str | Path) -> list[Path]:
    """The weight files of a checkpoint (a folder, or one file), in name order.

    Raises FileNotFoundError when the path, all weights or some shards are missing (the message names the shards), and ValueError
    when a folder holds several files and no index that says which belong together.
    """
    checkpoint = Path(checkpoint)
    if checkpoint.is_file():
        return [checkpoint]
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} does not exist; expected a checkpoint folder or a weight file on this machine.")
    for name in INDEX_NAMES:
        if (checkpoint / name).is_file():
            return _shards_of_index(checkpoint / name)
    for name in SINGLE_NAMES:
        if (checkpoint / name).is_file():
            return [checkpoint / name]
    for suffix in SUFFIXES:
        files = sorted(path for path in checkpoint.iterdir() if path.suffix == suffix and path.is_file())
        if len(files) == 1 and not SHARD_NAME.search(files[0].name):
            return files
        if files:
            return _complete_shards(files)
    raise FileNotFoundError(f"{checkpoint} holds no weights; expected model.safetensors, shards with an index, or pytorch_model.bin.")


def _shards_of_index(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no 'weight_map'; download the checkpoint again.")
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks {len(missing)} of {len(files)} shards: {', '.join(missing)}; download them again.")
    return files


def _complete_shards(files: list[Path]) -> list[Path]:
    totals = {int(match.group(1)) if (match := SHARD_NAME.search(file.name)) else None for file in files}
    total = totals.pop() if len(totals) == 1 else None
    names = ", ".join(file.name for file in files)
    if total is None:
        raise ValueError(f"{files[0].parent} holds {len(files)} weight files ({names}) and no index; give the path of one of them.")
    if total != len(files):
        raise FileNotFoundError(f"{files[0].parent} holds {len(files)} of {total} shards ({names}); download the others.")
    return files


def iterate_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield (key, tensor) of each file in turn, one file open at a time; tensors may be views of the file, on the CPU.

    Raises ValueError naming the file when it is truncated or is no weight file.
    """
    for file in files:
        yield from _iterate_safetensors(file) if file.suffix == ".safetensors" else _iterate_pickle(file)


def _iterate_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); download it again.") from error
    with handle:
        for key in handle.keys():  # noqa: SIM118 - a handle, not a dict
            yield key, handle.get_tensor(key)


def _iterate_pickle(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{file} could not be read as weights ({reason}); it is damaged, or no plain state dict (a TorchScript archive, pickled "
            f"code). Download it again, or convert it to safetensors."
        ) from error
    for wrapper in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a dict of tensors.")
    for key, value in content.items():
        if isinstance(value, Tensor):
            yield key.removeprefix("module."), value


def assign_weights(
    module: nn.Module,
    named_tensors: Iterable[tuple[str, Tensor]],
    *,
    source: str | Path,
    convert: Callable[[str, Tensor], Tensor] | None = None,
    may_be_absent: Callable[[str], bool] | None = None,
    mapped: bool = False,
) -> None:
    """Replace each parameter and persistent buffer of `module` by the tensor of the same name, with the tensor's own dtype.

    Works on a module built on the meta device, so that nothing is allocated twice. `convert(name, tensor)` may change dtype or
    device; `may_be_absent(name)` excuses a missing key. Every tensor is copied; with `mapped`, parameters stay as they are in their file.

    Raises ValueError listing the keys that are missing, unexpected, or of another shape; `module` is then partly filled: drop it.
    """
    expected = module.state_dict(keep_vars=True)
    seen: set[str] = set()
    unexpected: list[str] = []
    mismatched: list[str] = []
    for name, tensor in named_tensors:
        if name not in expected:
            unexpected.append(name)
            continue
        seen.add(name)
        if tensor.shape != expected[name].shape:
            mismatched.append(f"{name} (file {tuple(tensor.shape)}, model {tuple(expected[name].shape)})")
            continue
        converted = tensor if convert is None else convert(name, tensor)
        stays = mapped and isinstance(expected[name], nn.Parameter)
        _set_tensor(module, name, converted.clone() if converted is tensor and not stays else converted)
    missing = [name for name in expected if name not in seen and not (may_be_absent and may_be_absent(name))]
    raise_on_key_mismatch(source, missing=missing, unexpected=unexpected, mismatched=mismatched)


def _set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        requires_grad = owner._parameters[leaf].requires_grad
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)
    else:
        owner._buffers[leaf] = tensor


def raise_on_shape_mismatch(module: nn.Module, stored: Mapping[str, Any], *, source: str | Path) -> None:
    """Compare names and shapes of a module's weights with those of tensors on disk (anything with a `shape`), nothing being read.

    Raises ValueError listing the keys that are missing, unexpected, or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    raise_on_key_mismatch(
        source,
        missing=expected.keys() - stored.keys(),
        unexpected=stored.keys() - expected.keys(),
        mismatched=[
            f"{name} (file {tuple(tensor.shape)}, model {expected[name]})"
            for name, tensor in stored.items()
            if name in expected and tuple(tensor.shape) != expected[name]
        ],
    )


def raise_on_key_mismatch(
    source: str | Path, *, missing: Iterable[str] = (), unexpected: Iterable[str] = (), mismatched: Iterable[str] = ()
) -> None:
    """Raise ValueError that lists the keys of each kind, or return when there are none."""
    lines = []
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        keys = sorted(keys)
        if keys:
            more = f" and {len(keys) - MAX_LISTED_KEYS} more" if len(keys) > MAX_LISTED_KEYS else ""
            lines.append(f"{len(keys)} {kind}: {', '.join(keys[:MAX_LISTED_KEYS])}{more}")
    if lines:
        raise ValueError(f"the weights in {source} do not fit the model that its config describes; " + "; ".join(lines))
