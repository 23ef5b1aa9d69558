"""Scenarios of deepspeed_scenarios.py (two ranks, one process each): LoRA, offloading, and a run that its ledger stops."""

import copy
from dataclasses import replace
from pathlib import Path

import torch

from train_vlm.adapters import put_on_adapters
from train_vlm.freezing import apply_parts
from train_vlm.recipe import Lora, Source
from train_vlm.trainer import train

LORA = Lora(rank=4)


def with_adapters(bench):
    """The bench, whose models carry adapters, the same each time."""

    def fresh(parts):
        model = copy.deepcopy(bench.model)
        apply_parts(model, parts)
        model.training = True
        torch.manual_seed(5)
        put_on_adapters(model, LORA)
        return model

    adapted = copy.copy(bench)
    adapted.fresh = fresh
    return adapted


def adapters_and_offloading(bench, parts, weights: dict) -> dict:
    """Results by name; `weights`: what every run without adapters must come to."""
    results = {
        "offload_zero2": bench.run(parts, expected=weights, zero_stage=2, offload="optimizer"),
        "offload_zero3": bench.run(parts, expected=weights, zero_stage=3, offload="all"),
    }
    adapted = with_adapters(bench)
    results["lora_plain"], after = adapted.plain_loop(parts)
    for stage in (1, 3):
        results[f"lora_zero{stage}"] = adapted.run(parts, expected=after, zero_stage=stage)
    before = adapted.fresh(parts).state_dict()
    results["lora_frozen"] = all(torch.equal(before[name], after[name]) for name in before if ".base_layer." in name)
    return results


def stopped_by_the_ledger(recipe, faulty: Path) -> str:
    """What a run says that reads too many unusable samples. `faulty` holds `shards` and the longest sample in `longest.txt`."""
    longest = int((faulty / "longest.txt").read_text())
    data = replace(recipe.data, sources=(Source(str(faulty / "shards")),), heldout=(), batch_samples=40, max_tokens=longest, workers=0,
                   max_skipped_percent=5.0)  # fmt: skip
    try:
        train(replace(recipe, data=data))
    except ValueError as error:
        return str(error)
    return ""
