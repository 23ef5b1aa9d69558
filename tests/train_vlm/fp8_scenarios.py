"""FP8 runs on two ranks in one pair of processes: started by test_fp8_guard.py, writes what it saw as JSON.

python -m torch.distributed.run --nproc_per_node 2 fp8_scenarios.py FOLDER        (with FOLDER/model, FOLDER/sound and FOLDER/shards)
"""

import json
import os
import sys
import warnings
from pathlib import Path

os.environ.update({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"})
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from cut_short import train_until

import train_vlm.trainer as training_loop
from train_vlm.fp8_section import Fp8
from train_vlm.recipe import Data, Lora, Parts, Recipe, Run, Source
from train_vlm.trainer import train


def recipe_of(folder: Path, name: str, model: str = "model", lora: Lora | None = None, **run) -> Recipe:
    settings = {"steps": 4, "log_every": 1, "threads_per_rank": 1, "save_every_steps": 2, "save_every_minutes": None}
    return Recipe(
        stage="sft", model=str(folder / model), out=str(folder / name), parts=Parts(projector=1e-3, language_model=1e-3),
        data=Data(sources=(Source(str(folder / "shards")),), batch_samples=4, workers=0), run=Run(**settings | run),
        fp8=Fp8(enabled=True, guard_every=2), lora=lora,
    )  # fmt: skip


def watched(recipe: Recipe) -> dict:
    """A run, and whether its converted layers have the parameters that they started with."""
    prepared, real = [], training_loop.prepare

    def prepare(recipe):
        run = real(recipe)
        prepared.append((run, {name: id(layer.weight) for name, layer in run.fp8.report.layers.items()}))
        return run

    training_loop.prepare = prepare
    try:
        train(recipe)
    finally:
        training_loop.prepare = real
    run, before = prepared[0]
    everywhere = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, run.fp8.put_back)
    same = all(id(layer.weight) == before[name] for name, layer in run.fp8.report.layers.items())
    return {"same_parameters": same, "put_back": run.fp8.put_back, "put_back_everywhere": all(one == everywhere[0] for one in everywhere)}


def stopped_and_started_again(recipe: Recipe) -> None:
    train_until(recipe, 4)
    torch.distributed.barrier()
    train(recipe)


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    results = {
        "zero3": watched(recipe_of(folder, "zero3", zero_stage=3)),
        "bfloat16": watched(recipe_of(folder, "bfloat16", zero_stage=1, precision="bfloat16", activation_checkpointing=True)),
        "lora": watched(recipe_of(folder, "lora", "sound", Lora(rank=4, merge=False), zero_stage=1, precision="bfloat16")),
    }
    stopped_and_started_again(recipe_of(folder, "cut", zero_stage=3))
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
