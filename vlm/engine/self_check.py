"""At start: an answer from a forked state must be what reading everything again gives. A kernel or a dtype that breaks it is found here,
not in the answers.
"""

import numpy as np
import torch
from PIL import Image

from ..decoder.layers import run_layers
from ..decoder.layout import Layout
from ..decoder.serving import ServingDecoder
from ..decoder.slots import Common
from ..modeling import VisionLanguageModel
from ..processing import VLMProcessor

__all__ = ["check_forked_answer"]

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2, torch.bfloat16: 0.15, torch.float16: 0.05}  # of the logits' spread


@torch.inference_mode()
def check_forked_answer(model: VisionLanguageModel, processor: VLMProcessor, decoder: ServingDecoder) -> float:
    """Two questions about one small picture: prefix once, forked, read on, one token decoded; against the plain loop over the layers
    without state. Returns the largest difference of logits over their spread (standard deviation); raises RuntimeError when too large.
    """
    size = processor.image_processor.tile_size
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))
    prepared = [
        processor.prepare(
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}], add_generation_prompt=True
        )
        for text in ("What is this?", "How many?")
    ]
    device = decoder.weight.device
    visual = model.encode_tiles(processor.image_processor.normalize_pixels(prepared[0].pixels.to(device)))
    ids = [torch.tensor(each.rendered.input_ids, device=device) for each in prepared]
    prefix = prepared[0].rendered.prefix_tokens

    # 1. The obvious way.
    expected = []
    for row in ids:
        hidden = run_layers(model.language_model, model.embed(row[None], visual_tokens=visual), Layout.rows([len(row)], len(row)))
        expected.append(decoder.logits(hidden[0, -1]))
    expected = torch.stack(expected)

    # 2. The engine's way: all but the last token as a forked prefill, the last one as a decoding step.
    origin, slots = decoder.slots(1, prefix), decoder.slots(2, max(len(row) for row in ids), with_tails=True)
    decoder.prefill(model.embed(ids[0][None, :prefix], visual_tokens=visual)[0], origin, [0], [prefix])
    slots.fork(origin, [0, 0], [0, 1], with_ssm=False)
    rest = [row[prefix:-1] for row in ids]
    common = Common(origin, 0, prefix)
    decoder.prefill(model.embed(torch.cat(rest)[None])[0], slots, [0, 1], [len(row) for row in rest], commons=[common] * 2)
    found = decoder.decode(torch.stack([row[-1] for row in ids]), slots, max(slots.counts[:2]) + 1)

    difference = float(((found - expected).abs().max() / expected.std().clamp_min(1e-12)).nan_to_num(nan=float("inf")))
    limit = TOLERANCE.get(decoder.weight.dtype, 0.15)
    if difference > limit:
        raise RuntimeError(
            f"the self-check failed: after a forked state, logits differ from a full recompute by {difference:.3g} of their spread; "
            f"expected at most {limit} for {decoder.weight.dtype}; run python -m vlm.doctor, or start with self_check=False"
        )
    return difference
