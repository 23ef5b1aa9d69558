"""The models, the samples and the ways of training that benchmarks/train.py compares; each way runs in a process of its own.

python benchmarks/train_work.py WAY FOLDER STEPS prints one line of JSON. WAY is one of WAYS below: each switches one thing on over the one
before it. "plain" is transformers' NemotronHForCausalLM as it is (nothing of ours is set on it), rows padded on the right, logits of every
position, float32, torch's AdamW. Encoder, projector, weights, samples and their order are the same for all.
"""

import json
import os
import random
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from engine_work import HYBRID, VIT_TINY  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.models.nemotron_h import NemotronHForCausalLM  # noqa: E402

import train_vlm  # noqa: E402
from train_vlm.batching import pack  # noqa: E402
from train_vlm.engine_start import start_engine  # noqa: E402
from train_vlm.freezing import apply_parts, make_optimizer, parameter_groups  # noqa: E402
from train_vlm.kept_precision import kept_parameters, widen_kept  # noqa: E402
from train_vlm.reading import SampleStream  # noqa: E402
from train_vlm.recipe import Data, Parts, Recipe, Run, Source, load_recipe  # noqa: E402
from train_vlm.training_step import forward_inputs, train_step  # noqa: E402
from vision_encoders import build_vision_encoder  # noqa: E402
from vision_encoders.shared_statistics import share_statistics  # noqa: E402
from vlm.assemble.parts import join_configs, join_processor  # noqa: E402
from vlm.chat_format import chat_formats  # noqa: E402
from vlm.checkpoint import load_model  # noqa: E402
from vlm.decoder import Layout, preset_config, run_layers, take_over_mixers  # noqa: E402
from vlm.loss import IGNORE_INDEX, shift_labels  # noqa: E402
from vlm.modeling import VisionLanguageModel  # noqa: E402
from vlm.small_tokenizer import train_small_tokenizer  # noqa: E402

VOCABULARY = 131072
GRIDS = ((1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (1, 4), (5, 1), (3, 2), (2, 3), (4, 2), (3, 3), (5, 2), (4, 3), (3, 4))  # 1 to 13 tiles
WORDS = "the a red blue small large dog boat table street window person near under behind holding white sign two three road".split()
TINY_RECIPE = load_recipe(Path(train_vlm.__path__[0]) / "recipes" / "quickstart_early.yaml")
SAMPLES = {"tiny": TINY_RECIPE.data.batch_samples, "hybrid": 3}  # of a step
RATE = 1e-4


def words(generator: random.Random, least: int, most: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(generator.randint(least, most)))


def hybrid_samples(processor, count: int) -> list[dict]:
    """Pictures of 1 to 13 tiles, each with one to three questions and short answers."""
    samples = []
    for number in range(count):
        generator, tile = random.Random(number), processor.image_processor.tile_size
        columns, rows = generator.choice(GRIDS)
        image = np.random.default_rng(number).integers(0, 256, (rows * tile, columns * tile, 3), dtype=np.uint8)
        messages = []
        for turn in range(generator.randint(1, 3)):
            shown = [{"type": "image", "image": Image.fromarray(image)}] if turn == 0 else []
            messages.append({"role": "user", "content": [*shown, {"type": "text", "text": words(generator, 8, 24)}]})
            messages.append({"role": "assistant", "content": words(generator, 1, 20)})
        prepared = processor.prepare(messages)
        samples.append({"source": 0, "id": str(number), "input_ids": prepared.rendered.input_ids, "labels": prepared.rendered.labels,
                        "pixels": prepared.pixels, "tiles_reduced": 0})  # fmt: skip
    return samples


def build_hybrid():
    """Model and processor, with the same random weights in every process: a body of some 60 M parameters, ViT-tiny."""
    torch.manual_seed(0)
    tokenizer, chat = train_small_tokenizer([" ".join(WORDS)] * 20), chat_formats()["small"]
    decoder = NemotronHForCausalLM(preset_config("tiny", **HYBRID, vocab_size=VOCABULARY))
    encoder = build_vision_encoder("internvit", **VIT_TINY)
    config = join_configs(encoder, decoder.config, tokenizer, pixel_shuffle_factor=2)
    model = VisionLanguageModel(config, vision_encoder=encoder, language_model=decoder)
    return model, join_processor(encoder, tokenizer, chat, config.visual_tokens_per_tile, 12)


def read_samples(folder: Path, processor, count: int) -> list[dict]:
    """The first samples of the blend in the quickstart's recipe, or the hybrid's."""
    if folder.name == "hybrid":
        return hybrid_samples(processor, count)
    sources = tuple(replace(each, shards=str(folder.parent / "shards" / Path(each.shards).name)) for each in TINY_RECIPE.data.sources)
    stream = SampleStream(sources, processor, seed=0, max_tokens=4096)
    samples = [stream[position] for position in range(count)]
    assert not any("skipped" in sample for sample in samples), "a drawn sample is broken"
    return samples


class Work:
    """Model, samples and parts: what is frozen is frozen for all (the hybrid's encoder; nothing of the tiny model)."""

    def __init__(self, folder: Path, steps: int, *, dtype: torch.dtype = torch.float32):
        self.model, self.processor = build_hybrid() if folder.name == "hybrid" else load_model(folder, dtype=dtype)
        if dtype == torch.bfloat16:
            kept = kept_parameters(self.model)
            for name, parameter in self.model.named_parameters():
                parameter.data = parameter.data if name in kept else parameter.data.to(dtype)
            widen_kept(self.model)  # a model that is opened in bfloat16 has its norms in bfloat16
        self.parameters, each = self.model.parameter_counts(), SAMPLES[folder.name]
        samples = read_samples(folder, self.processor, each * steps)
        self.steps = [samples[start : start + each] for start in range(0, len(samples), each)]
        encoder = RATE if folder.name == "tiny" else None
        self.parts = Parts(vision_encoder=encoder, projector=RATE, language_model=RATE)
        self.recipe = Recipe(stage="sft", model=str(folder), out="", data=Data(sources=(Source("drawn"),), batch_samples=each),
                             parts=self.parts, run=Run(steps=steps, zero_stage=0))  # fmt: skip

    def prepare(self) -> None:
        """After a way has put its decoder in place."""
        apply_parts(self.model, self.parts)
        self.model.training = True

    def packed(self, samples: list[dict]) -> dict:
        return pack(samples, self.processor.renderer.end_of_turn_id, self.processor.image_processor.tile_size)

    def embeddings(self, batch: dict, input_ids: torch.Tensor) -> torch.Tensor:
        pixels = self.processor.image_processor.normalize_pixels(batch["pixels"])
        return self.model.embed(input_ids, pixels)


class Padded:
    """A loop as it stands in many repositories. With `our_scan` our mixers are set on the same model, and nothing else."""

    def __init__(self, folder: Path, steps: int, *, our_scan: bool):
        self.work = work = Work(folder, steps)
        stock = NemotronHForCausalLM(work.model.config.text_config)
        stock.load_state_dict(work.model.language_model.state_dict())
        for module in stock.modules():  # NVIDIA's code has no clamp from below (docs/decisions.md); without it both compute the same
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (0.0, float("inf"))
            if hasattr(module, "time_step_min"):
                module.time_step_min = 0.0
        if our_scan:
            take_over_mixers(stock)
        work.model.language_model = stock
        work.prepare()
        self.optimizer = torch.optim.AdamW([p for p in work.model.parameters() if p.requires_grad], lr=RATE, betas=(0.9, 0.95))

    def step(self, samples: list[dict]) -> float:
        model, batch = self.work.model, self.work.packed(samples)
        lengths = batch["cu_seq_lens_q"].diff().tolist()
        width = max(lengths)
        rows = zip(batch["input_ids"][0].split(lengths), batch["labels"][0].split(lengths), strict=True)
        padded = [(F.pad(ids, (0, width - len(ids))), F.pad(labels, (0, width - len(ids)), value=IGNORE_INDEX)) for ids, labels in rows]
        ids, labels = (torch.stack(part) for part in zip(*padded, strict=True))
        mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        embeddings = self.work.embeddings(batch, ids)
        output = model.language_model(inputs_embeds=embeddings, attention_mask=mask, labels=labels, use_cache=False)
        output.loss.backward()
        self.finish()
        return output.loss.item()

    def finish(self) -> None:
        torch.nn.utils.clip_grad_norm_([p for p in self.work.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Packed(Padded):
    """One packed row, our layer loop; logits of every position, or of supervised ones only."""

    def __init__(self, folder: Path, steps: int, *, our_loss: bool):
        self.work, self.our_loss = Work(folder, steps), our_loss
        self.work.prepare()
        self.optimizer = torch.optim.AdamW([p for p in self.work.model.parameters() if p.requires_grad], lr=RATE, betas=(0.9, 0.95))

    def step(self, samples: list[dict]) -> float:
        model, batch = self.work.model, self.work.packed(samples)
        if self.our_loss:
            loss = model(**forward_inputs(batch, self.work.processor, torch.device("cpu"), torch.float32)).loss
        else:
            layout = Layout.packed(batch["cu_seq_lens_q"].diff().tolist())
            hidden = run_layers(model.language_model, self.work.embeddings(batch, batch["input_ids"]), layout)
            targets = shift_labels(batch["labels"], layout.seq_idx)
            loss = F.cross_entropy(
                model.get_output_embeddings()(hidden).float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX
            )
        loss.backward()
        self.finish()
        return loss.item()


class Trainer:
    """What `deepspeed train_vlm/sft.py` does for a step, under ZeRO 0 (float32) or ZeRO 1 (bfloat16). `lean`: the recipe's
    run.activation_checkpointing."""

    def __init__(self, folder: Path, steps: int, *, precision: str, lean: bool = False):
        from train_vlm.ranks import start_deepspeed

        narrow = precision == "bfloat16"
        self.work = work = Work(folder, steps, dtype=torch.bfloat16 if narrow else torch.float32)
        work.prepare()
        work.model.gradient_checkpointing = lean
        run = Run(steps=steps, zero_stage=1 if narrow else 0, precision=precision, threads_per_rank=torch.get_num_threads())
        recipe = Recipe(stage="sft", model=str(folder), out="", data=work.recipe.data, parts=work.parts, run=run)
        start_deepspeed(recipe)
        optimizer = make_optimizer(parameter_groups(work.model, work.parts, recipe.optimizer), recipe.optimizer)
        share_statistics(work.model.vision_encoder)  # as train_vlm/preparing.py
        self.engine, _ = start_engine(work.model, optimizer, recipe, recipe.deepspeed_config(1), 1)

    def step(self, samples: list[dict]) -> float:
        batch = self.work.packed(samples)
        sources = max(len(TINY_RECIPE.data.sources), 1)  # the hybrid's samples are of one
        return train_step(self.engine, [batch], batch["supervised_tokens"], self.work.processor, sources=sources).loss


WAYS = {
    "plain": lambda folder, steps: Padded(folder, steps, our_scan=False),
    "+ scan": lambda folder, steps: Padded(folder, steps, our_scan=True),
    "+ packing": lambda folder, steps: Packed(folder, steps, our_loss=False),
    "+ loss": lambda folder, steps: Packed(folder, steps, our_loss=True),
    "trainer, float32": lambda folder, steps: Trainer(folder, steps, precision="float32"),
    "trainer, float32, lean": lambda folder, steps: Trainer(folder, steps, precision="float32", lean=True),
    "trainer, bfloat16": lambda folder, steps: Trainer(folder, steps, precision="bfloat16"),
    "trainer, bfloat16, lean": lambda folder, steps: Trainer(folder, steps, precision="bfloat16", lean=True),
}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    way, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    training = WAYS[way](folder, steps + 1)
    before, (warm_up, *measured) = peak_bytes(), training.work.steps
    training.step(warm_up[:2])  # allocators, threads, optimizer state
    losses, began, cpu = [], time.perf_counter(), time.process_time()
    for samples in measured:
        losses.append(training.step(samples))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    count = {
        "tokens": sum(len(sample["input_ids"]) for samples in measured for sample in samples),
        "padded_tokens": sum(len(samples) * max(len(sample["input_ids"]) for sample in samples) for samples in measured),
        "supervised_tokens": sum(label != IGNORE_INDEX for samples in measured for sample in samples for label in sample["labels"]),
        "tiles": sum(len(sample["pixels"]) for samples in measured for sample in samples),
    }
    parameters = training.work.parameters
    found = {"parameters": parameters, "seconds": seconds, "cpu_seconds": cpu_seconds, "losses": losses, "peak_bytes": peak_bytes()}
    print(json.dumps(found | {"loaded_bytes": before} | count), flush=True)


if __name__ == "__main__":
    main()
