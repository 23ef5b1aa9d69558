"""What a model makes of one prompt: samples of its features and visual tokens, and its first logits; and how far two such may lie apart.

Rounding moves them with the dtype, the device and the kernels; distances are relative to the spread of what is compared. Features come
before visual tokens, and those before logits: the first that moved names the part that did it.

Letters: N tiles, P patches, C vision width, V visual tokens, D decoder width, T positions.
"""

import torch
from torch import Tensor

from ..modeling import VisionLanguageModel

__all__ = ["STAGES", "TF32_TOLERANCE", "TOLERANCE", "distance", "operations", "run_stages", "summarize"]

STAGES = ("vision features", "visual tokens", "first logits")
SAMPLES, TOP = 16, 8
# Of the spread: rounding of a deep model (float32 on the same processor: 1e-6). A GPU may compute convolutions of float32 in TF32.
TOLERANCE = {"float64": 1e-6, "float32": 2e-4, "float16": 3e-2, "bfloat16": 0.15}
TF32_TOLERANCE = 2e-3


def operations(model: VisionLanguageModel, tokens: int, tiles: int) -> float:
    """Floating-point operations of a prompt, nearly: two for each weight and position (all experts count, embeddings do not)."""
    counts = model.parameter_counts()
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    vocabulary = model.get_input_embeddings().weight.numel()
    return 2.0 * (counts["vision_encoder"] * patches * tiles + max(counts["language_model"] - 2 * vocabulary, 0) * tokens)


@torch.no_grad()
def run_stages(model: VisionLanguageModel, ids: list[int], pixels: Tensor) -> dict[str, Tensor]:
    """ids (T), pixels (N, 3, H, W) -> flat float64 values of each stage: features (N P C), visual tokens (N V D), logits (vocabulary).

    A plain forward pass without state, in eval mode; the model is left as it was.
    """
    caught = {}
    hooks = [
        module.register_forward_hook(lambda module, given, result, name=name: caught.__setitem__(name, result))
        for name, module in zip(STAGES, (model.vision_encoder, model.projector), strict=False)
    ]
    training = {module: module.training for module in model.modules()}
    device = model.get_input_embeddings().weight.device
    model.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            tokens = torch.tensor([ids], device=device)
            output = model(input_ids=tokens, pixel_values=pixels.to(device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    caught[STAGES[2]] = output.logits[0, -1]
    return {name: caught[name].flatten().double().cpu() for name in STAGES}


def summarize(stages: dict[str, Tensor]) -> dict | None:
    """What is kept of each stage: some values and their places (of logits the largest), the spread; None when one is not finite."""
    if not all(values.isfinite().all() for values in stages.values()):
        return None
    kept = {}
    for name, values in stages.items():
        if name == STAGES[2]:
            places = values.topk(min(TOP, len(values))).indices
        else:
            places = torch.linspace(0, len(values) - 1, min(SAMPLES, len(values))).long()
        kept[name] = {
            "places": places.tolist(),
            "values": [_rounded(value) for value in values[places].tolist()],
            "largest": _rounded(float(values.max())),
            "spread": _rounded(float(values.std())),
            "count": len(values),
        }
    return kept


def _rounded(value: float) -> float:
    return float(f"{value:.8g}")


def distance(expected: dict, values: Tensor) -> float:
    """Largest difference from what was kept of a flat tensor, at the kept places and in its maximum, over the spread; infinite when the
    number of values differs or one is not finite."""
    if len(values) != expected["count"] or not values.isfinite().all():
        return float("inf")
    found = torch.cat([values[torch.tensor(expected["places"])], values.max()[None]])
    kept = torch.tensor([*expected["values"], expected["largest"]], dtype=torch.float64)
    return float((found - kept).abs().max()) / max(expected["spread"], 1e-30)
