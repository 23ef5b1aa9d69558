"""Tensors that stay on disk until somebody reads them: name, dtype, shape and place of each, from the headers of the files alone.

A checkpoint of many gigabytes can then be checked, renamed, cut and copied with the memory of one tensor, or of one block of bytes where
nothing changes. The header of a safetensors file is a JSON object with the byte range of each tensor; reading those bytes with plain
file reads (instead of mapping the file) keeps the pages of the file out of the memory of the process.

Pickled files have no such header: they are mapped, and each tensor is copied when it is read.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vision_encoders.checkpoint_files import iterate_tensors

__all__ = ["DTYPES", "StoredTensor", "stored_tensors"]

# Names in safetensors headers.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
LONGEST_HEADER_BYTES = 100_000_000
BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's dtype and shape, and how to get it: a byte range of a file (`file`, `offset`), `parts` one below the other, `compute`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path | None = None
    offset: int = 0
    compute: Callable[[], Tensor] | None = None
    parts: tuple["StoredTensor", ...] = ()

    @classmethod
    def of(cls, tensor: Tensor) -> "StoredTensor":
        """A tensor in memory under the same interface."""
        return cls(tensor.dtype, tuple(tensor.shape), compute=lambda: tensor)

    @classmethod
    def below(cls, *parts: "StoredTensor") -> "StoredTensor":
        """Tensors of the same dtype and width, one below the other."""
        return cls(parts[0].dtype, (sum(part.shape[0] for part in parts), *parts[0].shape[1:]), parts=parts)

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, on the CPU; from a file it has memory of its own. Raises ValueError when the file has become shorter."""
        return self._get().detach().cpu()

    def _get(self) -> Tensor:
        """On the device where it is: an expert cut out of a stack on a GPU must not bring the whole stack to the CPU."""
        if self.parts:
            return torch.cat([part.read() for part in self.parts])
        if self.file is None:
            return self.compute()
        content = bytearray(self.size_bytes)
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            found = file.readinto(content)
        if found != self.size_bytes:
            raise ValueError(f"{self.file} ended {self.size_bytes - found} bytes too early; it was changed while it was read.")
        if not content:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(content, dtype=self.dtype).reshape(self.shape)

    def blocks(self) -> Iterator[bytes | memoryview]:
        """The bytes of the tensor, row by row, in blocks of bounded size where they come from a file."""
        if self.parts:
            for part in self.parts:
                yield from part.blocks()
            return
        if self.file is None:
            yield memoryview(self.read().contiguous().reshape(-1).view(torch.uint8).numpy())
            return
        left = self.size_bytes
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            while left:
                block = file.read(min(BLOCK_BYTES, left))
                if not block:
                    raise ValueError(f"{self.file} ended {left} bytes too early; it was changed while it was read.")
                left -= len(block)
                yield block

    def rows(self, start: int, stop: int) -> "StoredTensor":
        """Rows start..stop-1 of the first dimension; still a byte range where this is one."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise ValueError(f"rows {start} to {stop} of a tensor of shape {self.shape}")
        shape = (stop - start, *self.shape[1:])
        if self.file is None:
            return StoredTensor(self.dtype, shape, compute=lambda: self._get()[start:stop])
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return StoredTensor(self.dtype, shape, self.file, self.offset + start * row_bytes)

    def map(self, function: Callable[[Tensor], Tensor], *, shape: tuple[int, ...] | None = None, dtype=None) -> "StoredTensor":
        """The result of `function`, computed when it is read; `shape` and `dtype` where they change."""
        return StoredTensor(dtype or self.dtype, shape or self.shape, compute=lambda: function(self._get()))

    def to(self, dtype: torch.dtype) -> "StoredTensor":
        """The same in another dtype."""
        return self if dtype == self.dtype else self.map(lambda tensor: tensor.to(dtype), dtype=dtype)


def stored_tensors(files: Iterable[Path]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield (key, StoredTensor) of each file in turn. No weight is read.

    Raises ValueError naming the file when it is truncated, is no weight file, or has a dtype this project does not know.
    """
    for file in files:
        if file.suffix == ".safetensors":
            yield from _read_header(file)
        else:
            for key, tensor in iterate_tensors([file]):
                yield key, StoredTensor(tensor.dtype, tuple(tensor.shape), compute=tensor.clone)


def _read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    size = file.stat().st_size
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, LONGEST_HEADER_BYTES):
            raise ValueError(f"{file} is damaged or truncated (it has {size} bytes and no safetensors header); download it again.")
        text = handle.read(length)
    try:
        header = json.loads(text)
        entries = {
            key: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for key, entry in header.items() if key != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged (its header cannot be read: {error}); download it again.") from error
    start = 8 + length
    for key, (dtype, shape, begin, end) in entries.items():
        if dtype not in DTYPES:
            raise ValueError(f"{key} in {file} has dtype {dtype!r}; expected one of {', '.join(DTYPES)}; use unquantised weights.")
        tensor = StoredTensor(DTYPES[dtype], shape, file, start + begin)
        if end - begin != tensor.size_bytes or begin < 0:
            raise ValueError(f"{file} is damaged ({key}: {end - begin} bytes for {dtype} of shape {shape}); download it again.")
        if start + end > size:
            raise ValueError(f"{file} is damaged or truncated (it has {size} bytes, {key} ends at {start + end}); download it again.")
        yield key, tensor
