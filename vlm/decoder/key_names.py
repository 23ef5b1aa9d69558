"""Names of a decoder's weights in files and in the module, both ways: the one place that knows the difference.

Files (NVIDIA's and transformers' alike) say `backbone.layers.N...` and hold one entry per expert; transformers' module says
`model.layers.N...` and stacks the experts of a layer into one parameter.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from vision_encoders.checkpoint_files import raise_on_key_mismatch
from vision_encoders.stored_tensors import StoredTensor

__all__ = ["UNUSED_PREFIXES", "to_file_names", "to_module_names"]

EXPERT_KEY = re.compile(r"(.*\.mixer\.experts)\.(\d+)\.(up_proj|down_proj)\.weight")
STACK_NAME = re.compile(r"(.*\.mixer\.experts)\.(up_proj|down_proj)")
# Heads for predicting several tokens ahead: in some checkpoints, in no model of transformers.
UNUSED_PREFIXES = ("mtp.",)


def to_module_names(
    tensors: Iterable[tuple[str, Tensor]], num_experts: int, *, source: str | Path, prefix: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """(key in a file, tensor) -> (name in NemotronHForCausalLM, tensor), one layer's experts held at a time.

    `prefix`: what stands before the decoder's keys and names in a larger model; keys without it pass through.

    Raises ValueError listing the experts that are missing or too many, or of another shape than their neighbours.
    """
    return _stack_experts(_rename(tensors, prefix), num_experts, source=source)


def to_file_names(name: str, tensor: StoredTensor, *, prefix: str = "") -> Iterator[tuple[str, StoredTensor]]:
    """A parameter of NemotronHForCausalLM -> its entries in a file: one, or one per expert. `prefix` as above."""
    inner = f"{prefix}model."
    key = f"{prefix}backbone.{name.removeprefix(inner)}" if name.startswith(inner) else name
    stack = STACK_NAME.fullmatch(key)
    if stack is None:
        yield key, tensor
        return
    for index in range(tensor.shape[0]):
        expert = tensor.rows(index, index + 1).map(lambda stacked: stacked[0], shape=tensor.shape[1:])
        yield f"{stack.group(1)}.{index}.{stack.group(2)}.weight", expert


def _rename(tensors: Iterable[tuple[str, Tensor]], prefix: str) -> Iterator[tuple[str, Tensor]]:
    outer, unused = f"{prefix}backbone.", tuple(prefix + start for start in UNUSED_PREFIXES)
    for key, tensor in tensors:
        if not key.startswith(unused):
            yield (f"{prefix}model.{key.removeprefix(outer)}" if key.startswith(outer) else key), tensor


def _stack_experts(tensors: Iterable[tuple[str, Tensor]], num_experts: int, *, source: Path) -> Iterator[tuple[str, Tensor]]:
    """Collect `experts.N.up_proj.weight` (out, in) into `experts.up_proj` (experts, out, in); all else passes through.

    Raises ValueError listing the experts that are missing or too many, or of another shape than their neighbours.
    """
    stacks: dict[str, Tensor] = {}
    waiting: dict[str, set[int]] = {}
    unexpected, mismatched = [], []
    for key, tensor in tensors:
        match = EXPERT_KEY.fullmatch(key)
        if match is None:
            yield key, tensor
            continue
        name, index = f"{match.group(1)}.{match.group(3)}", int(match.group(2))
        if index >= num_experts:
            unexpected.append(key)
            continue
        if name not in stacks:
            stacks[name] = tensor.new_empty((num_experts, *tensor.shape))
            waiting[name] = set(range(num_experts))
        if tensor.shape != stacks[name].shape[1:]:
            mismatched.append(f"{key} (file {tuple(tensor.shape)}, its neighbours {tuple(stacks[name].shape[1:])})")
            continue
        if not tensor.is_meta:  # thousands of experts, and nothing to copy
            stacks[name][index] = tensor
        waiting[name].discard(index)
        if not waiting[name]:
            yield name, stacks.pop(name)
            del waiting[name]
    missing = [f"{name.rpartition('.')[0]}.{index}.{name.rpartition('.')[2]}.weight" for name in waiting for index in sorted(waiting[name])]
    raise_on_key_mismatch(source, missing=missing, unexpected=unexpected, mismatched=mismatched)
