"""The training loop: `train` owns the calendar, `train_step` is one optimizer step. DeepSpeed moves the gradients and shards the state.

The loss of a step is the sum over supervised tokens divided by their number over all ranks and micro-batches, so that 1x4, 2x2 and 4x1
give the same gradient. Every micro-batch calls the vision encoder exactly once on every rank, with a blank tile (times 0) when it has no
image: under ZeRO the ranks' collectives must match.
"""

import math
import os
import statistics
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from train_vlm.batching import MicroBatchPositions, pack
from train_vlm.freezing import apply_parts, make_optimizer, parameter_groups, parts_table
from train_vlm.reading import SampleStream
from train_vlm.recipe import Recipe
from train_vlm.run_log import Ledger, RunLog
from vlm.checkpoint import load_model, save_model

__all__ = ["learning_rate_share", "train", "train_step"]

TIMED_FROM, TIMED_TO = 10, 40  # steps whose time sets the number of steps of a run given in minutes


def learning_rate_share(step: int, steps: int, warmup: float, final: float) -> float:
    """The rate at a step (0-based) as a share of the peak: a linear rise, then a cosine down to `final`."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1, steps - rising))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _start_deepspeed(recipe: Recipe):
    """Import and initialise DeepSpeed; returns (deepspeed, rank, world size, local device)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError("training needs DeepSpeed: pip install 'nemotron-h-vision[train]'") from error
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        os.environ.setdefault(name, default)
    if not torch.cuda.is_available():
        # The shared-memory kernel is for inference only, and building it takes most of a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(recipe.run.threads_per_rank or max(1, cores // int(os.environ["WORLD_SIZE"])))
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    return deepspeed, rank, world_size, device


def _sum_over_ranks(value: float, device: torch.device) -> float:
    tensor = torch.tensor(float(value), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return tensor.item()


def train_step(engine, batches: list[dict], processor, world_size: int, device: torch.device) -> tuple[float, int]:
    """One optimizer step over this rank's packed micro-batches.

    Returns the loss per supervised token and their number, over all ranks and micro-batches. Raises FloatingPointError when the loss is
    not finite.
    """
    tokens = int(_sum_over_ranks(sum(batch["supervised_tokens"] for batch in batches), device))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        pixels = batch["pixels"]
        is_blank = len(pixels) == 0
        if is_blank:
            pixels = torch.zeros(1, *pixels.shape[1:], dtype=pixels.dtype)
        output = engine(
            input_ids=batch["input_ids"].to(device),
            labels=batch["labels"].to(device),
            cu_seq_lens_q=batch["cu_seq_lens_q"],
            pixel_values=processor.image_processor.normalize_pixels(pixels).to(device, dtype=next(engine.module.parameters()).dtype),
            pixels_are_blank=is_blank,
            num_items_in_batch=max(tokens, 1),
        )
        # DeepSpeed divides gradients by ranks and by micro-batches; the sum over tokens is already divided by all of them.
        engine.backward(output.loss * (world_size * len(batches)))
        engine.step()
        total += output.loss.detach().double()
    loss = _sum_over_ranks(total.item(), device)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss} at step {engine.global_steps}; lower the learning rate or look at the last samples")
    return loss, tokens


def _accounts_of_all_ranks(micro: list[dict], world_size: int) -> list[dict]:
    """What was read and skipped in this step, everywhere: all ranks then stop together when too much is unusable."""
    accounts = [{name: batch[name] for name in ("seen", "skipped", "tiles_reduced")} for batch in micro]
    if world_size == 1:
        return accounts
    gathered = [None] * world_size
    torch.distributed.all_gather_object(gathered, accounts)
    return [account for part in gathered for account in part]


def _full_state_dict(engine, zero_stage: int) -> dict | None:
    """All weights on rank 0 (other ranks take part under ZeRO-3 and get None)."""
    if zero_stage == 3:
        return engine._zero3_consolidated_16bit_state_dict()
    return engine.module.state_dict()


def train(recipe: Recipe) -> Path:
    """Run a recipe from its model folder to its output folder. Returns the output folder.

    Raises ValueError or FileNotFoundError for inputs that do not fit, FloatingPointError for a loss that is not finite.
    """
    deepspeed, rank, world_size, device = _start_deepspeed(recipe)
    settings = recipe.deepspeed_config(world_size)
    torch.manual_seed(recipe.run.seed)
    model, processor = load_model(recipe.model, dtype=torch.bfloat16 if recipe.run.precision == "bfloat16" else torch.float32)
    apply_parts(model, recipe.parts)
    model.activation_checkpointing = recipe.run.activation_checkpointing
    model.training = True
    stream = SampleStream(recipe.data.sources, processor, seed=recipe.run.seed, max_tokens=recipe.data.max_tokens)
    if rank == 0:
        print(parts_table(model, recipe.parts), flush=True)
        for source in stream.sources:
            if source.left_out:
                print(f"{source.folder}: {source.left_out:,} samples of more tiles than at_most_tiles are not read")
        print(
            f"{sum(map(len, stream.sources)):,} samples in {len(stream.sources)} sources; {recipe.data.batch_samples} a step on "
            f"{world_size} rank(s), ZeRO {recipe.run.zero_stage}, {recipe.run.precision}, {torch.get_num_threads()} thread(s) a rank",
            flush=True,
        )
    groups = parameter_groups(model, recipe.parts, recipe.optimizer)
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=make_optimizer(groups, recipe.optimizer), config=settings)

    filler, tile_size = processor.renderer.end_of_turn_id, processor.image_processor.tile_size
    loader = DataLoader(
        stream,
        batch_sampler=MicroBatchPositions(recipe.data.batch_samples, recipe.data.micro_batches, rank, world_size, cost=stream.tokens),
        num_workers=recipe.data.workers,
        collate_fn=lambda samples: pack(samples, filler, tile_size),
        prefetch_factor=4 if recipe.data.workers else None,
    )
    batches = iter(loader)
    steps = recipe.run.steps
    out = Path(recipe.out)
    log = RunLog(out.with_name(out.name + ".log") if rank == 0 else None, steps, recipe.stage)
    ledger, times, waiting, step, smooth = Ledger(), [], 0.0, 0, None
    peak_rates = [group["peak_lr"] for group in optimizer.param_groups]
    started = time.monotonic()
    try:
        while steps is None or step < steps:
            begun = time.monotonic()
            micro = [next(batches) for _ in range(recipe.data.micro_batches)]
            waiting += time.monotonic() - begun
            for account in _accounts_of_all_ranks(micro, world_size):
                ledger.add(account)
            ledger.check(recipe.data.max_skipped_percent)
            share = learning_rate_share(step, steps or 10**9, recipe.optimizer.warmup, recipe.optimizer.final)
            if steps is None:
                share = (step + 1) / TIMED_TO  # until the number of steps is known: a rise to the peak
            for group, peak in zip(optimizer.param_groups, peak_rates, strict=True):
                group["lr"] = peak * share
            loss, tokens = train_step(engine, micro, processor, world_size, device)
            times.append(time.monotonic() - begun)
            smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
            step += 1
            if steps is None and step == TIMED_TO:
                seconds = statistics.median(times[TIMED_FROM:TIMED_TO])
                steps = max(TIMED_TO, int((recipe.run.minutes * 60.0 - sum(times)) / seconds) + TIMED_TO)
                shared = torch.tensor(steps, device=device)
                torch.distributed.broadcast(shared, 0)
                steps = int(shared)
                log.set_total(steps)
            log.advance()
            if step % recipe.run.log_every == 0 or step == steps:
                rates = {f"lr/{group['part']}": group["lr"] for group in optimizer.param_groups}
                norm = engine.get_global_grad_norm()
                accounts = {"loss": round(loss, 5), "smooth_loss": round(smooth, 5), "supervised_tokens": tokens, "step_seconds": times[-1]}
                if norm is not None:
                    accounts["gradient_norm"] = round(float(norm), 4)
                log.record(step, accounts | rates)
        del batches
        weights = _full_state_dict(engine, recipe.run.zero_stage)
        if rank == 0:
            save_model(engine.module, processor, out, state_dict=weights)
        torch.distributed.barrier()
    finally:
        elapsed = time.monotonic() - started
        log.close({
            "steps": step, "seconds": round(elapsed, 1), "loss": smooth,
            "waiting_for_data_percent": round(100 * waiting / max(elapsed, 1e-9), 1),
            "median_step_seconds": statistics.median(times) if times else None, "ledger": ledger.to_dict(),
        })  # fmt: skip
        engine.destroy()
    if rank == 0:
        print(
            f"{step} steps in {elapsed:.0f} s, loss {smooth:.3f}, {100 * waiting / elapsed:.0f} % waiting for data; model at {out}",
            flush=True,
        )
    return out
