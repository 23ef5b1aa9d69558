"""Checks that nothing leaks: not between packed samples, not from padding, not from batch mates.

Letters: B batch, T positions, D decoder width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from ..loss import IGNORE_INDEX
from ..modeling import VisionLanguageModel
from .check import BOUNDS, Check, measured, worst_position
from .samples import Sample, pack, padded, places

__all__ = ["gradients", "neighbours", "packing", "padding"]


@torch.no_grad()
def _alone(model: VisionLanguageModel, samples: list[Sample]) -> list[Tensor]:
    """Logits (T, vocabulary) of each sample by itself."""
    return [model(**sample.model_inputs, use_cache=False).logits[0] for sample in samples]


@torch.no_grad()
def packing(model: VisionLanguageModel, samples: list[Sample]) -> Iterator[Check]:
    """Packed logits against those of each sample alone, with the three ways to say where samples end, and a forgotten border beside it."""
    alone, row = torch.cat(_alone(model, samples)), pack(samples)
    lengths = row["cu_seq_lens_q"].diff()
    ways = {
        "cu_seq_lens": {"cu_seq_lens_q": row["cu_seq_lens_q"]},
        "seq_idx": {"seq_idx": torch.arange(len(samples), device=lengths.device).int().repeat_interleave(lengths)[None]},
        "position_ids": {"position_ids": torch.cat([torch.arange(length, device=lengths.device) for length in lengths.tolist()])[None]},
    }
    inputs = {name: row[name] for name in ("input_ids", "pixel_values")}
    leak = worst_position(model(**inputs, use_cache=False).logits[0], alone)
    bound = BOUNDS[model.dtype]
    note = f"; a forgotten border: {leak:.1e}"
    for name, way in ways.items():
        value = worst_position(model(**inputs, **way, use_cache=False).logits[0], alone)
        yield measured(f"packed = separate, logits, by {name}", value, bound, note)


@torch.no_grad()
def neighbours(model: VisionLanguageModel, samples: list[Sample]) -> Iterator[Check]:
    """Changing one sample's picture and words moves that sample and no other: tiles land where they belong, nothing passes a border."""
    changed = list(samples)
    number = max(range(len(samples)), key=lambda index: len(samples[index].pixels))
    ids = samples[number].input_ids.clone()
    ids[0, -4:] = ids[0, -5:-1].clone()
    changed[number] = replace(samples[number], input_ids=ids, pixels=-samples[number].pixels)
    before, after = (model(**pack(some), use_cache=False).logits[0] for some in (samples, changed))
    moved = [worst_position(after[place], before[place]) for place in places(samples)]
    others = max(value for index, value in enumerate(moved) if index != number)
    # On one device the others' arithmetic is the same to the bit; an accelerator may sum in another order.
    bound = 0.0 if before.device.type == "cpu" else BOUNDS[model.dtype] / 10
    yield measured("a changed sample moves no neighbour", others, bound, f"; itself: {moved[number]:.1e}")
    yield Check("pictures reach their own sample", f"its logits move by {moved[number]:.1e}", moved[number] > BOUNDS[model.dtype])
    reordered = list(samples)
    reordered[number] = replace(samples[number], pixels=samples[number].pixels.flip(0))
    turned = worst_position(model(**pack(reordered), use_cache=False).logits[0][places(samples)[number]], before[places(samples)[number]])
    yield Check("the order of tiles matters", f"tiles in reverse move the logits by {turned:.1e}", turned > BOUNDS[model.dtype] / 10)


def _small_parameters(model: VisionLanguageModel) -> dict[str, torch.nn.Parameter]:
    """Norms, A_log, D, dt_bias and biases of the decoder: gradients of every layer at the price of a few kilobytes."""
    named = model.language_model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.ndim < 2}


@contextmanager
def _only_these_train(model: VisionLanguageModel, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def gradients(model: VisionLanguageModel, samples: list[Sample]) -> Iterator[Check]:
    """Gradients of a pack's loss, at every input position and at the decoder's small parameters, against the sum over samples alone.

    And one sample's loss must have no gradient at its neighbours' inputs, which is sharper: nothing has to be compared with rounding in it.
    """
    row, small = pack(samples), _small_parameters(model)
    spans = places(samples)
    labels = torch.cat([sample.labels for sample in samples], dim=1)
    with torch.no_grad():
        embeddings = model.embed(row["input_ids"], row["pixel_values"])

    def backward(inputs: Tensor, labels: Tensor, parameters=(), **packing) -> tuple[Tensor, ...]:
        leaf = inputs.detach().requires_grad_()
        loss = model(inputs_embeds=leaf, labels=labels, num_items_in_batch=1, use_cache=False, **packing).loss
        return torch.autograd.grad(loss, [leaf, *parameters])

    with _only_these_train(model, list(small.values())):
        borders = {"cu_seq_lens_q": row["cu_seq_lens_q"]}
        packed = backward(embeddings, labels, small.values(), **borders)
        alone = [backward(embeddings[:, span], labels[:, span], small.values()) for span in spans]
        strays = []
        for number in (1, len(samples) - 1):
            own = torch.full_like(labels, IGNORE_INDEX)
            own[:, spans[number]] = labels[:, spans[number]]
            (gradient,) = backward(embeddings, own, **borders)
            sizes = [float(gradient[:, span].abs().max()) for span in spans]
            strays.append(max(size for index, size in enumerate(sizes) if index != number) / max(sizes[number], 1e-30))
    # A sum of terms that cancel leaves its last digit (the gradient of the time steps is one); what leaks is larger by far.
    yield measured("a sample's loss has no gradient at neighbours", max(strays), 1e-6)

    def distance(found: Tensor, expected: Tensor) -> float:
        return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))

    bound = 3 * BOUNDS[model.dtype]
    inputs = max(distance(packed[0][:, span], part[0]) for span, part in zip(spans, alone, strict=True))
    yield measured("packed = separate, gradients at the inputs", inputs, bound)
    sums = [sum(part[1 + place].double() for part in alone) for place in range(len(small))]
    distances = {name: distance(found, total) for name, found, total in zip(small, packed[1:], sums, strict=True)}
    worst = max(distances, key=distances.get)
    yield measured("packed = separate, gradients at parameters", distances[worst], bound, f", at {worst}")


@torch.no_grad()
def padding(model: VisionLanguageModel, samples: list[Sample]) -> Iterator[Check]:
    """All samples as padded rows of one batch against each alone: padding on either side and batch mates change nothing.

    Continued by a token from the state after the padded rows, too: a time step at padding decays what was kept.
    """
    alone, bound = _alone(model, samples), BOUNDS[model.dtype]
    for side in ("left", "right"):
        batch = padded(samples, side, extra=7)
        mask = batch["attention_mask"].bool()
        logits = model(**batch, use_cache=False).logits
        values = [worst_position(logits[index, mask[index]], expected) for index, expected in enumerate(alone)]
        yield measured(f"{side} padding and batch mates change nothing", max(values), bound)
    shorter = [replace(sample, input_ids=sample.input_ids[:, :-1]) for sample in samples]
    for side in ("left", "right"):
        state = model(**padded(shorter, side, extra=7), use_cache=True).past_key_values
        last = torch.cat([sample.input_ids[:, -1:] for sample in samples])
        logits = model(input_ids=last, past_key_values=state, use_cache=True).logits[:, -1]
        value = worst_position(logits, torch.stack([expected[-1] for expected in alone]))
        yield measured(f"a state kept after {side} padding goes on", value, bound)
