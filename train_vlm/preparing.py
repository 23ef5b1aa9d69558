"""Everything a run needs before its first step: model, data, optimizer, engine, and the place it goes on from.

Order matters: what is decided (start, parts, costs) is decided while the model is whole, before ZeRO-3 hands its weights out to ranks.
"""

import contextlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from train_vlm.accounts import source_names
from train_vlm.batching import MicroBatchPositions, pack
from train_vlm.checkpointing import load_checkpoint, reshaped
from train_vlm.flops import FlopCosts, count_costs
from train_vlm.freezing import apply_parts, make_optimizer, parameter_groups, parts_table, rate_name
from train_vlm.ledger import Ledger
from train_vlm.ranks import on_first_rank, start_deepspeed
from train_vlm.reading import SampleStream
from train_vlm.recipe import Recipe
from train_vlm.resuming import Standing, Start, look_for_start
from train_vlm.run_identity import describe_run
from vlm.checkpoint import load_model
from vlm.processing import VLMProcessor

__all__ = ["Prepared", "prepare"]


@dataclass
class Prepared:
    """engine: DeepSpeed's, around the model; optimizer: its groups are what rates are set on; calendars: (name, peak rate, warm-up) of each
    group; heldout: the stream of held-out samples; described: what makes this run this run; standing and ledger: where it goes on."""

    engine: object
    optimizer: object
    calendars: list[tuple[str, float, float]]
    processor: VLMProcessor
    stream: SampleStream
    heldout: SampleStream | None
    costs: FlopCosts
    described: dict
    start: Start
    standing: Standing
    ledger: Ledger
    parts: str

    def batches(self, recipe: Recipe):
        """This rank's packs, from the step on at which the run stands."""
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        filler, tile_size = self.processor.renderer.end_of_turn_id, self.processor.image_processor.tile_size
        data = recipe.data
        places = MicroBatchPositions(data.batch_samples, data.micro_batches, rank, ranks, self.standing.step, cost=self.stream.tokens)
        return iter(DataLoader(
            self.stream,
            batch_sampler=places,
            num_workers=data.workers,
            collate_fn=lambda samples: pack(samples, filler, tile_size),
            prefetch_factor=4 if data.workers else None,
        ))  # fmt: skip


def _plan(recipe: Recipe, stream: SampleStream, ranks: int) -> str:
    lines = [
        f"{source.folder}: {source.left_out:,} samples of more tiles than at_most_tiles are not read"
        for source in stream.sources
        if source.left_out
    ]
    lines.append(
        f"{sum(map(len, stream.sources)):,} samples in {len(stream.sources)} sources; {recipe.data.batch_samples} a step on {ranks} "
        f"rank(s), ZeRO {recipe.run.zero_stage}, {recipe.run.precision}, {torch.get_num_threads()} thread(s) a rank"
    )
    return "\n".join(lines)


def prepare(recipe: Recipe) -> Prepared | None:
    """Load, check, print the plan, start the engine, and load a checkpoint when there is one. None: the run is finished already.

    Raises ValueError or FileNotFoundError for inputs that do not fit and for what another recipe left behind.
    """
    deepspeed, rank, ranks, device = start_deepspeed(recipe)
    settings = recipe.deepspeed_config(ranks)
    torch.manual_seed(recipe.run.seed)
    model, processor = load_model(recipe.model, dtype=torch.bfloat16 if recipe.run.precision == "bfloat16" else torch.float32)
    reading = {"seed": recipe.run.seed, "max_tokens": recipe.data.max_tokens}
    stream = SampleStream(recipe.data.sources, processor, **reading)
    heldout = SampleStream(recipe.data.heldout, processor, **reading) if recipe.data.heldout else None
    described = on_first_rank(lambda: describe_run(recipe))
    start = on_first_rank(lambda: look_for_start(recipe, described))
    if start.is_finished:
        if rank == 0:
            print(f"{recipe.out} is finished already, by this recipe: nothing to do", flush=True)
        return None
    apply_parts(model, recipe.parts)
    model.activation_checkpointing = recipe.run.activation_checkpointing
    model.training = True
    groups, costs = parameter_groups(model, recipe.parts, recipe.optimizer), count_costs(model)
    parts = parts_table(model, recipe.parts, groups)
    if rank == 0:
        print(f"{parts}\n{_plan(recipe, stream, ranks)}", flush=True)
    # The optimizer's shards of other ranks than before are laid out anew first.
    needs_layout = start.checkpoint is not None and start.ranks != ranks and recipe.run.zero_stage > 0
    laid_out = on_first_rank(lambda: reshaped(start.checkpoint)) if needs_layout else None
    if needs_layout:
        settings["checkpoint"] = {"load_universal": True}
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints a page about memory for bfloat16
        engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=make_optimizer(groups, recipe.optimizer), config=settings)
    # Read now: loading a checkpoint may put new groups in the place of these.
    calendars = [(rate_name(group), group["peak_lr"], group["warmup"]) for group in optimizer.param_groups]
    standing = Standing()
    ledger = Ledger(source_names([Path(source.folder) for source in stream.sources]), [source.never_read() for source in stream.sources])
    if start.checkpoint:
        load_checkpoint(engine, start.checkpoint, start.ranks, engine_folder=laid_out)
        standing, ledger = start.standing, ledger.restore(start.ledger)
        standing.starts += 1
        if rank == 0:
            print(f"going on from {start.checkpoint}: step {standing.step}, {standing.spent_seconds:.0f} s of training", flush=True)
    if laid_out:
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(laid_out, ignore_errors=True)
    return Prepared(engine, optimizer, calendars, processor, stream, heldout, costs, described, start, standing, ledger, parts)
