"""On which device a run trains, and how a rank of several leaves: one answer for DeepSpeed, torch and the launcher."""

import os

import pytest
import torch

from train_vlm import launching, quickstart_steps, ranks
from train_vlm.quickstart_steps import _on_chosen_gpus, accelerator

LAUNCH = ("deepspeed", "--num_gpus", "2", "--master_port", "1", "sft.py")


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    accelerator.cache_clear()
    yield
    accelerator.cache_clear()


@pytest.mark.parametrize(
    ("told", "has_gpu", "expected"), [(None, True, "cuda"), (None, False, "cpu"), ("cpu", True, "cpu"), ("", True, "cuda")]
)
def test_the_quickstart_trains_where_torch_can(monkeypatch, told, has_gpu, expected):
    """A driver too old, or a torch without CUDA, beside a GPU that nvidia-smi lists, trains on the processor."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    if told is not None:
        monkeypatch.setenv("DS_ACCELERATOR", told)
    assert accelerator() == expected
    assert quickstart_steps._environment(1)["DS_ACCELERATOR"] == expected


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, LAUNCH), ("1,3,0", ("deepspeed", "--include", "localhost:1,3", "--master_port", "1", "sft.py"))]
)
def test_ranks_go_to_the_gpus_that_were_chosen(monkeypatch, visible, expected):
    """DeepSpeed's launcher takes CUDA_VISIBLE_DEVICES away when it is told a number of GPUs."""
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _on_chosen_gpus(LAUNCH) == expected
    assert _on_chosen_gpus(("python", "-m", "x")) == ("python", "-m", "x")


@pytest.mark.parametrize("visible", ["1", "", "GPU-8a,GPU-9b"])
def test_gpus_that_are_too_few_or_have_no_numbers_are_refused(monkeypatch, visible):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(RuntimeError, match="expected 2 or more numbers of GPUs"):
        _on_chosen_gpus(LAUNCH)


def test_on_a_processor_no_gpus_are_chosen(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _on_chosen_gpus(LAUNCH) == LAUNCH


def test_a_rank_may_open_as_many_files_as_its_process(monkeypatch):
    """A tensor from a reading process is an open file: at the usual limit of 1,024 a step of 256 packs of four tensors ended the run."""
    limits = []
    monkeypatch.setattr(ranks.resource, "getrlimit", lambda _: (1024, 524288))
    monkeypatch.setattr(ranks.resource, "setrlimit", lambda _, pair: limits.append(pair))
    ranks._open_many_files()
    monkeypatch.setattr(ranks.resource, "getrlimit", lambda _: (4096, 4096))
    ranks._open_many_files()
    assert limits == [(524288, 524288)]


class Left(BaseException):
    pass


@pytest.fixture
def several_on_gpus(monkeypatch):
    """What torch.distributed says on a rank of two that speak by NCCL; `left` is how it was left."""
    left = []

    def leave(code):
        left.append(code)
        raise Left

    for name, said in (("is_initialized", True), ("get_backend", "nccl"), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda said=said: said)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append("together"))
    monkeypatch.setattr(os, "_exit", leave)
    return left


def test_a_rank_that_fails_leaves_alone_and_one_that_ends_with_the_others(several_on_gpus, monkeypatch):
    ranks.end_ranks(0)
    with pytest.raises(Left):
        ranks.end_ranks(3)
    assert several_on_gpus == ["together", 3]
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    ranks.end_ranks(3)
    assert several_on_gpus == ["together", 3, "together"]


def test_an_error_nobody_expected_is_told_before_the_rank_leaves(several_on_gpus, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(launching, "load_recipe", broken)
    with pytest.raises(Left):
        launching.run_program("sft", "", ["--recipe", "any.yaml"])
    assert several_on_gpus == [1] and "RuntimeError: an illegal memory access" in capsys.readouterr().err


def test_a_gpu_that_deepspeed_is_set_to_and_torch_cannot_use_is_named(monkeypatch):
    monkeypatch.setattr(ranks, "trains_on_gpu", lambda: True)
    with pytest.raises(ValueError, match="torch finds no GPU it can use"):
        ranks.start_deepspeed(None)
