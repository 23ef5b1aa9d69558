"""Tensors on disk: what the headers say, reading by parts, and files that are not what they should be."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vision_encoders.stored_tensors import DTYPES, StoredTensor, stored_tensors


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    plain = {"a": torch.randn(7, 5, generator=generator), "b": torch.randn(3, generator=generator).to(torch.bfloat16)}
    return plain | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "whole": torch.arange(6, dtype=torch.int64)}


@pytest.fixture
def file(weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_reading_gives_what_was_saved(weights, tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    save_file(weights, path) if suffix == "safetensors" else torch.save(weights, path)
    found = dict(stored_tensors([path]))
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        assert found[key].dtype == tensor.dtype and found[key].shape == tuple(tensor.shape)
        assert torch.equal(found[key].read(), tensor)
        assert b"".join(map(bytes, found[key].blocks())) == bytes_of(tensor)


def test_every_dtype_of_the_table_survives(tmp_path):
    values = {name: torch.ones(3).to(dtype) for name, dtype in DTYPES.items()}
    save_file(values, tmp_path / "x.safetensors")
    for name, tensor in stored_tensors([tmp_path / "x.safetensors"]):
        assert tensor.dtype == DTYPES[name] and bytes_of(tensor.read()) == bytes_of(values[name])


def test_large_tensors_come_in_blocks(file, weights, monkeypatch):
    monkeypatch.setattr("vision_encoders.stored_tensors.BLOCK_BYTES", 16)
    blocks = list(dict(stored_tensors([file]))["a"].blocks())
    assert len(blocks) == 9 and max(map(len, blocks)) == 16 and b"".join(blocks) == bytes_of(weights["a"])


@pytest.mark.parametrize("on_disk", [True, False])
def test_rows_parts_and_casts(file, weights, on_disk):
    a = dict(stored_tensors([file]))["a"] if on_disk else StoredTensor.of(weights["a"])
    middle = a.rows(2, 5)
    assert middle.shape == (3, 5) and torch.equal(middle.read(), weights["a"][2:5])
    assert (middle.file is not None) == on_disk  # still a byte range
    assert torch.equal(a.to(torch.float16).read(), weights["a"].half())
    both = StoredTensor.below(a, middle)
    assert both.shape == (10, 5) and torch.equal(both.read(), torch.cat([weights["a"], weights["a"][2:5]]))
    assert b"".join(map(bytes, both.blocks())) == bytes_of(both.read())
    with pytest.raises(ValueError, match="rows 5 to 9"):
        a.rows(5, 9)


def rewrite_header(file, change):
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "truncated"),
        (lambda file: file.write_bytes(file.read_bytes()[:40]), "no safetensors header"),
        (lambda file: file.write_bytes(b""), "no safetensors header"),
        (lambda file: file.write_bytes(b"\xff" * 100), "no safetensors header"),
        (lambda file: file.write_bytes((20).to_bytes(8, "little") + b"x" * 40), "its header cannot be read"),
        (lambda file: rewrite_header(file, lambda header: header["a"].update(dtype="F4")), "dtype 'F4'; expected one of"),
        (lambda file: rewrite_header(file, lambda header: header["a"].update(shape=[7, 6])), "a: 140 bytes for F32 of shape \\(7, 6\\)"),
        (lambda file: rewrite_header(file, lambda header: header["a"].pop("data_offsets")), "its header cannot be read"),
    ],
)
def test_a_damaged_file_is_named(file, damage, message):
    damage(file)
    with pytest.raises(ValueError, match=f"model.safetensors.*{message}"):
        dict(stored_tensors([file]))


def test_a_file_that_shrinks_meanwhile_is_noticed(file):
    whole = dict(stored_tensors([file]))["whole"]
    a = dict(stored_tensors([file]))["a"]
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match="too early"):
        whole.read()
    with pytest.raises(ValueError, match="too early"):
        list(a.blocks())
