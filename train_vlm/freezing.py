"""What trains and what is frozen, in one place that prints it, and the optimizer's parameter groups."""

import torch
from torch import nn

from train_vlm.muon import MuonAdamW, is_muon_matrix
from train_vlm.recipe import Optimizer, Parts

__all__ = ["apply_parts", "make_optimizer", "parameter_groups", "parts_table"]

# Norms, biases, single vectors and the SSM's own parameters are not decayed; neither are embeddings, whose rows are rarely seen.
UNDECAYED = ("A_log", "dt_bias", ".D", "embeddings.weight", "position_embedding", "pos_embed", "cls_token")


def apply_parts(model: nn.Module, parts: Parts) -> None:
    """requires_grad by part; frozen parts go to eval mode (no dropout, no running statistics)."""
    for name in ("vision_encoder", "projector", "language_model"):
        part, trains = getattr(model, name), getattr(parts, name) is not None
        part.requires_grad_(trains)
        part.train(trains)


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not any(name.endswith(ending) or ending in name for ending in UNDECAYED)


def parameter_groups(model: nn.Module, parts: Parts, optimizer: Optimizer) -> list[dict]:
    """Groups of the trainable parameters, one per part, kind of update and decay, each with its peak rate as `peak_lr`."""
    groups = []
    for part in ("vision_encoder", "projector", "language_model"):
        rate = getattr(parts, part)
        if rate is None:
            continue
        chosen: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, parameter in getattr(model, part).named_parameters():
            if parameter.requires_grad:
                is_muon = optimizer.kind == "muon" and is_muon_matrix(name, parameter)
                kind = ("muon" if is_muon else "adamw", is_muon or _is_decayed(f".{name}", parameter))
                chosen.setdefault(kind, []).append(parameter)
        for (kind, is_decayed), parameters in chosen.items():
            peak = rate * (optimizer.muon_rate if kind == "muon" else 1.0)
            decay = optimizer.weight_decay if is_decayed else 0.0
            groups.append({"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay, "part": part, "kind": kind})
    return groups


def parts_table(model: nn.Module, parts: Parts) -> str:
    """A printed table: part, parameters, trainable parameters, peak rate."""
    lines = [f"{'part':<16}{'parameters':>14}{'trainable':>14}  rate"]
    for name in ("vision_encoder", "projector", "language_model"):
        tensors = list(getattr(model, name).parameters())
        rate = getattr(parts, name)
        total, trains = sum(p.numel() for p in tensors), sum(p.numel() for p in tensors if p.requires_grad)
        lines.append(f"{name:<16}{total:>14,}{trains:>14,}  {'frozen' if rate is None else f'{rate:g}'}")
    return "\n".join(lines)


def make_optimizer(groups: list[dict], settings: Optimizer) -> torch.optim.Optimizer:
    """AdamW, or Muon and AdamW, over `parameter_groups`."""
    if settings.kind == "muon":
        return MuonAdamW(groups, betas=(settings.beta1, settings.beta2))
    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=1e-8, foreach=True)
