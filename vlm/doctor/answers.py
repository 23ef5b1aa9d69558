"""Checks of answering: kept states against a full recompute, the engine against transformers' generate."""

from collections.abc import Iterator

import torch

from ..engine import Engine, Request
from ..modeling import VisionLanguageModel
from ..processing import VLMProcessor
from .check import BOUNDS, Check, measured, worst_position
from .samples import Sample

__all__ = ["continued", "engine"]

NEW_TOKENS = 8


@torch.no_grad()
def continued(model: VisionLanguageModel, samples: list[Sample]) -> Iterator[Check]:
    """Logits with a kept state, in two halves and token by token, against those without."""
    sample = samples[0]
    embeddings = model.embed(**sample.model_inputs)
    expected = model(inputs_embeds=embeddings, use_cache=False).logits[0]
    for name, pieces in (("in halves", [sample.length // 2]), ("token by token at the end", [sample.length - 6, 1, 1, 1, 1, 1])):
        state, found = None, []
        for piece in embeddings.split([*pieces, sample.length - sum(pieces)], dim=1):
            output = model(inputs_embeds=piece, past_key_values=state, use_cache=True)
            state = output.past_key_values
            found.append(output.logits[0])
        yield measured(f"cached = uncached, {name}", worst_position(torch.cat(found), expected), BOUNDS[model.dtype])


@torch.no_grad()
def _generated(model: VisionLanguageModel, processor: VLMProcessor, samples: list[Sample]) -> tuple[list[str], list[list[float]]]:
    """Greedy texts by transformers' generate, and for each the gaps between the two best words, step by step, relative to the logits."""
    conversations = [[sample.question] for sample in samples]
    batch = processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True, return_dict=True)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items() if tensor.numel()}
    out = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_scores=True)
    ids = out.sequences[:, batch["input_ids"].shape[1] :]
    texts = [processor.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    gaps = []
    for row in range(len(samples)):
        best = [scores[row].float().topk(2).values for scores in out.scores]
        sizes = [scores[row].float()[scores[row].isfinite()].std() for scores in out.scores]
        gaps.append([float((pair[0] - pair[1]) / size) for pair, size in zip(best, sizes, strict=True)])
    return texts, gaps


def engine(model: VisionLanguageModel, processor: VLMProcessor, samples: list[Sample]) -> Iterator[Check]:
    """Greedy answers of the engine (batched), of generate with left padding (batched), and of generate one by one.

    Two ways may part where the two best words are nearer than rounding; anything else is a fault.
    """
    requests = [Request([sample.question], max_new_tokens=NEW_TOKENS) for sample in samples]
    answers = Engine(model, processor).generate(requests)
    errors = [answer.error for answer in answers if answer.error]
    if errors:
        yield Check("engine = generate", f"the engine refused: {errors[0]}", False)
        return
    single = [_generated(model, processor, [sample]) for sample in samples]
    texts, gaps = [text for (text,), _ in single], [gap for _, (gap,) in single]
    for name, others in (
        ("engine = generate, greedy", [answer.text for answer in answers]),
        ("generate batched = one by one", _generated(model, processor, samples)[0]),
    ):
        parted = [index for index, (one, other) in enumerate(zip(texts, others, strict=True)) if one != other]
        near = [index for index in parted if min(gaps[index]) <= BOUNDS[model.dtype]]
        note = f", {len(near)} part at a near-tie" if near else ""
        figure = f"{len(texts) - len(parted)} of {len(texts)} texts equal{note}"
        if len(near) < len(parted):
            index = next(index for index in parted if index not in near)
            figure += f"; expected {texts[index]!r}, found {others[index]!r}"
        yield Check(name, figure, len(near) == len(parted))
