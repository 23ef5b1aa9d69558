"""What a line of the log says of speed and use: sums over sources and ranks, pauses left out, begun anew with every line."""

from pathlib import Path

import pytest
import torch

import train_vlm.accounts as accounts_module
from train_vlm.accounts import Accounts, memory_bytes, peak_of, source_names
from train_vlm.flops import FlopCosts
from train_vlm.ledger import COUNTS

COSTS = FlopCosts(encoder_tile=1e6, projector_tile=0.0, matrices_token=1e3, scan_token=0.0, attention_pair=0.0, head_token=0.0)
CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 50.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(accounts_module, "time", clock)
    return clock


def table(**columns) -> torch.Tensor:
    """(2 sources, columns) of the ledger."""
    found = torch.zeros(2, len(COUNTS), dtype=torch.int64)
    for name, values in columns.items():
        found[:, COUNTS.index(name)] = torch.tensor(values)
    return found


def test_a_line_divides_by_the_time_of_training_and_starts_anew(clock, one_rank):
    accounts = Accounts(["scenes", "text"], COSTS, peak=1e9, device=CPU)
    batch = {"samples": [{"tiles": 3, "tokens": 1000, "supervised_tokens": 10}]}  # 3e6 + 1e6 operations
    for _ in range(2):
        accounts.add([batch, batch], torch.tensor([30.0, 8.0], dtype=torch.float64), waiting_seconds=0.5)
        clock.now += 2.0
    clock.now += 6.0
    accounts.pause(6.0)  # a checkpoint
    line = accounts.line(table(), table(supervised_tokens=[20, 4], tokens=[4000, 400], tiles=[12, 0]), COUNTS)
    assert line["loss/scenes"] == pytest.approx(3.0) and line["loss/text"] == pytest.approx(4.0)
    assert line["tokens_per_second"] == 1100 and line["tiles_per_second"] == 3 and line["mean_step_seconds"] == 2
    assert line["mfu_percent"] == pytest.approx(100 * 4 * 4e6 / 4 / 1e9) and line["waiting_percent"] == 25
    assert 0.01 < line["memory_gb"] < 1000
    clock.now += 4.0
    again = accounts.line(table(tokens=[4000, 400]), table(tokens=[4000, 440], supervised_tokens=[0, 2]), COUNTS)
    assert again["tokens_per_second"] == 10 and again["mfu_percent"] == 0 and again["waiting_percent"] == 0
    assert "loss/scenes" not in again and again["loss/text"] == 0  # a source that was not read has no loss


def test_sources_of_one_name_are_told_apart():
    names = source_names([Path("a/shards"), Path("b/shards"), Path("c/text"), Path("d/shards")])
    assert names == ["shards", "shards-2", "text", "shards-3"]


def test_the_peak_says_where_it_comes_from():
    assert peak_of(CPU, "float32", 2.5) == (2.5e12, "run.peak_teraflops")
    measured, source = peak_of(CPU, "float32", None)
    assert 1e9 < measured < 1e14 and "measured" in source


def test_the_peak_of_a_run_with_fp8_layers_is_that_of_its_precision_and_says_so(monkeypatch):
    """An MFU of 60 % of the bfloat16 peak, half of it made in FP8 at twice that peak, was told as if all were bfloat16."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    cuda = torch.device("cuda")
    assert peak_of(cuda, "bfloat16", None) == (9.89e14, "NVIDIA H200, bfloat16")
    found, words = peak_of(cuda, "bfloat16", None, has_fp8=True)
    assert found == 9.89e14 and words.startswith("NVIDIA H200, bfloat16; not that of FP8, though the products in FP8 count")
    assert "measured; not that of FP8" in peak_of(CPU, "float32", None, has_fp8=True)[1]
    assert peak_of(cuda, "bfloat16", 1979.0, has_fp8=True)[1] == "run.peak_teraflops, for products in FP8 and all others"


def test_memory_is_the_largest_so_far():
    before = memory_bytes(CPU)
    block = torch.ones(2**26)  # 256 MB, touched
    assert memory_bytes(CPU) >= before and memory_bytes(CPU) > block.numel() * 4
