"""A training step on a GPU that is not there (tests/pretend_gpu.py): a processor's losses, and no tensor on the wrong side."""

import copy

import pytest
import torch
from PIL import Image

from train_vlm.autopsy import examine_batches
from train_vlm.batching import pack
from train_vlm.encoder_checkpointing import checkpoint_encoder
from train_vlm.freezing import apply_parts, make_optimizer, parameter_groups
from train_vlm.recipe import Optimizer, Parts
from train_vlm.training_step import train_step
from vlm.fp8 import convert_to_fp8
from vlm.lora import add_lora


class PlainEngine:
    """What train_step needs of DeepSpeed's engine: micro-batches averaged, and an update behind the last."""

    def __init__(self, module, optimizer, device, micro_batches):
        self.module, self.optimizer, self.device, self.micro_batches, self.steps = module, optimizer, device, micro_batches, 0

    def __call__(self, **inputs):
        return self.module(**inputs)

    def backward(self, loss):
        (loss / self.micro_batches).backward()

    def zero_optimization(self):
        return False

    def step(self):
        self.steps += 1
        if self.steps % self.micro_batches == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.fixture(scope="module")
def batches(tiny_processor):
    """Pictures and text in one pack, text alone, one picture."""

    def sample(words, *sizes, source=0):
        parts = [{"type": "image", "image": Image.effect_noise(size, 90).convert("RGB")} for size in sizes]
        turns = [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}, {"role": "assistant", "content": "a red ball"}]
        made = tiny_processor.prepare(turns)
        entry = {"input_ids": made.rendered.input_ids, "labels": made.rendered.labels, "pixels": torch.as_tensor(made.pixels)}
        return entry | {"source": source, "id": words, "tiles_reduced": 0}

    texts = [sample("a question of some words?", source=1)]
    packs = [[sample("What?", (200, 64), (64, 64)), *texts], texts, [sample("And?", (64, 130))]]
    return [pack(samples, tiny_processor.renderer.end_of_turn_id, tiny_processor.image_processor.tile_size) for samples in packs]


def losses(model, device, batches, processor, kind):
    parts, settings = Parts(vision_encoder=1e-3, projector=1e-3, language_model=1e-3), Optimizer(kind=kind)
    apply_parts(model, parts)
    engine = PlainEngine(model, make_optimizer(parameter_groups(model, parts, settings), settings), device, len(batches))
    tokens = sum(batch["supervised_tokens"] for batch in batches)
    steps = [train_step(engine, batches, tokens, processor, sources=2) for _ in range(3)]
    return [(step.loss, step.gradient_norm, *step.source_losses.tolist()) for step in steps]


def checkpointed(model):
    model.gradient_checkpointing = True
    assert checkpoint_encoder(model.vision_encoder) > 0


WAYS = {
    "plain": lambda model: None,
    "recomputed activations": checkpointed,
    "adapters": lambda model: add_lora(model, rank=4),
    "FP8, emulated": lambda model: convert_to_fp8(model.language_model, skip_first=1, skip_last=1, emulate=True),
}


@pytest.mark.parametrize(("way", "kind"), [*((way, "adamw") for way in WAYS), ("plain", "muon")])
def test_three_steps_lose_what_they_lose_on_a_processor(way, kind, tiny_model, tiny_processor, batches, one_rank, pretend_gpu):
    models = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    for model in models:
        torch.manual_seed(0)  # an adapter draws its first matrix
        WAYS[way](model)
    expected = losses(models[0], torch.device("cpu"), batches, tiny_processor, kind)
    found = losses(pretend_gpu.put(models[1]), pretend_gpu.device, batches, tiny_processor, kind)
    # An update by the sign of a gradient near 0 makes more of rounding than float32 does; FP8, whose steps are 1/16 wide, more still.
    assert found == [pytest.approx(step, rel=1e-2 if way.startswith("FP8") else 1e-4) for step in expected]
    assert expected[-1][0] < expected[0][0]


def test_an_autopsy_is_that_of_a_processor(tiny_model, tiny_processor, batches, one_rank, pretend_gpu):
    model = copy.deepcopy(tiny_model)
    there = pretend_gpu.put(copy.deepcopy(model))
    found, expected = (examine_batches(each, each, batches, tiny_processor, gradients="all") for each in (there, model))
    assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in expected])
    assert [entry["samples"] for entry in found] == [
        [sample | {"loss": pytest.approx(sample["loss"])} for sample in entry["samples"]] for entry in expected
    ]
