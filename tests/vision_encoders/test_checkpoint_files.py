"""Reading weight files: what belongs to a checkpoint, and a clear error for what does not."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vision_encoders.checkpoint_files import assign_weights, find_weight_files, iterate_tensors, raise_on_key_mismatch, read_json


def test_a_file_is_taken_as_it_is(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert find_weight_files(tmp_path / "weights.safetensors") == [tmp_path / "weights.safetensors"]
    assert find_weight_files(tmp_path) == [tmp_path / "weights.safetensors"]


def test_safetensors_come_before_pickles(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert find_weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_several_unrelated_files_are_refused(tmp_path):
    for name in ("one", "two"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="2 weight files \\(one.safetensors, two.safetensors\\) and no index"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_pickles_may_wrap_the_weights(tmp_path, wrapper):
    weights = {"module.a": torch.ones(2), "epoch": 3}
    torch.save(weights if wrapper is None else {wrapper: weights, "epoch": 3}, tmp_path / "x.pt")
    assert [(key, tensor.tolist()) for key, tensor in iterate_tensors([tmp_path / "x.pt"])] == [("a", [1.0, 1.0])]


def test_pickled_code_is_not_run(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt could not be read as weights"):
        list(iterate_tensors([tmp_path / "x.pt"]))


def test_both_spellings_of_infinity_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"limit": [0.0, Infinity], "other": {"__float__": "-Infinity"}}')
    assert read_json(tmp_path / "a.json") == {"limit": [0.0, float("inf")], "other": float("-inf")}


def test_json_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="holds a list, expected a JSON object"):
        read_json(tmp_path / "a.json")


def test_assigned_weights_keep_their_dtype_and_gradient_setting():
    with torch.device("meta"):
        module = nn.BatchNorm1d(3)
    module.weight.requires_grad_(False)
    weights = {
        "weight": torch.full((3,), 2.0, dtype=torch.bfloat16),
        "bias": torch.ones(3, dtype=torch.float16),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "num_batches_tracked": torch.tensor(7),
    }
    assign_weights(module, weights.items(), source="here")
    assert {name: tensor.dtype for name, tensor in module.state_dict().items()} == {name: tensor.dtype for name, tensor in weights.items()}
    assert not module.weight.requires_grad and module.bias.requires_grad
    weights["weight"].zero_()
    assert module.weight.tolist() == [2.0] * 3


@pytest.mark.parametrize("mapped", [False, True])
def test_mapped_parameters_are_what_was_given_and_buffers_are_copies(mapped):
    """Running statistics are written in place: into a file's page, whose process dies with the file."""
    with torch.device("meta"):
        module = nn.BatchNorm1d(3)
    given = {name: torch.full(tensor.shape, 2, dtype=tensor.dtype) for name, tensor in module.state_dict().items()}
    assign_weights(module, given.items(), source="here", mapped=mapped)
    kept = {name for name, tensor in module.state_dict().items() if tensor.data_ptr() == given[name].data_ptr()}
    assert kept == ({"weight", "bias"} if mapped else set())
    assert all(torch.equal(tensor, given[name]) for name, tensor in module.state_dict().items())


def test_every_kind_of_mismatch_is_listed():
    module = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="in here do.*1 missing: bias; 1 unexpected: b; 1 of another shape: weight \\(file \\(3, 3"):
        assign_weights(module, {"weight": torch.ones(3, 3), "b": torch.ones(1)}.items(), source="here")


def test_a_long_list_is_cut_and_counted():
    with pytest.raises(ValueError, match="130 missing: .* and 30 more"):
        raise_on_key_mismatch("here", missing=[f"key{index}" for index in range(130)])
