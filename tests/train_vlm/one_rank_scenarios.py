"""Runs of one process that are stopped and gone on with, in one interpreter (starting DeepSpeed costs ten seconds): started by
test_going_on.py, writes what it saw as JSON.

python one_rank_scenarios.py SHARDS MODEL OUT
"""

import contextlib
import io
import json
import os
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from cut_short import train_until
from safetensors.torch import load_file

import train_vlm.preparing as preparing
import train_vlm.trainer as training_loop
from train_vlm.recipe import Data, Lora, Parts, Recipe, Run, Source
from train_vlm.run_lock import lock_file
from train_vlm.stopping import AskedToStop
from train_vlm.trainer import train

SETTINGS = {"steps": 5, "log_every": 1, "threads_per_rank": 1, "save_every_steps": 2, "save_every_minutes": None}


def with_dropout(base: Recipe, out: Path) -> dict:
    """A run with dropout, and the same one stopped in its fourth step and gone on with; a run whose peak is given instead of measured."""
    whole, cut, told = (replace(base, out=str(out / name), lora=Lora(rank=4, dropout=0.2)) for name in ("whole", "cut", "told"))
    train(whole)
    train_until(cut, 4)
    train(cut)
    train(replace(told, run=replace(told.run, peak_teraflops=1.0)))
    plain = replace(whole, out=str(out / "plain"), lora=Lora(rank=4))
    train(plain)
    weights = {Path(recipe.out).name: (Path(recipe.out) / "model.safetensors").read_bytes() for recipe in (whole, cut, told, plain)}
    return {name: content == weights["whole"] for name, content in weights.items()}


def asked(recipe: Recipe, step: int, number: int = signal.SIGTERM) -> str:
    """Start a run, or go on with it, and send a signal to its process and to those that read for it in the `step`-th step from there.
    Returns what the run says at its end; "" when it ends by itself."""
    real, calls = training_loop.train_step, []

    def step_with_signal(*arguments, **keywords):
        calls.append(1)
        if len(calls) == step:
            for reader in torch.multiprocessing.active_children():
                os.kill(reader.pid, number)
            os.kill(os.getpid(), number)
        return real(*arguments, **keywords)

    training_loop.train_step = step_with_signal
    try:
        train(recipe)
    except AskedToStop as words:
        return str(words)
    finally:
        training_loop.train_step = real
    return ""


def stopped_by_signals(base: Recipe, out: Path) -> dict:
    """A run with dropout that is asked to end twice and gone on with, beside one that is left alone; one asked in its last step; one that
    saves nothing. `said`, `saved`: what they said, and the checkpoints that were left."""
    base = replace(base, lora=Lora(rank=4, dropout=0.2), data=replace(base.data, workers=1), run=replace(base.run, save_every_steps=100))
    whole, cut, last, unsaved = (replace(base, out=str(out / name)) for name in ("whole", "cut", "last", "unsaved"))
    unsaved = replace(unsaved, run=replace(unsaved.run, save_every_steps=None))
    said, saved = [], []
    handler = signal.getsignal(signal.SIGTERM)
    train(whole)
    for step, number in ((1, signal.SIGTERM), (2, signal.SIGINT)):
        said.append(asked(cut, step, number))
        saved.append(sorted(path.name for path in Path(f"{cut.out}.checkpoints").iterdir()))
    summary = json.loads(Path(f"{cut.out}.log/summary.json").read_text())
    train(cut)
    said += [asked(last, 5), asked(unsaved, 2)]
    real = training_loop.prepare

    def prepare(recipe):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(recipe)

    training_loop.prepare = prepare
    try:
        train(replace(whole, out=str(out / "early")))
    except AskedToStop as words:
        said.append(f"{words} {words.is_saved}")
    finally:
        training_loop.prepare = real
    return {
        "said": said, "saved": saved, "steps": summary["steps"], "unsaved": Path(f"{unsaved.out}.checkpoints").exists(),
        "equal": (out / "cut" / "model.safetensors").read_bytes() == (out / "whole" / "model.safetensors").read_bytes(),
        "last": (out / "last" / "model.safetensors").read_bytes() == (out / "whole" / "model.safetensors").read_bytes(),
        "restored": signal.getsignal(signal.SIGTERM) is handler,
    }  # fmt: skip


def computed_again(recipe: Recipe) -> dict:
    """A run that computes the blocks of encoder and decoder again in the backward pass, beside one that keeps everything: the largest
    difference of a weight, and whether the operations of a step are counted alike."""
    weights, operations, real = [], [], preparing.count_costs

    def counted(model):
        operations.append(real(model))
        return operations[-1]

    preparing.count_costs = counted
    try:
        for name, again in (("kept", False), ("again", True)):
            run = replace(recipe.run, activation_checkpointing=again, encoder_activation_checkpointing=again)
            train(replace(recipe, out=f"{recipe.out}/{name}", run=run))
            weights.append(load_file(f"{recipe.out}/{name}/model.safetensors"))
    finally:
        preparing.count_costs = real
    differences = [(weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0]]
    return {"difference": max(differences), "operations_equal": operations[0] == operations[1]}


def locked(recipe: Recipe) -> dict:
    """Who has the output folder in a step of a run, and after it; and whether what a dead run left beside it is still there."""
    real, told = training_loop.train_step, []
    left = Path(recipe.out).with_name(f".{Path(recipe.out).name}.abcd1234.partial")
    left.mkdir()

    def step(*arguments, **keywords):
        told.append(lock_file(recipe.out).read_text().startswith(f"{os.getpid()} on "))
        return real(*arguments, **keywords)

    training_loop.train_step = step
    try:
        train(recipe)
    finally:
        training_loop.train_step = real
    return {"within": all(told) and bool(told), "after": lock_file(recipe.out).exists(), "left": left.exists()}


def told_before_the_marker(recipe: Recipe) -> list[str]:
    """The log folder's files at the moment in which the run is marked as finished."""
    real, found = training_loop.mark_finished, []

    def mark(*arguments):
        found.extend(sorted(path.name for path in Path(f"{recipe.out}.log").iterdir() if path.is_file()))
        real(*arguments)

    training_loop.mark_finished = mark
    try:
        train(recipe)
    finally:
        training_loop.mark_finished = real
    return found


def longer_than_fitted(recipe: Recipe) -> dict:
    """A run of which no step was fitted, each of whose packs is too long, stopped in its fourth step and gone on with."""
    real, preparing.FITTED_SAMPLES = preparing.FITTED_SAMPLES, 0
    try:
        recipe = replace(recipe, data=replace(recipe.data, max_tokens=60, pack_tokens=60))
        train_until(recipe, 4)
        train(recipe)
    finally:
        preparing.FITTED_SAMPLES = real
    folder = Path(f"{recipe.out}.log")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "told": [line["step"] for line in lines if line.get("event") == "long packs"],
        "counted": json.loads((folder / "summary.json").read_text())["long_packs"],
        "report": (folder / "report.md").read_text(),
    }


def nothing_to_learn(recipe: Recipe) -> dict:
    """A run none of whose samples fits, held out what it trains on; and one whose plain text is not there: what it says, and whether it
    got as far as an engine."""
    data, said = replace(recipe.data, heldout=recipe.data.sources, max_tokens=12, max_skipped_percent=100), io.StringIO()
    with contextlib.redirect_stdout(said):
        train(replace(recipe, data=data))
    summary = json.loads(Path(f"{recipe.out}.log/summary.json").read_text())
    real, engines, error = preparing.start_engine, [], ""
    preparing.start_engine = lambda *arguments: engines.append(1) or real(*arguments)
    try:
        train(replace(recipe, out=f"{recipe.out}_text", data=replace(recipe.data, heldout_text="nowhere.txt")))
    except FileNotFoundError as found:
        error = str(found)
    finally:
        preparing.start_engine = real
    return {"said": said.getvalue(), "loss": summary["loss"], "steps": summary["steps"], "error": error, "engines": len(engines)}


def main(shards: str, model: str, out: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background is started to ignore it
    warnings.filterwarnings("ignore")
    base = Recipe(
        stage="sft", model=model, out="", parts=Parts(vision_encoder=5e-4, projector=1e-3, language_model=1e-3), run=Run(**SETTINGS),
        data=Data(sources=(Source(shards),), batch_samples=4, workers=0, max_skipped_percent=50),
    )  # fmt: skip
    results = {"dropout": with_dropout(base, Path(out, "dropout"))}
    results["asked"] = stopped_by_signals(base, Path(out, "asked"))
    results["computed_again"] = computed_again(replace(base, out=f"{out}/computed"))
    results["lock"] = locked(replace(base, out=f"{out}/locked"))
    torch.multiprocessing.set_start_method("forkserver", force=True)  # Python's default from 3.14 on: its readers must start all the same
    results["told"] = told_before_the_marker(replace(base, out=f"{out}/told", data=replace(base.data, workers=1)))
    results["nothing"] = nothing_to_learn(replace(base, out=f"{out}/nothing"))
    results["long"] = longer_than_fitted(replace(base, out=f"{out}/long"))
    Path(out, "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
