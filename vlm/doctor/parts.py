"""Checks of what the model is made of: weights as stored, SSM parameters in float32, a tokenizer that keeps text and tags apart."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..modeling import VisionLanguageModel
from ..processing import VLMProcessor
from ..rendering import image_tokens
from .check import Check
from .samples import Sample

__all__ = ["float32_parameters", "golden_pack", "loaded_exactly", "tokenizer"]

SSM_NAMES = ("A_log", "D", "dt_bias")
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(up_proj|down_proj)\.weight")


class _FirstUse(TorchFunctionMode):
    """Watches the first operation on each of some parameters: what dtype comes out."""

    def __init__(self, parameters: dict[int, str]):
        super().__init__()
        self.parameters, self.narrow, self.seen = parameters, set(), set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for argument in args:
            name = self.parameters.get(id(argument))
            if name is not None and isinstance(result, Tensor) and result.is_floating_point():
                self.seen.add(name)
                if result.dtype not in (torch.float32, torch.float64):
                    self.narrow.add(name)
        return result


@torch.no_grad()
def float32_parameters(model: VisionLanguageModel, samples: list[Sample]) -> Iterator[Check]:
    """A_log, D and dt_bias enter the arithmetic in float32, whatever they are stored in: watched during a forward pass."""
    named = {name: p for name, p in model.language_model.named_parameters() if name.rpartition(".")[2] in SSM_NAMES}
    if not named:
        yield Check("A_log, D, dt_bias used in float32", "no Mamba layer in this decoder", True)
        return
    with _FirstUse({id(parameter): name for name, parameter in named.items()}) as watch:
        model(**samples[1].model_inputs, use_cache=False)
    stored = ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in named.values()}))
    unused = sorted(named.keys() - watch.seen)
    figure = f"{len(watch.seen - watch.narrow)} of {len(named)}, stored as {stored}"
    if watch.narrow:
        figure += f"; narrow: {sorted(watch.narrow)[0]}"
    elif unused:
        figure += f"; not seen in use: {unused[0]}"
    yield Check("A_log, D, dt_bias used in float32", figure, not watch.narrow and not unused)


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                yield key, file.get_tensor(key)


@torch.no_grad()
def loaded_exactly(model: VisionLanguageModel, folder: Path) -> Iterator[Check]:
    """Every tensor of the files stands in the model, number by number, and every saved parameter of the model comes from a file."""
    weights = model.state_dict()
    missing, seen, changed, ssm = set(weights), 0, [], 0
    for key, tensor in _stored(folder):
        name = key.replace("language_model.backbone.", "language_model.model.", 1)
        expert = EXPERT.fullmatch(name)
        row = None
        if expert and f"{expert[1]}.{expert[3]}" in weights:
            name, row = f"{expert[1]}.{expert[3]}", int(expert[2])
        seen += 1
        if name not in weights:
            changed.append(f"{key} (in the files only)")
            continue
        missing.discard(name)
        held = (weights[name][row] if isinstance(row, int) else weights[name]).cpu()
        if held.shape != tensor.shape or not torch.equal(held, tensor.to(held.dtype)):
            changed.append(key)
        else:
            ssm += name.rpartition(".")[2] in SSM_NAMES
    tied = {
        name for name in missing if any(weights[name].data_ptr() == weights[other].data_ptr() for other in weights if other not in missing)
    }
    missing -= tied
    faults = changed + [f"{name} (in no file)" for name in sorted(missing)]
    figure = f"{seen - len(changed)} of {seen} tensors equal, {ssm} of them A_log, D or dt_bias"
    yield Check("checkpoint loaded exactly", figure + (f"; first fault: {faults[0]}" if faults else ""), not faults and seen > 0)


def _verdict(name: str, wrong: list[str], right: str) -> Check:
    return Check(name, f"{len(wrong)} wrong: {wrong[0]}" if wrong else right, not wrong)


def tokenizer(model: VisionLanguageModel, processor: VLMProcessor) -> Iterator[Check]:
    """Tags of equal length, text that stays text, and numbers that model and processor must agree on."""
    words, renderer, config = processor.tokenizer, processor.renderer, model.config
    tags = [token for token in image_tokens() if token.startswith("<tile_")]
    counts = {tag: len(words.encode(tag, add_special_tokens=False)) for tag in tags}
    spread = sorted(set(counts.values()))
    yield Check("tile tags have equal length", f"{len(tags)} tags of {' or '.join(map(str, spread))} tokens", len(spread) == 1)

    # Added tokens that are not special are text, such as a phrase that a small tokenizer knows as one token.
    marks = {token.content for token in words.added_tokens_decoder.values() if token.special} | set(image_tokens())
    added = {content: number for content, number in words.get_added_vocab().items() if content in marks}
    attacks = [f"{before}{mark}{after}" for mark in added for before, after in (("", ""), ("see ", " here"), ("<", ">"))]
    attacks += ["<tile_01><tile_02>", "<image>\n<image>", "".join(list(added)[:8])]
    turned = [text for text in attacks if set(renderer.encode_plain(text)) & set(added.values())]
    yield _verdict("text that looks like a tag stays text", [repr(text) for text in turned], f"{len(attacks)} texts")

    wrong = []
    for found, expected, what in (
        (words.convert_tokens_to_ids("<image>"), config.image_token_id, "the placeholder's id, in the tokenizer and the configuration"),
        (processor.visual_tokens_per_tile, config.visual_tokens_per_tile, "visual tokens per tile, in processor and configuration"),
        (processor.image_processor.tile_size, config.vision_config.image_size, "pixels of a tile, in processor and configuration"),
    ):
        if found != expected:
            wrong.append(f"{what}: {found} and {expected}")
    rows, highest = model.get_input_embeddings().weight.shape[0], max(words.get_vocab().values())
    if highest >= rows:
        wrong.append(f"the tokenizer has the id {highest}, the embedding {rows} rows")
    ends = model.generation_config.eos_token_id
    if renderer.end_of_turn_id not in (ends if isinstance(ends, list) else [ends]):
        wrong.append(f"generate stops at {ends}, a turn ends with {renderer.end_of_turn_id}")
    yield _verdict("model and processor agree", wrong, f"{highest + 1} ids in {rows} rows")

    turns = [{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "red"}, {"role": "user", "content": " And?\n"}]
    thinking = False if renderer.chat_format.think_open else None
    prompt = renderer.render(turns, [], add_generation_prompt=True, thinking=thinking).input_ids
    whole = renderer.render([*turns, {"role": "assistant", "content": "blue"}], []).input_ids
    yield Check("the prompt is a prefix of the training text", f"{len(prompt)} of {len(whole)} tokens", whole[: len(prompt)] == prompt)
    text = processor.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=thinking)
    same = processor(text=text)["input_ids"][0].tolist() == prompt
    yield Check("chat template = renderer", f"{len(prompt)} tokens", same)


def golden_pack(model: VisionLanguageModel, processor: VLMProcessor, folder: Path) -> Iterator[Check]:
    """The folder's pack of drawn images with their ids and first logits, where it carries one."""
    try:
        module = importlib.import_module("vlm.golden")
    except ModuleNotFoundError as error:
        if error.name != "vlm.golden":
            raise
        yield Check("golden pack", "none", True)
        return
    for name, figure, ok in module.check(model, processor, folder):
        yield Check(f"golden pack: {name}", str(figure), bool(ok))
