"""Shards written block by block: what safetensors and transformers read back."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vision_encoders.checkpoint_files import find_weight_files
from vision_encoders.stored_tensors import StoredTensor, stored_tensors
from vlm.shard_files import plan_shards, write_shards


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    # An odd number of bfloat16 values: were they first, float32 would start between its own multiples.
    return {"half": torch.randn(7, generator=generator).bfloat16(), "wide": torch.randn(5, 3, generator=generator),
            "one": torch.tensor(1.0), "count": torch.tensor([3])}  # fmt: skip


def stored(weights):
    return {key: StoredTensor.of(tensor) for key, tensor in weights.items()}


@pytest.mark.parametrize("limit", [10**9, 20])
def test_safetensors_reads_what_was_written(weights, tmp_path, limit):
    tensors = stored(weights)
    plan = plan_shards(tensors, limit)
    write_shards(tmp_path, tensors, plan)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found |= load_file(path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        for _, tensor in stored_tensors([path]):
            assert tensor.offset % tensor.dtype.itemsize == 0
    assert found.keys() == weights.keys()
    assert all(found[key].dtype == tensor.dtype and torch.equal(found[key], tensor) for key, tensor in weights.items())
    assert [path.name for path in find_weight_files(tmp_path)] == sorted(plan)
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (len(plan) > 1)
    if len(plan) > 1:
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
        assert {key: name for name, keys in plan.items() for key in keys} == content["weight_map"]


def test_shards_keep_their_limit_and_order(weights):
    tensors = stored(weights)
    assert plan_shards(tensors, 10**9) == {"model.safetensors": list(weights)}
    plan = plan_shards(tensors, 20)
    assert list(plan.values()) == [["half"], ["wide"], ["one", "count"]]  # 14, 60 (more than the limit alone), 4 + 8 bytes
    assert list(plan) == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    with pytest.raises(ValueError, match="expected at least 1"):
        plan_shards(tensors, 0)
