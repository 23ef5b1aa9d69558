"""One optimizer step: forward and backward passes of this rank's packs, gradients over all ranks, clipping, the update.

The loss of a step is the sum over supervised tokens divided by their number over all ranks and micro-batches, so that 1x4, 2x2 and 4x1
give the same gradient. Every micro-batch calls the vision encoder exactly once on every rank, with a blank tile (times 0) when it has no
image: under ZeRO the ranks' collectives must match. Nothing that is not finite reaches the weights: ZeRO's optimizers skip such an update,
and without ZeRO the norm is looked at first.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from train_vlm.ranks import sum_over_ranks

__all__ = ["NotFiniteError", "StepResult", "forward_inputs", "train_step"]


class NotFiniteError(FloatingPointError):
    """The loss or the gradient of a step is not finite; the weights are those before the step."""


@dataclass(frozen=True)
class StepResult:
    """loss: per supervised token, over all ranks; source_losses (S,) float64: sum over the supervised tokens of each source;
    gradient_norm: before clipping; flags: for each flag of the call, whether any rank raised it; forward_seconds: of this rank's forward
    passes, in which it waits for nobody but under ZeRO-3."""

    loss: float
    source_losses: Tensor
    gradient_norm: float
    flags: tuple[bool, ...]
    forward_seconds: float = 0.0


class _Clock:
    """Time on the device between `start` and `stop`, over all of them; a GPU is asked only at the end, when it is done anyway."""

    def __init__(self, device: torch.device):
        self.is_cuda, self.marks = device.type == "cuda", []

    def _mark(self):
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self.marks.append([self._mark()])

    def stop(self) -> None:
        self.marks[-1].append(self._mark())

    def seconds(self) -> float:
        if self.is_cuda:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(stop) for start, stop in self.marks) / 1000.0
        return sum(stop - start for start, stop in self.marks)


def forward_inputs(batch: dict, processor, device: torch.device, dtype: torch.dtype) -> dict:
    """What the model is called with for a pack; a blank tile stands in when it has no image."""
    pixels = batch["pixels"]
    is_blank = len(pixels) == 0
    if is_blank:
        pixels = torch.zeros(1, *pixels.shape[1:], dtype=pixels.dtype)
    return {
        "input_ids": batch["input_ids"].to(device),
        "labels": batch["labels"].to(device),
        "cu_seq_lens_q": batch["cu_seq_lens_q"],
        "pixel_values": processor.image_processor.normalize_pixels(pixels.to(device)).to(dtype),
        "pixels_are_blank": is_blank,
    }


def losses_by_source(output, batch: dict, sources: int) -> Tensor:
    """(S,) float64: the token losses of a pack, summed by the source of their sample."""
    if not batch["samples"]:
        return torch.zeros(sources, dtype=torch.float64)
    # A token's loss stands where its prediction was made, within its sample.
    sample = torch.bucketize(output.token_places.cpu(), batch["cu_seq_lens_q"][1:], right=True)
    source = torch.tensor([item["source"] for item in batch["samples"]])[sample]
    return torch.zeros(sources, dtype=torch.float64).index_add_(0, source, output.token_losses.detach().double().cpu())


def train_step(
    engine,
    batches: list[dict],
    tokens: int,
    processor,
    *,
    sources: int = 1,
    clip: float = 1.0,
    flags: Callable[[], tuple[bool, ...]] = tuple,
) -> StepResult:
    """One optimizer step over this rank's packed micro-batches.

    `tokens`: supervised tokens of the step over all ranks and micro-batches. `flags`: asked at the end for what this rank wants all ranks
    to hear, as many things on each. Raises NotFiniteError on every rank when loss or gradient is not finite.
    """
    device, ranks = engine.device, torch.distributed.get_world_size()
    dtype = engine.module.vision_encoder.weight_dtype
    said = torch.zeros(sources, dtype=torch.float64)
    norm, clock = None, _Clock(device)
    for number, batch in enumerate(batches, 1):
        inputs = forward_inputs(batch, processor, device, dtype)
        clock.start()
        output = engine(**inputs, num_items_in_batch=max(tokens, 1))
        clock.stop()
        # DeepSpeed divides gradients by ranks and by micro-batches; the sum over tokens is already divided by all of them.
        engine.backward(output.loss * (ranks * len(batches)))
        said += losses_by_source(output, batch, sources)
        if number == len(batches) and not engine.zero_optimization():
            # Without ZeRO the gradients are whole here: one pass gives the norm and clips.
            norm = torch.nn.utils.clip_grad_norm_([p for p in engine.module.parameters() if p.grad is not None], clip).item()
            if not math.isfinite(norm):
                break
        engine.step()
    said = sum_over_ranks(torch.cat([said, torch.tensor(flags(), dtype=torch.float64)]), device)
    if norm is None:
        norm = float(engine.get_global_grad_norm())
    loss = said[:sources].sum().item() / max(tokens, 1)
    if not math.isfinite(loss) or not math.isfinite(norm) or norm < 0:
        raise NotFiniteError(f"the loss is {loss} and the norm of the gradient {norm}")
    return StepResult(loss, said[:sources], norm, tuple((said[sources:] > 0).tolist()), clock.seconds())
