"""Many DeepSpeed runs in one process (starting one costs ten seconds): started by test_trainer.py on two ranks, writes what it saw as JSON.

python -m torch.distributed.run --nproc_per_node 2 deepspeed_scenarios.py SHARDS MODEL OUT KILLED
"""

import copy
import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from adapter_scenarios import LORA, adapters_and_offloading, stopped_by_the_ledger
from cut_short import train_until
from PIL import Image
from poison import Poison

import train_vlm.preparing as preparing
import train_vlm.trainer as training_loop
import vlm.loss as loss
from projector import Projector
from train_vlm.batching import MicroBatchPositions, pack
from train_vlm.encoder_checkpointing import checkpoint_encoder
from train_vlm.freezing import apply_parts, make_optimizer, parameter_groups
from train_vlm.ranks import start_deepspeed, sum_over_ranks
from train_vlm.reading import SampleStream
from train_vlm.recipe import Data, Optimizer, Parts, Recipe, Run, Source, load_recipe
from train_vlm.trainer import full_state_dict, train
from train_vlm.training_step import NotFiniteError, train_step
from vision_encoders.shared_statistics import share_statistics
from vlm.assemble import assemble
from vlm.checkpoint import load_model, save_model

STEPS, BATCH = 3, 8
ALL = Parts(vision_encoder=5e-4, projector=1e-3, language_model=1e-3)
ALIGN = Parts(projector=1e-3)


def make_samples(processor) -> list[dict]:
    """STEPS x BATCH samples. In step 0 the second half has no picture, in step 1 the first half, in step 2 every other one has two."""
    samples = []
    for number in range(STEPS * BATCH):
        step, place = divmod(number, BATCH)
        pictures = {0: int(place < 4), 1: int(place >= 4), 2: 2 * (place % 2)}[step]
        generator = np.random.default_rng(number)
        parts = [
            {"type": "image", "image": Image.fromarray(generator.integers(0, 256, (64, 64 * (1 + place % 2), 3), dtype=np.uint8))}
            for _ in range(pictures)
        ]
        answer = "red blue green yes no two".split()[number % 6] + " ball" * (number % 5)  # answers of different lengths
        question = {"role": "user", "content": [*parts, {"type": "text", "text": f"question {number}"}]}
        prepared = processor.prepare([question, {"role": "assistant", "content": answer}])
        samples.append(
            {"source": 0, "id": str(number), "input_ids": prepared.rendered.input_ids, "labels": prepared.rendered.labels,
             "pixels": prepared.pixels, "tiles_reduced": 0}
        )  # fmt: skip
    return samples


class Bench:
    def __init__(self, model_folder: str):
        self.model, self.processor = load_model(model_folder)
        self.samples = make_samples(self.processor)
        self.base = Recipe(stage="sft", model=model_folder, out="", data=Data(sources=(Source("x"),), batch_samples=BATCH), parts=ALL,
                           run=Run(steps=STEPS, threads_per_rank=1))  # fmt: skip
        self.deepspeed, self.rank, self.world_size, self.device = start_deepspeed(self.base)

    def pack(self, samples):
        return pack(samples, self.processor.renderer.end_of_turn_id, self.processor.image_processor.tile_size)

    def fresh(self, parts):
        model = copy.deepcopy(self.model)
        apply_parts(model, parts)
        model.training = True
        return model

    def plain_loop(self, parts: Parts, micro_batches: int = 1) -> tuple[list[float], dict]:
        """What every run must equal: one process, the whole batch in one row (or so many), no DeepSpeed."""
        model = self.fresh(parts)
        optimizer = make_optimizer(parameter_groups(model, parts, self.base.optimizer), self.base.optimizer)
        losses = []
        for step in range(STEPS):
            size = BATCH // micro_batches
            batches = [self.pack(self.samples[start : start + size]) for start in range(step * BATCH, (step + 1) * BATCH, size)]
            loss = 0.0
            for batch in batches:
                output = model(
                    input_ids=batch["input_ids"], labels=batch["labels"], cu_seq_lens_q=batch["cu_seq_lens_q"],
                    pixel_values=self.processor.image_processor.normalize_pixels(batch["pixels"]),
                    num_items_in_batch=sum(each["supervised_tokens"] for each in batches),
                )  # fmt: skip
                output.loss.backward()
                loss += output.loss.item()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], self.base.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        return losses, model.state_dict()

    def run(self, parts: Parts, samples=None, micro_batches: int = 1, expected: dict | None = None, **run) -> dict:
        """One training on all ranks. Returns losses, and on rank 0 how far the exported weights are from `expected`."""
        recipe = replace(
            self.base, parts=parts, data=replace(self.base.data, micro_batches=micro_batches), run=replace(self.base.run, **run)
        )
        model = self.fresh(parts)
        if recipe.run.precision == "bfloat16":
            model.to(torch.bfloat16)
        model.gradient_checkpointing = recipe.run.activation_checkpointing
        if recipe.run.encoder_activation_checkpointing:
            checkpoint_encoder(model.vision_encoder)
        share_statistics(model.vision_encoder)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = make_optimizer(parameter_groups(model, parts, recipe.optimizer), recipe.optimizer)
        engine, _, _, _ = self.deepspeed.initialize(model=model, optimizer=optimizer, config=recipe.deepspeed_config(self.world_size))
        places, losses, tokens, norms = iter(MicroBatchPositions(BATCH, micro_batches, self.rank, self.world_size)), [], [], []
        for _ in range(STEPS):
            batches = [self.pack([(samples or self.samples)[place] for place in next(places)]) for _ in range(micro_batches)]
            counted = int(sum_over_ranks(torch.tensor(sum(batch["supervised_tokens"] for batch in batches)), self.device))
            done = train_step(engine, batches, counted, self.processor, clip=recipe.optimizer.clip)
            losses.append(done.loss)
            norms.append(done.gradient_norm)
            tokens.append(counted)
        weights = full_state_dict(engine, recipe.run.zero_stage)
        result = {"losses": losses, "tokens": tokens, "norms": norms}
        if self.rank == 0:
            weights = {name: tensor.clone() for name, tensor in weights.items()}
            result["names"] = sorted(weights) == sorted(start)
            result["moved"] = sorted({name.split(".")[0] for name in start if not torch.equal(weights[name], start[name])})
            result["moved_share"] = sum(not torch.equal(weights[name], start[name]) for name in start) / len(start)
            if expected is not None:
                result["distance"] = max((weights[name].float() - expected[name].float()).abs().max().item() for name in expected)
        engine.destroy()
        return result


def with_batch_norm(bench: Bench, out: Path, shards: str) -> dict:
    """Runs of a model whose encoder normalises by its batch; in the first two steps one rank has no picture. Then one by a recipe: the
    running statistics of both ranks after it, and which samples its micro-batches had."""
    settings = {"image_size": 64, "output_stride": 16, "stem_width": 8, "channels": [8, 16, 16, 32]}
    bench.model, bench.processor = assemble("tiny", vision_encoder="timm:resnet10t", vision_settings=settings, seed=0)
    bench.samples = make_samples(bench.processor)
    found = {}
    for micro_batches, stages in ((1, (0, 1, 2, 3)), (2, (0, 2))):
        plain, weights = bench.plain_loop(ALL, micro_batches)
        found[f"plain{micro_batches}"] = plain
        for stage in stages:
            found[f"zero{stage}_micro{micro_batches}"] = bench.run(ALL, expected=weights, zero_stage=stage, micro_batches=micro_batches)
    if bench.rank == 0:
        save_model(bench.model, bench.processor, out / "model")
    torch.distributed.barrier()
    seen, micro_batches, real_step = [], [], training_loop.train_step

    def watched(engine, batches, *arguments, **keywords):
        done = real_step(engine, batches, *arguments, **keywords)
        seen[:] = [buffer.double().sum().item() for buffer in engine.module.vision_encoder.buffers()]
        micro_batches.extend(batch["ids"] for batch in batches)
        return done

    recipe = run_recipe(out / "trained", shards, str(out / "model"), zero_stage=1, steps=2, save_every_steps=None)
    recipe = replace(recipe, data=replace(recipe.data, batch_samples=8, micro_batches=2))
    training_loop.train_step = watched
    try:
        train(recipe)
    finally:
        training_loop.train_step = real_step
    of_ranks, held = [None, None], [None, None]
    torch.distributed.all_gather_object(of_ranks, seen)
    torch.distributed.all_gather_object(held, micro_batches)
    stream = SampleStream(recipe.data.sources, bench.processor, seed=recipe.run.seed, max_tokens=recipe.data.max_tokens)
    in_order = [f"{sample['source']} {sample['id']}" for sample in (stream[place] for place in range(16))]
    return found | {"running": of_ranks, "held": held, "in_order": in_order}


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out.with_name(out.name + ".log") / "log.jsonl").read_text().splitlines()]


def run_recipe(out: Path, shards: str, model: str, *, kind="adamw", lora=None, **run) -> Recipe:
    settings = {"steps": 6, "zero_stage": 3, "log_every": 1, "threads_per_rank": 1, "save_every_steps": 2, "save_every_minutes": None}
    return Recipe(
        stage="sft", model=model, out=str(out), parts=ALL, optimizer=Optimizer(kind=kind), run=Run(**settings | run), lora=lora,
        data=Data(sources=(Source(shards), Source(shards, weight=0.5)), heldout=(Source(shards),), heldout_samples=5, batch_samples=4,
                  workers=0, max_skipped_percent=50),
    )  # fmt: skip


def cut_and_whole(bench: Bench, folder: Path, shards: str, model: str, **settings) -> dict:
    """A run, and the same one that is stopped in its sixth step and started again: their logs and final weights."""
    whole, cut = (run_recipe(folder / name, shards, model, **settings) for name in ("whole", "cut"))
    whole, cut = (replace(each, data=replace(each.data, heldout_text=str(Path(shards).with_name("words.txt")))) for each in (whole, cut))
    train(replace(whole, run=replace(whole.run, heldout_every=3)))  # looking at the held-out loss must not move anything
    left = cut_in_step(bench, cut, 6)
    train(cut)
    if bench.rank:
        return {}
    logs = [read_log(Path(recipe.out)) for recipe in (whole, cut)]
    files = [(Path(recipe.out) / "model.safetensors").read_bytes() for recipe in (whole, cut)]
    return {"logs": logs, "left": left, "weights_equal": files[0] == files[1], "out": str(cut.out)}


def moved_whole(bench: Bench, folder: Path, shards: str, model: str) -> dict:
    """By stage of ZeRO: how often a run puts its whole model onto the device, and whether its weights were read as pages of their file."""
    kind, found, mapped = type(bench.model), {}, []
    real, moved, real_load = kind.to, [], preparing.load_model

    def watched(self, *arguments, **settings):
        moved.append(arguments)
        return real(self, *arguments, **settings)

    def load(*arguments, **settings):
        mapped.append(settings["mapped"])
        return real_load(*arguments, **settings)

    kind.to, preparing.load_model = watched, load
    try:
        for stage in (2, 3):
            moved.clear()
            train(run_recipe(folder / f"moved{stage}", shards, model, steps=1, zero_stage=stage, save_every_steps=None))
            found[stage] = [len(moved), mapped[-1]]
    finally:
        kind.to, preparing.load_model = real, real_load
    return found


def cut_in_step(bench: Bench, recipe: Recipe, step: int) -> list[str]:
    """Start a run and stop it in a step; rank 0 gets the names of the checkpoints that are left."""
    train_until(recipe, step)
    left = sorted(path.name for path in Path(f"{recipe.out}.checkpoints").iterdir()) if bench.rank == 0 else []
    torch.distributed.barrier()
    return left


def scalar_names(folder: Path) -> list[str]:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload().Tags()["scalars"]


def cut_by_the_clock(bench: Bench, out: Path, shards: str, model: str) -> dict:
    """A run in minutes whose steps take half a second by a clock of our own, stopped in its fourth step, and gone on with a day later; one
    of half the time that logs rarely (`rare`), and one that has no time for a step (`none`)."""
    recipe, now, tick = run_recipe(out, shards, model, steps=None, minutes=0.1, zero_stage=1), [0.0], [0.0]
    real_progress, real_step = training_loop.Progress, training_loop.train_step

    def timed(*arguments, **keywords):
        done = real_step(*arguments, **keywords)
        now[0] += 0.5
        return done

    training_loop.train_step = timed

    def clock():
        now[0] += tick[0]
        return now[0]

    training_loop.Progress = lambda *arguments, **keywords: real_progress(*arguments, clock=clock, **keywords)
    rare = replace(recipe, out=f"{out}_rare", run=replace(recipe.run, minutes=0.05, log_every=4))
    try:
        cut_in_step(bench, recipe, 4)
        now[0] += 86400.0
        train(recipe)
        train(rare)
        tick[0] = 10.0  # over before the first step
        train(replace(rare, out=f"{out}_none"))
    finally:
        training_loop.Progress, training_loop.train_step = real_progress, real_step
    if bench.rank:
        return {}
    names = {"": out.name, "rare_": f"{out.name}_rare", "none_": f"{out.name}_none"}
    folders = {key: out.with_name(f"{name}.log") for key, name in names.items()}
    found = {f"{key}log": read_log(out.with_name(name)) for key, name in names.items()}
    found |= {f"{key}summary": json.loads((folder / "summary.json").read_text()) for key, folder in folders.items()}
    found["rare_scalars"] = scalar_names(folders["rare_"] / "tensorboard")
    return found | {f"{key}report": (folder / "report.md").read_text() for key, folder in folders.items()}


def bad_step(bench: Bench, recipe: Recipe, *, gradient: bool) -> dict:
    """A run that must stop: its message, and what the autopsy says. With `gradient`, from the third step on only gradients are bad."""
    real = Projector.forward
    calls = []

    def poisoned(self, features):
        calls.append(1)
        return Poison.apply(real(self, features), float("inf")) if len(calls) > 2 else real(self, features)

    if gradient:
        Projector.forward = poisoned
    try:
        train(recipe)
    except NotFiniteError as error:
        (folder,) = Path(f"{recipe.out}.log").glob("autopsy-*")
        return {"message": str(error), "autopsy": json.loads((folder / "autopsy.json").read_text()), "folder": str(folder)}
    finally:
        Projector.forward = real
    return {}


def main(shards: str, model_folder: str, out: str, killed: str) -> None:
    warnings.filterwarnings("ignore")
    bench = Bench(model_folder)
    plain, weights = bench.plain_loop(ALL)
    plain_align, weights_align = bench.plain_loop(ALIGN)
    results = {"plain": plain, "plain_align": plain_align}
    for stage in range(4):
        results[f"zero{stage}"] = bench.run(ALL, expected=weights, zero_stage=stage)
    results["micro2"] = bench.run(ALL, expected=weights, zero_stage=2, micro_batches=2)
    results["micro4_zero3"] = bench.run(ALL, expected=weights, zero_stage=3, micro_batches=4)
    # Answers longer than a chunk on one rank and not on the other, as with a vocabulary of 131,072 in any real run.
    loss.LOGITS_AT_ONCE = 8 * bench.model.config.text_config.vocab_size
    results["chunks_zero3"] = bench.run(ALL, expected=weights, zero_stage=3)
    results["chunks_frozen_zero3"] = bench.run(ALIGN, expected=weights_align, zero_stage=3)
    loss.LOGITS_AT_ONCE = 2**25
    results["checkpointing_zero3"] = bench.run(ALL, expected=weights, zero_stage=3, activation_checkpointing=True,
                                                encoder_activation_checkpointing=True)  # fmt: skip
    results["bfloat16"] = bench.run(ALL, zero_stage=1, precision="bfloat16")
    for stage in (1, 3):
        results[f"align_zero{stage}"] = bench.run(ALIGN, expected=weights_align, zero_stage=stage)
    skipped = {"source": 0, "id": "bad", "skipped": "broken", "detail": "why"}
    half = [sample if number % BATCH < 4 else skipped for number, sample in enumerate(bench.samples)]
    results["nothing_on_rank_1"] = bench.run(ALL, samples=half, zero_stage=3)
    results["nothing_at_all"] = bench.run(ALIGN, samples=[skipped] * len(half), zero_stage=2)

    for name, settings in {"muon_zero0": {"kind": "muon", "zero_stage": 0}, "zero3": {"zero_stage": 3}}.items():
        results[f"resumed_{name}"] = cut_and_whole(bench, Path(out, name), shards, model_folder, **settings)

    results |= adapters_and_offloading(bench, ALL, weights)
    results["resumed_lora"] = cut_and_whole(bench, Path(out, "lora"), shards, model_folder, lora=LORA, zero_stage=3)
    stopped = run_recipe(Path(out, "faulty"), shards, model_folder, zero_stage=1, steps=99, save_every_steps=None)
    results["moved_whole"] = moved_whole(bench, Path(out), shards, model_folder)
    results["stopped_by_the_ledger"] = stopped_by_the_ledger(stopped, Path(shards).with_name("faulty"))

    for stage in (1, 3):
        results[f"resumed_bfloat16_zero{stage}"] = cut_and_whole(bench, Path(out, f"bfloat16_zero{stage}"), shards, model_folder,
                                                                 zero_stage=stage, precision="bfloat16")  # fmt: skip
    results["timed"] = cut_by_the_clock(bench, Path(out, "timed"), shards, model_folder)

    # What one process left when it was killed goes on here, on two ranks.
    on_two = replace(load_recipe(f"{killed}.yaml"), out=f"{out}/on_two")
    if bench.rank == 0:
        shutil.copytree(f"{killed}.left", f"{out}/on_two.checkpoints")
    torch.distributed.barrier()
    train(on_two)

    broken = copy.deepcopy(bench.model)
    with torch.no_grad():
        broken.language_model.model.layers[3].mixer.in_proj.weight[3, 4] = float("inf")
    if bench.rank == 0:
        save_model(broken, bench.processor, Path(out, "broken"))
    torch.distributed.barrier()
    off = {"save_every_steps": None, "steps": 9}
    recipe = run_recipe(Path(out, "bad_loss"), shards, f"{out}/broken", **off)
    results["bad_loss"] = bad_step(bench, recipe, gradient=False)
    for stage in (0, 2):
        recipe = run_recipe(Path(out, f"bad_gradient{stage}"), shards, model_folder, zero_stage=stage, **off)
        results[f"bad_gradient{stage}"] = bad_step(bench, recipe, gradient=True)
    results["batch_norm"] = with_batch_norm(bench, Path(out, "batch_norm"), shards)
    if bench.rank == 0:
        Path(out, "results.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
