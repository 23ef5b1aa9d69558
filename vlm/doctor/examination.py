"""All checks on one model, in order, each shielded from the others: a check that breaks down is a failed check, not the end."""

from collections.abc import Iterator
from pathlib import Path

import torch

from ..assemble import assemble
from ..decoder.float32_digits import float32_digits
from ..modeling import VisionLanguageModel
from ..processing import VLMProcessor
from . import answers, operations, parts, separation
from .check import BOUNDS, Check
from .samples import draw_samples

__all__ = ["examine", "small_model"]


def small_model() -> tuple[VisionLanguageModel, VLMProcessor]:
    """The tiny preset with random weights, made so that a leak would show: larger matrices, time steps near 0.2, padding
    that is not silent by itself."""
    model, processor = assemble("tiny")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(2.0)
            elif name.endswith("dt_bias"):
                parameter.add_(3.0)
            elif name.endswith("conv1d.bias"):
                parameter.add_(0.3)
    return model, processor


def examine(model: VisionLanguageModel, processor: VLMProcessor, folder: str | Path | None = None) -> Iterator[Check]:
    """The checks one after the other; `folder` is where the model was loaded from (None: it was made on the spot).

    The model is left as it was. Raises ValueError for a dtype without bounds.
    """
    model.eval()
    device, dtype = model.device, model.dtype
    if dtype not in BOUNDS:
        raise ValueError(f"the model is in {dtype}; the doctor knows {', '.join(map(str, BOUNDS))}")
    config = model.config.text_config
    samples = []

    def prepare() -> Iterator[Check]:
        samples.extend(draw_samples(processor, device))
        tiles, tokens = sum(len(sample.pixels) for sample in samples), sum(sample.length for sample in samples)
        yield Check("samples", f"{len(samples)} conversations, {tiles} tiles, {tokens} tokens", True)

    yield from operations.installed(device)
    checks = [
        ("kernels", lambda: operations.kernels(device)),
        ("chunk_scan", lambda: operations.scan(config, device, dtype)),
        ("convolution", lambda: operations.convolution(config, device, dtype)),
        ("tokenizer", lambda: parts.tokenizer(model, processor)),
        *([("checkpoint", lambda: parts.loaded_exactly(model, Path(folder)))] if folder is not None else []),
        ("samples", prepare),
        ("A_log, D, dt_bias", lambda: parts.float32_parameters(model, samples)),
        ("packing", lambda: separation.packing(model, samples)),
        ("neighbours", lambda: separation.neighbours(model, samples)),
        ("gradients", lambda: separation.gradients(model, samples)),
        ("padding", lambda: separation.padding(model, samples)),
        ("kept states", lambda: answers.continued(model, samples)),
        ("engine", lambda: answers.engine(model, processor, samples)),
        *([("golden pack", lambda: parts.golden_pack(model, processor, Path(folder)))] if folder is not None else []),
    ]
    for name, run in checks:
        found = []
        try:
            with float32_digits():
                found.extend(run())
        except Exception as error:  # whatever breaks in a check is its finding
            reason = (str(error).splitlines() or [""])[0]
            found.append(Check(name, f"{type(error).__name__}: {reason}", False))
        yield from found
