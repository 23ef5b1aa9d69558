"""What trains and what is frozen, in one place that prints it, and the optimizer's parameter groups.

The parts of the recipe are the model's three children and the end of the encoder (`last_encoder_blocks`: in many towers the last blocks
are what has to move). A group holds what one part trains with one kind of update, one decay and one dtype: ZeRO lays a group's tensors end
to end.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from train_vlm.muon import MuonAdamW, is_muon_matrix
from train_vlm.recipe import Optimizer, Part, Parts

__all__ = ["apply_parts", "encoder_blocks", "make_optimizer", "parameter_groups", "part_modules", "parts_table", "rate_name"]

# Norms, biases, single vectors and the SSM's own parameters are not decayed; neither are embeddings, whose rows are rarely seen, nor what
# vision towers know of places (tables of positions and of distances) and their extra tokens.
UNDECAYED = (
    "A_log", "dt_bias", ".D", "embeddings.weight", "position_embedding", "positional_embedding", "pos_embed", "rel_pos",
    "relative_position", "attention_biases", "cls_token", "class_embedding", "reg_token", "register_token", "mask_token",
)  # fmt: skip


def encoder_blocks(encoder: nn.Module) -> list[nn.Module]:
    """The blocks of a vision encoder, in order: what its lists (ModuleList, Sequential) hold most of, by parameters.

    Transformer layers of a ViT, residual blocks of all stages of a ResNet. Raises ValueError when there is no such list.
    """
    found: dict[type, list[nn.Module]] = {}
    for container in encoder.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            for child in container:
                if not isinstance(child, nn.ModuleList | nn.Sequential) and next(child.parameters(), None) is not None:
                    found.setdefault(type(child), []).append(child)
    sizes = {kind: sum(p.numel() for block in blocks for p in block.parameters()) for kind, blocks in found.items()}
    best = max((kind for kind in found if len(found[kind]) > 1), key=sizes.__getitem__, default=None)
    if best is None:
        raise ValueError(
            "this vision encoder has no list of several blocks, which parts.last_encoder_blocks and run.encoder_activation_checkpointing "
            "need; train it whole, by parts.vision_encoder, and keep its activations"
        )
    return found[best]


def part_modules(model: nn.Module, parts: Parts) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """{part: its named parameters}, every parameter of the model in exactly one part (last_encoder_blocks only when the recipe has it).

    Raises ValueError when the encoder has fewer blocks than asked for.
    """
    result = {name: list(getattr(model, name).named_parameters()) for name in ("vision_encoder", "projector", "language_model")}
    last = parts.trained.get("last_encoder_blocks")
    if last is not None:
        blocks = encoder_blocks(model.vision_encoder)
        if last.blocks > len(blocks):
            raise ValueError(f"parts.last_encoder_blocks.blocks is {last.blocks}; the vision encoder has {len(blocks)}")
        # Registered in order: all from the first chosen block on, so that a norm behind the last block goes along.
        chosen = {id(p) for block in blocks[-last.blocks :] for p in block.parameters()}
        before = {id(p) for block in blocks[: -last.blocks] for p in block.parameters()}
        places = [place for place, (_, p) in enumerate(result["vision_encoder"]) if id(p) in chosen]
        behind = [place for place, (_, p) in enumerate(result["vision_encoder"]) if place >= places[0] and id(p) not in before]
        result["last_encoder_blocks"] = [result["vision_encoder"][place] for place in behind]
        kept = set(behind)
        result["vision_encoder"] = [item for place, item in enumerate(result["vision_encoder"]) if place not in kept]
    return result


def _train_modes(model: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """Every module that has parameters of its own, and whether any of them trains."""
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own:
            yield module, any(p.requires_grad for p in own)


def apply_parts(model: nn.Module, parts: Parts) -> None:
    """requires_grad by part; parts that do not train go to eval mode (no dropout, no running statistics)."""
    for name, parameters in part_modules(model, parts).items():
        for _, parameter in parameters:
            parameter.requires_grad_(name in parts.trained)
    for name in ("vision_encoder", "projector", "language_model"):
        part = getattr(model, name)
        part.train(any(p.requires_grad for p in part.parameters()))
    if "last_encoder_blocks" in parts.trained and "vision_encoder" not in parts.trained:
        # Dropout has no parameters of its own: it follows the block it stands in.
        model.vision_encoder.eval()
        blocks = encoder_blocks(model.vision_encoder)[-parts.trained["last_encoder_blocks"].blocks :]
        for module in blocks + [module for module, trains in _train_modes(model.vision_encoder) if trains]:
            module.train()


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    is_matrix = sum(size > 1 for size in parameter.shape) >= 2
    return is_matrix and not any(piece in name for piece in UNDECAYED)


def parameter_groups(model: nn.Module, parts: Parts, optimizer: Optimizer) -> list[dict]:
    """Groups of the trainable parameters, one per part, kind of update, decay and dtype, each with its peak rate as `peak_lr` and the share
    of all steps with a rising rate as `warmup`."""
    groups = []
    modules = part_modules(model, parts)
    for part, settings in parts.trained.items():
        chosen: dict[tuple, list[nn.Parameter]] = {}
        for name, parameter in modules[part]:
            if parameter.requires_grad:
                is_decayed = _is_decayed(f".{name}", parameter)  # what is not is no map between spaces either
                is_muon = optimizer.kind == "muon" and is_decayed and is_muon_matrix(name, parameter)
                kind = ("muon" if is_muon else "adamw", is_decayed, parameter.dtype)
                chosen.setdefault(kind, []).append(parameter)
        for (kind, is_decayed, _), parameters in chosen.items():
            peak = settings.rate * (optimizer.muon_rate if kind == "muon" else 1.0)
            decay = optimizer.weight_decay if settings.weight_decay is None else settings.weight_decay
            warmup = optimizer.warmup if settings.warmup is None else settings.warmup
            groups.append({"params": parameters, "lr": peak, "peak_lr": peak, "weight_decay": decay if is_decayed else 0.0,
                           "part": part, "kind": kind, "warmup": warmup})  # fmt: skip
    return groups


def rate_name(group: dict) -> str:
    """The key under which a group's rate is logged."""
    return f"lr/{group['part']}" + ("/muon" if group["kind"] == "muon" else "")


def _settings_text(part: str, settings: Part | None, groups: list[dict]) -> str:
    if settings is None:
        return "frozen"
    own = [group for group in groups if group["part"] == part]
    rates = sorted({group["peak_lr"] for group in own}, reverse=True)
    decays = sorted({group["weight_decay"] for group in own}, reverse=True)
    warmups = sorted({group["warmup"] for group in own})
    numbers = [" and ".join(f"{value:g}" for value in values) for values in (rates, decays, warmups)]
    return f"{numbers[0]}, decay {numbers[1]}, warm-up {numbers[2]}"


def parts_table(model: nn.Module, parts: Parts, groups: list[dict] = ()) -> str:
    """A printed table: part, parameters, trainable ones, dtypes, peak rates, decays and warm-up of its groups."""
    lines = [f"{'part':<20}{'parameters':>16}{'trainable':>16}  {'dtype':<20}rate"]
    for name, named in part_modules(model, parts).items():
        total, trains = sum(p.numel() for _, p in named), sum(p.numel() for _, p in named if p.requires_grad)
        dtypes = Counter()
        for _, parameter in named:
            dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
        described = " ".join(dtype for dtype, _ in dtypes.most_common())
        settings = _settings_text(name, parts.trained.get(name), groups)
        lines.append(f"{name:<20}{total:>16,}{trains:>16,}  {described:<20}{settings}")
    return "\n".join(lines)


def make_optimizer(groups: list[dict], settings: Optimizer, *, offload: bool = False) -> torch.optim.Optimizer:
    """AdamW, or Muon and AdamW, over `parameter_groups`. `offload`: the update is made by the processor; beside a GPU by DeepSpeed's AdamW
    for processors, which it builds at its first use (a C++ compiler and ninja)."""
    if offload and torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, betas=(settings.beta1, settings.beta2), eps=1e-8, adamw_mode=True)
    if settings.kind == "muon":
        return MuonAdamW(groups, betas=(settings.beta1, settings.beta2))
    # Fused: one pass over weights, gradients and moments; the other ways make temporary copies as large as the model.
    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=1e-8, fused=True)
