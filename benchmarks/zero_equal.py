"""Two ranks, ZeRO 0, 1, 2, 3, accumulation over 1, 2, 4 micro-batches: is it the same training as a plain loop in one process?

    python benchmarks/zero_equal.py                  writes benchmarks/results/zero_equal.{md,json}

The tiny model, everything trained, 20 steps of AdamW in float32; samples with one, two and no picture, so that ranks have unlike work and
some micro-batches are text only. The reference packs the whole batch of a step into one row and knows nothing of DeepSpeed. A row of the
table: the gradients of the first step before clipping, all parameters as one vector, |g - reference| / |reference|; the worst single
parameter by the same measure (of those whose gradient is not rounding itself); and the largest difference of a loss over all steps.

The same again with an encoder that normalises by its batch (BatchNorm, the quickstart's resnet10t): over the tiles of a micro-batch of all
ranks, so that its reference packs each micro-batch into a row.

A second table starts engines in bfloat16 as the trainer does, makes five steps, and says in which dtype each holds A_log, D and dt_bias and
how far their values moved by its start; a matrix stands beside them.
"""

import argparse
import copy
import json
import os
import platform
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import deepspeed  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from deepspeed.utils import safe_get_full_grad  # noqa: E402
from PIL import Image  # noqa: E402
from result_files import write_results  # noqa: E402

from train_vlm.batching import MicroBatchPositions, pack  # noqa: E402
from train_vlm.engine_start import start_engine  # noqa: E402
from train_vlm.freezing import apply_parts, make_optimizer, parameter_groups  # noqa: E402
from train_vlm.kept_precision import KEPT, kept_parameters  # noqa: E402
from train_vlm.ranks import start_deepspeed, sum_over_ranks  # noqa: E402
from train_vlm.recipe import Data, Parts, Recipe, Run, Source  # noqa: E402
from train_vlm.training_step import train_step  # noqa: E402
from vision_encoders.shared_statistics import share_statistics  # noqa: E402
from vlm.assemble import assemble  # noqa: E402
from vlm.files import write_whole  # noqa: E402

BATCH, RANKS = 8, 2
PARTS = Parts(vision_encoder=5e-4, projector=1e-3, language_model=1e-3)
ENCODERS = {  # name: arguments of `assemble`
    "InternViT": {"vision_settings": {"image_size": 32, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
                                      "num_attention_heads": 2}},
    "resnet10t": {"vision_encoder": "timm:resnet10t", "vision_settings": {"image_size": 32, "output_stride": 8, "stem_width": 16,
                                                                          "channels": [16, 32, 64, 64]}},
}  # fmt: skip
BARS = {"gradient": 1e-5, "loss": 1e-3}


def make_samples(processor, count: int) -> list[dict]:
    """Questions and answers of different lengths; one sample in four has no picture, one in four two."""
    samples = []
    for number in range(count):
        generator = np.random.default_rng(number)
        sizes = [(32 * int(generator.integers(1, 4)), 32 * int(generator.integers(1, 3))) for _ in range((1, 0, 2, 1)[number % 4])]
        images = [
            {"type": "image", "image": Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))} for size in sizes
        ]
        question = {"role": "user", "content": [*images, {"type": "text", "text": f"What is number {number}?"}]}
        answer = {"role": "assistant", "content": "red blue green".split()[number % 3] + " ball" * (number % 7)}
        prepared = processor.prepare([question, answer])
        samples.append({"source": 0, "id": str(number), "input_ids": prepared.rendered.input_ids, "labels": prepared.rendered.labels,
                        "pixels": prepared.pixels, "tiles_reduced": 0})  # fmt: skip
    return samples


class Trial:
    """One process of a run of two; the model and its samples are the same in both."""

    def __init__(self, steps: int):
        self.steps = steps
        self.recipe = Recipe(stage="sft", model="tiny", out="", data=Data(sources=(Source("drawn"),), batch_samples=BATCH), parts=PARTS,
                             run=Run(steps=steps, threads_per_rank=1))  # fmt: skip
        _, self.rank, self.ranks, self.device = start_deepspeed(self.recipe)

    def take(self, encoder: str) -> None:
        self.model, self.processor = assemble("tiny", **ENCODERS[encoder], seed=0)
        self.samples = make_samples(self.processor, self.steps * BATCH)

    def pack(self, places) -> dict:
        chosen = [self.samples[place] for place in places]
        return pack(chosen, self.processor.renderer.end_of_turn_id, self.processor.image_processor.tile_size)

    def fresh(self):
        model = copy.deepcopy(self.model)
        apply_parts(model, PARTS)
        model.training = True
        return model, make_optimizer(parameter_groups(model, PARTS, self.recipe.optimizer), self.recipe.optimizer)

    def reference(self, micro_batches: int = 1) -> tuple[list[float], dict]:
        """Losses, and the gradients of the first step by name, of a plain loop over whole batches, or over so many parts of each."""
        model, optimizer = self.fresh()
        losses, first = [], {}
        for step in range(self.steps):
            starts = range(step * BATCH, (step + 1) * BATCH, BATCH // micro_batches)
            batches, loss = [self.pack(range(start, start + BATCH // micro_batches)) for start in starts], 0.0
            for batch in batches:
                output = model(
                    input_ids=batch["input_ids"], labels=batch["labels"], cu_seq_lens_q=batch["cu_seq_lens_q"],
                    pixel_values=self.processor.image_processor.normalize_pixels(batch["pixels"]),
                    num_items_in_batch=sum(each["supervised_tokens"] for each in batches),
                )  # fmt: skip
                output.loss.backward()
                loss += output.loss.item()
            if not first:
                first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], self.recipe.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        return losses, first

    def engine(self, **run):
        """DeepSpeed's engine around a fresh model, and the recipe it was started by."""
        micro_batches = run.pop("micro_batches", 1)
        recipe = replace(self.recipe, data=replace(self.recipe.data, micro_batches=micro_batches), run=replace(self.recipe.run, **run))
        model, optimizer = self.fresh()
        if recipe.run.precision == "bfloat16":  # as train_vlm/preparing.py
            kept = kept_parameters(model)
            for name, p in model.named_parameters():
                p.data = p.data if name in kept else p.data.bfloat16()
            optimizer = make_optimizer(parameter_groups(model, PARTS, recipe.optimizer), recipe.optimizer)
        share_statistics(model.vision_encoder)  # as train_vlm/preparing.py
        engine, _ = start_engine(model, optimizer, recipe, recipe.deepspeed_config(self.ranks), self.ranks)
        return engine, recipe

    def run(self, zero_stage: int, micro_batches: int) -> tuple[list[float], dict]:
        """Losses of all steps, and the gradients of the first one."""
        engine, recipe = self.engine(zero_stage=zero_stage, micro_batches=micro_batches)
        places = iter(MicroBatchPositions(BATCH, micro_batches, self.rank, self.ranks))
        losses, first, backward = [], {}, engine.backward

        def watched(loss):
            backward(loss)
            if not first and engine.is_gradient_accumulation_boundary():
                for name, parameter in engine.module.named_parameters():
                    gradient = safe_get_full_grad(parameter)  # a collective: on every rank
                    if gradient is not None:
                        first[name] = gradient.detach().float().clone()

        engine.backward = watched
        for _ in range(self.steps):
            batches = [self.pack(next(places)) for _ in range(micro_batches)]
            tokens = int(sum_over_ranks(torch.tensor(sum(batch["supervised_tokens"] for batch in batches)), self.device))
            losses.append(train_step(engine, batches, tokens, self.processor, clip=recipe.optimizer.clip).loss)
        engine.destroy()
        return losses, first

    def ssm_row(self, **run) -> dict:
        """Of an engine in bfloat16: for A_log, D, dt_bias and a matrix [dtype, largest change of a value], and some losses."""
        engine, recipe = self.engine(precision="bfloat16", **run)
        before, found, modules = dict(self.model.named_parameters()), {}, dict(engine.module.named_modules())
        for name, parameter in engine.module.named_parameters():
            kind = "in_proj" if name.endswith("in_proj.weight") else name.rpartition(".")[2]
            if kind in (*KEPT, "in_proj"):
                with deepspeed.zero.GatheredParameters([parameter], enabled=recipe.run.zero_stage == 3):
                    mixer, _, short = name.rpartition(".")
                    rest = getattr(modules[mixer], "rests", {}).get(short)  # what the mixer adds (train_vlm/float32_rests.py)
                    value = parameter.detach().float() + (0.0 if rest is None else rest)
                    change = (value - before[name].detach().float()).abs().max().item()
                held = str(parameter.dtype).removeprefix("torch.") + ("" if rest is None else " + rest")
                found[kind] = (held, max(change, found.get(kind, ("", 0.0))[1]))
        losses = []
        for step in range(min(5, self.steps)):
            places = range(step * BATCH + self.rank, (step + 1) * BATCH, self.ranks)
            batch = self.pack(places)
            tokens = int(sum_over_ranks(torch.tensor(batch["supervised_tokens"]), self.device))
            losses.append(train_step(engine, [batch], tokens, self.processor, clip=recipe.optimizer.clip).loss)
        engine.destroy()
        return {"kept": found, "losses": losses}


def distances(gradients: dict, reference: dict) -> tuple[float, float, str]:
    """(of all as one vector, of the worst parameter, its name)."""
    missing = sorted(set(reference) ^ set(gradients))
    if missing:
        raise RuntimeError(f"{len(missing)} parameters have a gradient on one side only, such as {missing[0]}")
    squares = {name: ((gradients[name] - wanted).double().square().sum().item(), wanted.double().square().sum().item())
               for name, wanted in reference.items()}  # fmt: skip
    norm = sum(square for _, square in squares.values()) ** 0.5
    whole = sum(square for square, _ in squares.values()) ** 0.5 / norm
    # A gradient that is zero but for rounding (a bias before a norm) has no relative error: such ones are measured by the whole.
    single = {name: (error**0.5) / max(size**0.5, 1e-6 * norm) for name, (error, size) in squares.items()}
    worst = max(single, key=single.get)
    return whole, single[worst], worst


def child(out: Path, steps: int) -> None:
    warnings.filterwarnings("ignore")
    trial = Trial(steps)  # the encoder of the papers comes last: the second table is about it
    rows, plain = [], {}
    for encoder in reversed(ENCODERS):
        trial.take(encoder)
        of_batches = encoder == "resnet10t"
        references = {count: trial.reference(count if of_batches else 1) for count in ((1, 2, 4) if of_batches else (1,))}
        plain[encoder] = references[1][0]
        for stage in range(4):
            for micro_batches in (1, 2, 4):
                losses, gradients = references[micro_batches if of_batches else 1]
                found, first = trial.run(stage, micro_batches)
                whole, worst, name = distances(first, gradients)
                gap = max(abs(a - b) for a, b in zip(found, losses, strict=True))
                rows.append({"encoder": encoder, "zero_stage": stage, "micro_batches": micro_batches, "gradient": whole,
                             "worst_gradient": worst, "worst": name, "loss": gap, "last_loss": found[-1]})  # fmt: skip
                if trial.rank == 0:
                    print(rows[-1], file=sys.stderr, flush=True)
    ssm = [{"zero_stage": stage, "offload": offload} | trial.ssm_row(zero_stage=stage, offload=offload)
           for stage, offload in ((1, None), (2, None), (2, "optimizer"), (3, None))]  # fmt: skip
    result = {"losses": plain["InternViT"], "losses_resnet10t": plain["resnet10t"],
              "parameters": sum(p.numel() for p in trial.model.parameters()), "rows": rows, "ssm": ssm}  # fmt: skip
    if trial.rank == 0:
        write_whole(out, json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def page(result: dict) -> str:
    out = [
        "# Two ranks under ZeRO 0 to 3 beside a plain loop", "", f"    {result['command']}", "",
        f"{result['machine']}; torch {result['torch']}, DeepSpeed {result['deepspeed']}. {result['parameters']:,} parameters, "
        f"{len(result['losses'])} steps of {BATCH} samples, float32, gloo; the plain loop's loss went from {result['losses'][0]:.4f} to "
        f"{result['losses'][-1]:.4f}.", "",
        "| encoder | ZeRO | micro-batches | gradients of the first step | worst single parameter | largest difference of a loss |",
        "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in sorted(result["rows"], key=lambda row: row["encoder"]):
        numbers = " | ".join(f"{row[key]:.1e}" for key in ("gradient", "worst_gradient", "loss"))
        out.append(f"| {row['encoder']} | {row['zero_stage']} | {row['micro_batches']} | {numbers} |")
    out += ["", f"Bars: gradients {BARS['gradient']:.0e}, losses {BARS['loss']:.0e}.", "",
            "In bfloat16: dtype, and largest change of a value when the engine started; largest difference of the losses to float32.", "",
            f"| ZeRO | offload | {' | '.join((*KEPT, 'in_proj'))} | losses |", f"|---:|---|{'---|' * (len(KEPT) + 1)}---:|"]  # fmt: skip
    for row in result["ssm"]:
        cells = [f"{dtype}, {change:.1e}" for dtype, change in (row["kept"][name] for name in (*KEPT, "in_proj"))]
        gap = max(abs(a - b) for a, b in zip(row["losses"], result["losses"], strict=False))
        out.append(f"| {row['zero_stage']} | {row['offload'] or '-'} | {' | '.join(cells)} | {gap:.1e} |")
    return "\n".join(out) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "zero_equal")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.steps)
        return 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = options.out.with_suffix(".child.json")
    quiet = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(HERE.parent),
    }
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS), "--master_port", port, __file__,
                           "--child", str(found), "--steps", str(options.steps)], env=os.environ | quiet)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"zero_equal: the ranks ended with {done.returncode}")
    result = json.loads(found.read_text()) | {
        "command": f"python benchmarks/zero_equal.py --steps {options.steps}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }
    found.unlink()
    write_results(options.out, result, page(result))
    good = all(row["gradient"] <= BARS["gradient"] and row["loss"] <= BARS["loss"] for row in result["rows"])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
