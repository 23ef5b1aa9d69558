"""Time of the decoder's layers in BF16 and in FP8, and the share of the device's peak that BF16 reaches: part of fp8.py, for a GPU.

Forward and backward passes of all blocks over packed sequences: projections, convolutions, scans, attention, norms. No embeddings, output
head or optimizer.
"""

import statistics
import time

import torch
from transformers import NemotronHConfig
from transformers.models.nemotron_h import NemotronHForCausalLM

from train_vlm.flops import known_peak, scan_flops
from vlm.decoder import Layout, run_layers, take_over_mixers
from vlm.fp8 import convert_to_fp8, has_fp8_units

__all__ = ["layer_flops", "measure_layers", "why_not"]


def why_not() -> str | None:
    """Why there is nothing to measure here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if has_fp8_units() else f"{torch.cuda.get_device_name()} has no FP8 units"


def layer_flops(language_model: NemotronHForCausalLM, lengths: list[int]) -> float:
    """Operations of a forward and a backward pass of all blocks, everything trained; counted as train_vlm/flops.py does."""
    config, tokens = language_model.config, sum(lengths)
    total = 0.0
    for block in language_model.model.layers:
        total += 6.0 * tokens * sum(p.numel() for p in block.mixer.parameters() if p.ndim >= 2)
        if hasattr(block.mixer, "A_log"):
            total += 3.0 * tokens * scan_flops(config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        elif hasattr(block.mixer, "q_proj"):
            pairs = sum(length * (length + 1) / 2 for length in lengths)
            total += 3.0 * 4.0 * config.num_attention_heads * config.head_dim * pairs
    return total


def _median_seconds(step, device: torch.device, warmup: int, repeats: int) -> float:
    times = []
    for number in range(warmup + repeats):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= warmup:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure_layers(
    config: NemotronHConfig, lengths: list[int], device: str | torch.device, *, compiled: bool = True, warmup: int = 5, repeats: int = 10
) -> dict:
    """Seconds of a forward and backward pass in BF16, then in FP8 with the same weights, and what follows from them."""
    device = torch.device(device)
    torch.manual_seed(0)
    with device:
        language_model = NemotronHForCausalLM(config).to(torch.bfloat16)
        embeddings = torch.randn(1, sum(lengths), config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    take_over_mixers(language_model)
    layout = Layout.packed(lengths, device)

    def step() -> None:
        language_model.zero_grad(set_to_none=True)
        run_layers(language_model, embeddings, layout).float().square().mean().backward()

    bf16 = _median_seconds(step, device, warmup, repeats)
    report = convert_to_fp8(language_model, compiled=compiled)
    fp8 = _median_seconds(step, device, warmup, repeats)
    flops = layer_flops(language_model, lengths)
    peak = known_peak(torch.cuda.get_device_name(device), "bfloat16") if device.type == "cuda" else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type, "sequences": lengths,
        "parameters": sum(p.numel() for p in language_model.model.layers.parameters()), "bf16_seconds": bf16, "fp8_seconds": fp8,
        "ratio": bf16 / fp8, "teraflop": flops / 1e12, "bf16_teraflops_per_second": flops / bf16 / 1e12,
        "bf16_mfu_percent": None if peak is None else 100.0 * flops / bf16 / peak, "compiled": compiled, "layers": report.summary(),
    }  # fmt: skip
