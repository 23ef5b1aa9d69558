"""The training loop: `train` owns the calendar (read, step, tell, look, save); training_step.py is one optimizer step.

DeepSpeed moves the gradients and shards the state. Where a run begins is decided by what its folders hold (resuming.py): the same command
starts it, and goes on with it after a kill at any moment - same samples, same order, same losses to the last bit on as many ranks.
"""

import contextlib
import dataclasses
import os
import statistics
import sys
import time
from collections import deque
from pathlib import Path

import torch
import yaml

from train_vlm.accounts import Accounts, peak_of
from train_vlm.adapters import check_adapters, save_trained
from train_vlm.autopsy import write_autopsy
from train_vlm.checkpointing import save_checkpoint, set_random_states
from train_vlm.ending_together import GRACE_SECONDS
from train_vlm.heldout import heldout_loss, heldout_words
from train_vlm.ledger import COUNTS, count_over_ranks
from train_vlm.leftovers import remove_leftovers
from train_vlm.perplexity import measure_perplexity
from train_vlm.preparing import Prepared, prepare
from train_vlm.progress import Progress, learning_rate_share, share_from_first_rank
from train_vlm.ranks import FailedElsewhereError, on_first_rank, start_deepspeed, sum_over_ranks
from train_vlm.recipe import Recipe
from train_vlm.resuming import SavePlan, checkpoint_content, checkpoints_of, mark_finished
from train_vlm.run_lock import only_one, wait_while_held
from train_vlm.run_log import RunLog, say
from train_vlm.stopping import AskedToStop, StopRequest, stopped_words
from train_vlm.training_report import write_training_report
from train_vlm.training_step import NotFiniteError, train_step

__all__ = ["full_state_dict", "train"]


def full_state_dict(engine, zero_stage: int) -> dict | None:
    """All weights on rank 0 (other ranks take part under ZeRO-3 and get None)."""
    if zero_stage == 3:
        weights, rests = engine._zero3_consolidated_16bit_state_dict(), getattr(engine, "float32_rests", None)
        exact = rests.whole() if rests else {}  # on every rank
        return None if weights is None else {**weights, **exact}
    return engine.module.state_dict()


def _long_packs(micro: list[dict], pack_tokens: int | None, device: torch.device) -> int:
    """How many packs of a step, on all ranks, are longer than `pack_tokens`."""
    if pack_tokens is None:
        return 0
    long = sum(sum(sample["tokens"] for sample in batch["samples"]) > pack_tokens for batch in micro)
    return int(sum_over_ranks(torch.tensor([long]), device))


def train(recipe: Recipe, held: contextlib.ExitStack | None = None) -> Path:
    """Run a recipe from its model folder to its output folder, or go on with it from its last checkpoint. Returns the output folder.

    held: keeps the lock on the output folder, for a caller that has more to end (the ranks' meeting point) before another run may begin.

    Raises ValueError or FileNotFoundError for inputs that do not fit or an output folder that another process is writing to,
    NotFiniteError for a loss or a gradient that is not finite, AskedToStop when it was asked to end and has saved (stopping.py).
    """
    try:
        if not torch.distributed.is_initialized():  # else the ranks have met, and the first may have the folder already
            wait_while_held(recipe.out, GRACE_SECONDS + 5)
    except ValueError as error:
        if os.environ.get("RANK", "0") != "0":
            raise FailedElsewhereError(str(error)) from error
        raise
    start_deepspeed(recipe)
    with contextlib.ExitStack() as own:
        asked = StopRequest()
        own.callback(asked.close)
        on_first_rank(lambda: (held or own).enter_context(only_one(recipe.out)) or remove_leftovers(recipe.out))
        asked.listen()
        if run := prepare(recipe):
            _train(run, asked)
    return Path(recipe.out)


def _train(run: Prepared, asked: StopRequest) -> None:
    """The loop, and what comes after it."""
    recipe, out = run.recipe, Path(run.recipe.out)
    engine, at, ledger, device = run.engine, run.standing, run.ledger, run.engine.device
    rank, log_folder = torch.distributed.get_rank(), out.with_name(out.name + ".log")
    peak, peak_source = peak_of(device, recipe.run.precision, recipe.run.peak_teraflops, has_fp8=run.fp8 is not None)
    peak_words = f"{peak / 1e12:.3g} TFLOP/s a rank ({peak_source})"
    accounts, counted_before = Accounts(ledger.names, run.costs, peak, device), ledger.table.clone()
    log = RunLog(
        log_folder if rank == 0 else None, recipe.run.steps, recipe.stage, step=at.step, spent_seconds=at.spent_seconds,
        wandb=recipe.run.wandb, settings=dataclasses.asdict(recipe),
    )  # fmt: skip
    text = run.text
    if text and at.step == 0:
        at.text_perplexity = measure_perplexity(engine, text, run.processor)["perplexity"]
    progress = Progress(recipe.run.steps, recipe.run.minutes, spent=at.spent_seconds,
                        share=lambda seconds: share_from_first_rank(seconds, device))  # fmt: skip
    saving = SavePlan(recipe.run.save_every_steps, recipe.run.save_every_minutes,
                      last_step=at.step if run.start.checkpoint else -1, now=time.monotonic())  # fmt: skip
    times, final, batches = deque(maxlen=1000), {}, run.batches()

    def save() -> None:
        began = time.monotonic()
        at.spent_seconds = progress.spent
        content = checkpoint_content(recipe, run.described, at, ledger.to_dict())
        save_checkpoint(engine, checkpoints_of(out), at.step, content, keep=recipe.run.keep)
        if words := saving.saved(at.step, began, time.monotonic()):
            log.tell(at.step, {"event": "saving", "text": f"step {at.step}: {words}"})
        accounts.pause(saving.cost)

    def look() -> dict:
        began = time.monotonic()
        size = max(1, recipe.data.batch_samples // (torch.distributed.get_world_size() * recipe.data.micro_batches))
        found, account = heldout_loss(engine, run.heldout, run.processor, samples=recipe.data.heldout_samples, pack_samples=size)
        final.update(found | {"heldout": account.to_dict(), "heldout_step": at.step})
        accounts.pause(time.monotonic() - began)
        return found

    def tell_all() -> None:
        at.spent_seconds = progress.spent
        log.close({
            "steps": at.step, "seconds": round(at.spent_seconds, 1), "loss": at.smooth_loss, "starts": at.starts,
            "waiting_for_data_percent": round(100 * at.waiting_seconds / max(at.spent_seconds, 1e-9), 1),
            "median_step_seconds": statistics.median(times) if times else None, "ledger": ledger.to_dict(), "parts": run.parts,
            "dealt": dataclasses.asdict(run.dealt), "long_packs": at.long_packs,
            "fp8": run.fp8.rows() if run.fp8 else None,
            "recipe": yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False), "command": " ".join(sys.argv),
            "peak": peak_words, **final,
        })  # fmt: skip

    # Dropout of the first step here must be that of the same step in a run that was not stopped: nothing may draw from here on.
    if run.random_states is not None:
        set_random_states(run.random_states)
    try:
        asked.is_under_way = True
        if sum_over_ranks(torch.tensor([float(asked.by is not None)]), device) > 0:  # while it was being prepared
            words = f"asked to end ({asked.by or 'on another rank'}) before step {at.step + 1}; the same command goes on from there"
            if rank == 0:
                say(words)
            raise AskedToStop(words, is_saved=True)
        place = progress.position(at.step)
        while place[0] < place[1]:
            # 1. Read.
            begun = time.monotonic()
            micro = [next(batches) for _ in range(recipe.data.micro_batches)]
            waited = time.monotonic() - begun
            tokens = count_over_ranks(ledger, micro, device)
            long_packs = _long_packs(micro, recipe.data.pack_tokens, device)
            ledger.check(recipe.data.max_skipped_percent)
            # 2. Step.
            for group, (_, peak_rate, warmup) in zip(run.optimizer.param_groups, run.calendars, strict=True):
                group["lr"] = peak_rate * learning_rate_share(*place, warmup, recipe.optimizer.final)
            is_due = rank == 0 and saving.is_due(at.step + 1, begun)
            if run.fp8:
                run.fp8.begin(at.step + 1)
            try:
                done = train_step(engine, micro, tokens, run.processor, sources=len(ledger.names), clip=recipe.optimizer.clip,
                                  flags=lambda is_due=is_due: (is_due, asked.by is not None))  # fmt: skip
            except NotFiniteError as error:
                raise NotFiniteError(_autopsy(run, recipe, micro, log_folder, error)) from error
            if run.watch is not None and tokens:
                check_adapters(run.watch)
                run.watch = None
            at.step += 1
            for event in run.fp8.end(at.step, device) if run.fp8 else ():
                log.tell(at.step, event)
                at.fp8_put_back = list(run.fp8.put_back)
            if long_packs:
                at.long_packs += long_packs
                words = (
                    f"step {at.step}: {long_packs} pack(s) longer than data.pack_tokens ({recipe.data.pack_tokens}), {at.long_packs} so far"
                )
                log.tell(at.step, {"event": "long packs", "packs": long_packs, "text": f"{words}; more data.micro_batches shorten them"})
            if tokens:  # a step without a usable sample has no loss
                at.smooth_loss = done.loss if at.smooth_loss is None else 0.95 * at.smooth_loss + 0.05 * done.loss
            at.waiting_seconds += waited
            # Under ZeRO-3 ranks wait for each other's weights within a forward pass: its time says nothing about one of them.
            accounts.add(micro, done.source_losses, waited, 0.0 if recipe.run.zero_stage == 3 else done.forward_seconds)
            times.append(time.monotonic() - begun)
            is_due, is_asked = done.flags
            # 3. Tell, and look at what is not trained on.
            log.set_total(progress.expected_steps(at.step))
            log.advance()
            place = progress.position(at.step)  # asked here, so that the last step of a run in minutes is known as such, too
            is_last = place[0] >= place[1]
            every = recipe.run.heldout_every
            looks = run.heldout is not None and not is_asked and (is_last or (every is not None and at.step % every == 0))
            if at.step % recipe.run.log_every == 0 or is_last or looks:
                line = {"loss": done.loss, "smooth_loss": at.smooth_loss, "supervised_tokens": tokens, "step_seconds": times[-1],
                        "gradient_norm": done.gradient_norm}  # fmt: skip
                line |= accounts.line(counted_before, ledger.table, COUNTS)
                line |= {"mfu_peak": peak_words} if run.fp8 else {}
                line |= {name: group["lr"] for (name, _, _), group in zip(run.calendars, run.optimizer.param_groups, strict=True)}
                counted_before = ledger.table.clone()
                log.record(at.step, line | (look() if looks else {}) | {"stream": ledger.stream})
            # 4. Save, and end when asked to.
            if is_due or (is_asked and saving.is_on):
                save()
            if is_asked and not is_last:
                tell_all()
                asked.needs_no_ranks()
                torch.distributed.barrier()
                words = stopped_words(at.step, checkpoints_of(out) if saving.is_on else None, asked.by)
                if rank == 0:
                    say(words)
                raise AskedToStop(words, is_saved=saving.is_on)
        del batches
        if saving.is_on and saving.last_step != at.step:  # first: what comes now takes minutes of a large model
            save()
        if run.heldout is not None and final.get("heldout_step") != at.step:  # started again behind its last step
            log.record(at.step, look())
        if text:
            after = measure_perplexity(engine, text, run.processor)["perplexity"]
            final |= {"text_perplexity_before": at.text_perplexity, "text_perplexity": after}
        weights = full_state_dict(engine, recipe.run.zero_stage)
        if rank == 0:
            save_trained(engine.module, run.processor, out, weights, merge=recipe.lora is None or recipe.lora.merge)
            tell_all()
            page = write_training_report(log_folder)
            # At last: a start that finds the marker has nothing to do.
            mark_finished(recipe, run.described, at, ledger.to_dict())
        asked.needs_no_ranks()
        torch.distributed.barrier()
    finally:
        asked.needs_no_ranks()  # a launcher ends all when the first one has ended, and this one may have words to write
        tell_all()
        engine.destroy()
    if rank == 0:
        waiting = 100 * at.waiting_seconds / max(at.spent_seconds, 1e-9)
        loss = "no loss" if at.smooth_loss is None else f"loss {at.smooth_loss:.3f}"
        looked = f"{heldout_words(final, final['heldout'])}\n" if run.heldout is not None else ""
        say(
            f"{ledger.text()}\n{looked}{at.step} steps in {at.spent_seconds:.0f} s, {loss}, {waiting:.0f} % waiting for data; "
            f"model at {out}, report at {page}"
        )


def _autopsy(run: Prepared, recipe: Recipe, micro: list[dict], log_folder: Path, error: NotFiniteError) -> str:
    """Write why a step was not finite; what to tell the user."""
    step = run.standing.step + 1
    weights = full_state_dict(run.engine, recipe.run.zero_stage)
    folder = log_folder / f"autopsy-step-{step:08d}"
    return write_autopsy(
        run.engine, run.processor, micro, folder, parts=recipe.parts, step=step, why=str(error), weights=weights, lora=recipe.lora,
        fp8=recipe.fp8, put_back=run.fp8.put_back if run.fp8 else (),
    )  # fmt: skip
