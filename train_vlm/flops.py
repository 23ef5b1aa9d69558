"""How many floating-point operations a training step needs, counted from shapes: what the MFU divides.

Only work that the model asks for is counted, once: no padding, no activation made again, no tile that stands in for a missing image; the
scan as the recurrence it computes, however an implementation chunks it; attention below the diagonal. A multiplication and an addition
count one each. A matrix that trains costs a forward pass three times over, one that only passes gradients on twice, one behind which
nothing trains once. Elementwise work (norms, activations) is left out, as in every published MFU. The encoder, of which there are many
kinds, is run once on shapes alone under torch's FLOP counter. Tests hold matrices, encoder, head, attention (of all pairs; below the
diagonal are (T + 1) / 2 T of them) and the products of the recurrence against that counter on a small model. It sees products alone: what
the recurrence multiplies one by one (the decay of the state, dt and D: 1/5 of the scan and a little) is counted by hand.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vlm.decoder.attention import HybridAttention
from vlm.decoder.mixer import Mamba2Mixer
from vlm.modeling import VisionLanguageModel

__all__ = ["FlopCosts", "KNOWN_DEVICES", "count_costs", "known_peak", "measure_peak", "scan_flops"]

# Dense peak of one device for bfloat16 products, and for float32 ones without TF32, in FLOP per second, by words of its name.
KNOWN_DEVICES = {
    "B200": (2.25e15, 7.5e13), "GB200": (2.5e15, 8.0e13), "H200": (9.89e14, 6.7e13), "GH200": (9.89e14, 6.7e13),
    "H100": (9.89e14, 6.7e13), "H100 PCIe": (7.56e14, 5.1e13), "H100 NVL": (8.35e14, 6.0e13),
    "A100": (3.12e14, 1.95e13), "L40S": (3.62e14, 9.16e13), "L4": (1.21e14, 3.03e13), "A10": (1.25e14, 3.12e13),
    "RTX 4090": (1.65e14, 8.26e13),
}  # fmt: skip


@dataclass(frozen=True)
class FlopCosts:
    """Forward and backward operations. tile: encoder and projector, per tile; token: matrices, convolutions and scan of the decoder, per
    position; pair: attention, per pair of a query and a key it may see; supervised_token: the output head."""

    encoder_tile: float
    projector_tile: float
    matrices_token: float
    scan_token: float
    attention_pair: float
    head_token: float

    def step(self, samples: list[dict]) -> float:
        """Operations of a pack, from its samples' "tokens", "tiles" and "supervised_tokens"."""
        return sum(
            sample["tiles"] * (self.encoder_tile + self.projector_tile)
            + sample["tokens"] * (self.matrices_token + self.scan_token)
            + sample["tokens"] * (sample["tokens"] + 1) / 2 * self.attention_pair
            + sample["supervised_tokens"] * self.head_token
            for sample in samples
        )


def scan_flops(heads: int, width: int, state: int) -> float:
    """Forward operations of the state space recurrence for one position, over all heads (vlm.decoder.ssd.recurrent_scan, line by line).

    The state times its decay (P N), plus w B^T (2 P N), times C and summed (2 P N); w = dt x (P) and D x added (2 P).
    """
    return heads * (5.0 * width * state + 3.0 * width)


def _times(trains: bool, passes_on: bool) -> float:
    """Forward passes' worth of work: itself, the gradient of the weights, the gradient of the input."""
    return 1.0 + trains + passes_on


def _encoder_costs(encoder: nn.Module) -> float:
    """Forward and backward operations for one tile, counted on shapes."""
    tensors = {name: torch.empty_like(p, device="meta").requires_grad_(p.requires_grad) for name, p in encoder.named_parameters()}
    tensors |= {name: torch.empty_like(buffer, device="meta") for name, buffer in encoder.named_buffers()}
    pixels = torch.empty(1, 3, encoder.image_size, encoder.image_size, device="meta", dtype=encoder.weight_dtype)
    with FlopCounterMode(display=False) as counter:
        features = functional_call(encoder, tensors, (pixels,))
        if features.requires_grad:
            features.sum().backward()
    return float(counter.get_total_flops())


def _layers_in_order(model: VisionLanguageModel) -> list[nn.Module]:
    return [block.mixer for block in model.language_model.model.layers]


def count_costs(model: VisionLanguageModel) -> FlopCosts:
    """Costs of a model with its parts frozen as they will train; call it before an engine takes the model apart."""
    encoder, projector, config = model.vision_encoder, model.projector, model.config
    text = config.text_config
    reached = any(p.requires_grad for p in encoder.parameters())  # whether a gradient has to go further back than here
    encoder_tile = _encoder_costs(encoder)

    projector_tile = 0.0
    for module in projector.modules():
        if isinstance(module, nn.Linear):
            projector_tile += 2.0 * config.visual_tokens_per_tile * module.weight.numel() * _times(module.weight.requires_grad, reached)
            reached |= any(p.requires_grad for p in module.parameters())
    reached |= any(p.requires_grad for p in projector.parameters())
    reached |= any(p.requires_grad for p in model.get_input_embeddings().parameters())

    matrices = scan = pair = 0.0
    for mixer in _layers_in_order(model):
        is_mixed = False
        for name, module in mixer.named_modules():
            if not is_mixed and name.split(".")[0] in ("out_proj", "o_proj"):
                # Scan and attention stand before these: here it is known whether a gradient has to go back through them.
                is_mixed, passes = True, 3.0 if reached else 1.0
                if isinstance(mixer, Mamba2Mixer):
                    scan += scan_flops(mixer.num_heads, mixer.head_dim, mixer.ssm_state_size) * passes
                elif isinstance(mixer, HybridAttention):
                    pair += 4.0 * text.num_attention_heads * mixer.head_dim * passes
            share = text.num_experts_per_tok / text.n_routed_experts if name.split(".")[-1] == "experts" else 1.0
            for parameter in module.parameters(recurse=False):
                if parameter.ndim >= 2:  # of a depthwise convolution every weight meets every position once, too
                    matrices += 2.0 * parameter.numel() * share * _times(parameter.requires_grad, reached)
            reached |= any(p.requires_grad for p in module.parameters(recurse=False))
    head = model.get_output_embeddings()
    head_token = 2.0 * head.weight.numel() * _times(head.weight.requires_grad, reached)
    return FlopCosts(encoder_tile, projector_tile, matrices, scan, pair, head_token)


def known_peak(device_name: str, precision: str) -> float | None:
    """FLOP per second of a device by its name, or None. Whole words count, and the longest known ones: an L40 is no L4, an RTX A1000 no
    A100. A slice of a card (MIG) and a card for laptops are not the card."""
    if re.search(r"\b(MIG|Laptop)\b", device_name):
        return None
    pieces = [piece for piece in KNOWN_DEVICES if re.search(rf"(?<!\w){re.escape(piece)}(?!\w)", device_name)]
    if not pieces:
        return None
    return KNOWN_DEVICES[max(pieces, key=len)][0 if precision == "bfloat16" else 1]


def measure_peak(device: torch.device, dtype: torch.dtype, *, size: int | None = None, repeats: int = 4) -> float:
    """FLOP per second of a product of two square matrices of `size`, the best of a few: the ceiling of a device nobody listed.

    On a GPU matrices are large (8192): a small product is over before its start has been paid for, and the MFU would be above 100 %.
    """
    import time

    size = size or (8192 if device.type == "cuda" else 1024)
    generator = torch.Generator(device).manual_seed(0)  # its own: whether a peak is measured must not change what steps draw
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        product = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    del product
    return 2.0 * size**3 / best
