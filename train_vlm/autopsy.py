"""A run whose loss or gradient is not finite stops, and says why: samples, tiles, the first module with a bad value, ranges of dt and A.

    python -m train_vlm.autopsy OUT.log/autopsy-step-00000012 [--rank 0]        the same batch again, in one process

Carrying on would average the damage into the weights; skipping the batch would hide it. The weights were not touched by the bad step (see
training_step.py), so that the folder written here - weights, the batch of each rank, the findings - makes the failure again. Adapters stay
beside the weights and products in FP8 are put in again: what overflows only there would be finite in a plain model.
"""

import argparse
import dataclasses
import json
import math
import shlex
import sys
from pathlib import Path

import torch

from train_vlm.adapters import adapter_folder, save_trained
from train_vlm.examination import bad_parameters, watch
from train_vlm.fp8_guard import start_fp8
from train_vlm.fp8_section import Fp8
from train_vlm.freezing import apply_parts
from train_vlm.recipe import Lora, Part, Parts
from train_vlm.training_step import forward_inputs
from vlm.checkpoint import load_model
from vlm.device import default_device
from vlm.files import write_whole
from vlm.lora import load_adapter
from vlm.modeling import VisionLanguageModel
from vlm.processing import VLMProcessor

__all__ = ["examine_batches", "main", "write_autopsy"]

KEPT = ("input_ids", "labels", "cu_seq_lens_q", "pixels", "samples")


def _sample_losses(output, batch: dict) -> list[dict]:
    """Each sample of a pack with its mean loss."""
    sums = torch.zeros(max(len(batch["samples"]), 1), dtype=torch.float64)
    if batch["samples"]:
        places = torch.bucketize(output.token_places.cpu(), batch["cu_seq_lens_q"][1:], right=True)
        sums.index_add_(0, places, output.token_losses.detach().double().cpu())
    rows = []
    for sample, total in zip(batch["samples"], sums.tolist(), strict=False):
        loss = total / max(sample["supervised_tokens"], 1)
        rows.append({**sample, "loss": loss if math.isfinite(loss) else str(loss)})
    return rows


def examine_batches(call, model, batches: list[dict], processor, *, gradients: str | None) -> list[dict]:
    """Run each pack once under `watch`; `call`: the model, or the engine around it. gradients: None, "activations" (weights gather none:
    nothing is sent to other ranks), or "all".

    Returns for each pack {"samples", "loss", "first_forward", "first_gradient", "scan"} and, with all gradients, {"weights", "gradients"}
    that are not finite.
    """
    dtype, device = model.vision_encoder.weight_dtype, getattr(call, "device", None) or next(model.parameters()).device
    found = []
    for batch in batches:
        with watch(model) as findings, torch.set_grad_enabled(gradients is not None):
            output = call(**forward_inputs(batch, processor, device, dtype), num_items_in_batch=max(batch["supervised_tokens"], 1))
            if gradients == "all":
                output.loss.backward()
            elif gradients == "activations":
                torch.autograd.grad(output.loss, findings.outputs, allow_unused=True)
        loss = float(output.loss.detach())
        entry = {"samples": _sample_losses(output, batch), "loss": loss if math.isfinite(loss) else str(loss), **findings.to_dict()}
        found.append(entry | (bad_parameters(model) if gradients == "all" else {}))
    return found


def _first_bad(ranks: list[list[dict]]) -> tuple[int, str]:
    """(rank, module) of the first bad value found, or (0, why there is none)."""
    for kind in ("first_forward", "first_gradient"):
        for rank, entries in enumerate(ranks):
            for entry in entries:
                if entry.get(kind):
                    where = entry[kind]
                    return rank, f"{where['module']} ({where['kind']}, {'output' if kind == 'first_forward' else 'gradient of its output'})"
    return 0, "none between the modules; the replay looks at the gradients of all weights"


def write_autopsy(
    engine,
    processor,
    batches: list[dict],
    folder: Path,
    *,
    parts: Parts,
    step: int,
    why: str,
    weights: dict | None,
    lora: Lora | None = None,
    fp8: Fp8 | None = None,
    put_back: list[str] = (),
) -> str:
    """Every rank calls it after a step that was not finite. `weights`: the full state dict on rank 0; parts, lora, fp8: of the recipe;
    put_back: layers that the FP8 guard put back so far.

    Writes FOLDER/autopsy.json, FOLDER/batch-rank-N.pt, the model folder FOLDER/model and, beside it, its adapters (FOLDER/model.adapter);
    returns what to tell the user.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        # Under ZeRO-3 the backward pass gathers and frees weights by itself; there the replay looks at the gradients.
        is_sharded = engine.zero_optimization_partition_weights()
        call, gradients = (engine, None) if is_sharded else (engine.module, "activations")
        findings = examine_batches(call, engine.module, batches, processor, gradients=gradients)
    except (RuntimeError, ValueError) as error:
        findings = [{"samples": batch["samples"], "failed": str(error)} for batch in batches]
    gathered = [None] * ranks
    torch.distributed.all_gather_object(gathered, findings)
    folder.mkdir(parents=True, exist_ok=True)
    kept = [{name: batch[name] for name in KEPT} | {"supervised_tokens": batch["supervised_tokens"]} for batch in batches]
    torch.save(kept, folder / f"batch-rank-{rank}.pt")
    guilty, module = _first_bad(gathered)
    command = shlex.join([Path(sys.executable).name, "-m", "train_vlm.autopsy", str(folder), "--rank", str(guilty)])
    if rank == 0:
        save_trained(engine.module, processor, folder / "model", weights, merge=False)
        content = {"step": step, "why": why, "first_bad": module, "rank": guilty, "replay": command, "parts": dataclasses.asdict(parts),
                   "lora": lora and dataclasses.asdict(lora), "fp8": fp8 and dataclasses.asdict(fp8), "fp8_put_back": list(put_back),
                   "ranks": gathered}  # fmt: skip
        write_whole(folder / "autopsy.json", json.dumps(content, indent=1))
    torch.distributed.barrier()
    return (
        f"{why} at step {step}; first bad value: {module}, on rank {guilty}; samples and ranges in {folder / 'autopsy.json'}; "
        f"replay: {command}"
    )


def _text(entries: list[dict]) -> str:
    lines = []
    for number, entry in enumerate(entries):
        lines.append(f"micro-batch {number}: loss {entry['loss']}")
        for sample in entry["samples"]:
            lines.append(f"    {sample['id']}: {sample['tiles']} tiles, {sample['tokens']} tokens, "
                         f"{sample['supervised_tokens']} supervised, loss {sample['loss']}")  # fmt: skip
        for kind, words in (("first_forward", "first value that is not finite"), ("first_gradient", "first gradient that is not finite")):
            if where := entry[kind]:
                come = {True: ", its inputs were finite", False: ", its inputs were not finite"}.get(where.get("inputs_finite"), "")
                behind = f", on its way back from {where['before']}" if where.get("before") else ""
                lines.append(
                    f"  {words}: {where['module']} ({where['kind']}): {where['nan']} NaN, {where['infinite']} infinite{come}{behind}"
                )
        for name, ranges in entry["scan"].items():
            lines.append(f"  {name}: dt {ranges['dt']}, A {ranges['A']}")
        for kind in ("weights", "gradients"):
            if entry.get(kind):
                lines.append(f"  {kind} that are not finite: {', '.join(entry[kind][:8])}{' ...' if len(entry[kind]) > 8 else ''}")
        if not entry["first_forward"] and not entry["first_gradient"] and not entry.get("gradients"):
            lines.append("  everything is finite here")
    return "\n".join(lines)


def _as_it_trained(folder: Path) -> tuple[VisionLanguageModel, VLMProcessor]:
    """The model of an autopsy with its frozen parts, adapters and FP8 layers, in the order in which a run puts them on (preparing.py)."""
    model, processor = load_model(folder / "model")
    saved = json.loads((folder / "autopsy.json").read_text(encoding="utf-8"))
    apply_parts(model, Parts(**{name: Part(**value) if isinstance(value, dict) else value for name, value in saved["parts"].items()}))
    if saved.get("lora"):
        load_adapter(model, adapter_folder(folder / "model"))
    if saved.get("fp8") and (guard := start_fp8(model, Fp8(**saved["fp8"]))):
        guard.restore(saved["fp8_put_back"])
    model.training = True
    return model, processor


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train_vlm.autopsy", description="Run the batch of an autopsy again, in one process.")
    parser.add_argument("folder", type=Path, help="OUT.log/autopsy-step-N of a run that stopped")
    parser.add_argument("--rank", type=int, default=0, help="whose batch (default 0)")
    options = parser.parse_args(arguments)
    try:
        path = options.folder / f"batch-rank-{options.rank}.pt"
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path.name} in {options.folder}; expected the folder named by a run that stopped, and one of its ranks"
            )
        model, processor = _as_it_trained(options.folder)
        model.to(default_device())  # a fault of a GPU's kernel is nowhere else
        batches = torch.load(path, weights_only=True)
        print(_text(examine_batches(model, model, batches, processor, gradients="all")))
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"autopsy: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
