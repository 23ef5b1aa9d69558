"""Everything a run needs before its first step: model, data, optimizer, engine, and the place it goes on from.

Order matters: what is decided (start, parts, costs) is decided while the model is whole, before ZeRO-3 hands its weights out to ranks.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from train_vlm.accounts import source_names
from train_vlm.adapters import put_on_adapters
from train_vlm.batching import MicroBatchPositions, pack
from train_vlm.checkpointing import load_checkpoint, reshaped
from train_vlm.dealing import Dealt, fitting_micro_batches, predict
from train_vlm.encoder_checkpointing import checkpoint_encoder
from train_vlm.engine_start import keeps_float32, start_engine
from train_vlm.flops import FlopCosts, count_costs
from train_vlm.fp8_guard import Fp8Guard, start_fp8
from train_vlm.freezing import apply_parts, make_optimizer, parameter_groups, parts_table, rate_name
from train_vlm.kept_precision import widen_kept
from train_vlm.ledger import Ledger
from train_vlm.perplexity import text_windows
from train_vlm.ranks import on_first_rank, trains_on_gpu
from train_vlm.reading import SampleStream
from train_vlm.reading_processes import reader_settings
from train_vlm.recipe import Recipe
from train_vlm.resuming import Standing, Start, look_for_start
from train_vlm.run_identity import describe_run
from vision_encoders.shared_statistics import share_statistics, trained_batch_norms
from vlm.checkpoint import load_model
from vlm.lora import AdapterWatch
from vlm.processing import VLMProcessor

__all__ = ["Prepared", "fitted_steps", "prepare", "sample_costs"]

FITTED_SAMPLES = 2_000_000  # whose packs are looked at for data.pack_tokens: some 15 seconds; the loop tells of a later one that is longer


@dataclass
class Prepared:
    """engine: DeepSpeed's, around the model; optimizer: its groups are what rates are set on; calendars: (name, peak rate, warm-up) of each
    group; heldout: the stream of held-out samples; described: what makes this run this run; standing and ledger: where it goes on;
    recipe: with the micro-batches that its packs need; batch_norms: how many layers of the encoder normalise by their batch; dealt: how
    even the ranks' work will be; watch: adapters waiting for a gradient; fp8: the guard of the decoder's FP8 layers; random_states: those
    of the checkpoint, to be set right before the first step; text: windows of data.heldout_text."""

    recipe: Recipe
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
    batch_norms: int
    dealt: Dealt
    watch: AdapterWatch | None
    fp8: Fp8Guard | None
    random_states: dict | None
    text: list[dict]

    def batches(self):
        """This rank's packs, from the step on at which the run stands."""
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        filler, tile_size = self.processor.renderer.end_of_turn_id, self.processor.image_processor.tile_size
        data = self.recipe.data
        cost, tokens = sample_costs(self.stream, self.costs)
        places = MicroBatchPositions(
            data.batch_samples, data.micro_batches, rank, ranks, self.standing.step, cost=cost, tokens=tokens,
            pack_tokens=data.pack_tokens, rank_blind=self.batch_norms > 0,
        )  # fmt: skip
        return iter(DataLoader(
            self.stream,
            batch_sampler=places,
            **reader_settings(data.workers),
            collate_fn=lambda samples: pack(samples, filler, tile_size),
            prefetch_factor=4 if data.workers else None,
            generator=torch.Generator().manual_seed(self.recipe.run.seed),  # or opening it draws a number that steps would get
        ))  # fmt: skip


def sample_costs(stream: SampleStream, costs: FlopCosts) -> tuple[Callable[[int], float], Callable[[int], int]]:
    """(operations, tokens) of the sample at a position, from the shards' indexes."""
    return lambda position: costs.step([stream.expected(position)]), lambda position: stream.expected(position)["tokens"]


def fitted_steps(recipe: Recipe) -> int:
    """How many steps' packs are made to fit before a run begins: all of them, or FITTED_SAMPLES' worth of a longer run."""
    most = FITTED_SAMPLES // recipe.data.batch_samples
    return most if recipe.run.steps is None else min(recipe.run.steps, most)


def _fitted(recipe: Recipe, stream: SampleStream, costs: FlopCosts, ranks: int, *, rank_blind: bool) -> Recipe:
    """The recipe with as many micro-batches as data.pack_tokens needs."""
    data = recipe.data
    if data.pack_tokens is None:
        return recipe
    cost, tokens = (lru_cache(2 * data.batch_samples)(measure) for measure in sample_costs(stream, costs))  # of the step at hand
    found = fitting_micro_batches(
        data.batch_samples, data.micro_batches, ranks, cost, tokens, pack_tokens=data.pack_tokens, steps=fitted_steps(recipe),
        rank_blind=rank_blind,
    )  # fmt: skip
    return replace(recipe, data=replace(data, micro_batches=found))


def _batch_norms_text(layers: int, ranks: int, micro_batches: int) -> str:
    over = "the tiles of all ranks" if ranks > 1 else "the tiles"
    text = f"vision_encoder: {layers} BatchNorm layers train, over {over} of a micro-batch"
    return text if micro_batches == 1 else f"{text}, {micro_batches} a step: with more or fewer of them losses differ"


def _plan(recipe: Recipe, stream: SampleStream, ranks: int) -> str:
    lines = [
        f"{source.folder}: {source.left_out:,} samples of more tiles than at_most_tiles are not read"
        for source in stream.sources
        if source.left_out
    ]
    data, settings = recipe.data, recipe.run
    trained = {Path(source.shards).resolve() for source in data.sources}
    lines += [f"{source.shards} is held out and trained on: its held-out loss says nothing of new samples"
              for source in data.heldout if Path(source.shards).resolve() in trained]  # fmt: skip
    lines.append(
        f"{sum(map(len, stream.sources)):,} samples in {len(stream.sources)} sources; {data.batch_samples} a step on {ranks} rank(s) in "
        f"{data.micro_batches} pack(s) each, ZeRO {settings.zero_stage}{f' ({settings.offload} offloaded)' if settings.offload else ''}, "
        f"{settings.precision}, {torch.get_num_threads()} thread(s) a rank"
    )
    return "\n".join(lines)


def prepare(recipe: Recipe) -> Prepared | None:
    """Load, check, print the plan, start the engine, and load a checkpoint when there is one. None: the run is finished already.
    Called between the ranks' meeting (`start_deepspeed`) and the first step, by the only process that writes to `recipe.out`.

    Raises ValueError or FileNotFoundError for inputs that do not fit and for what another recipe left behind.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    recipe.deepspeed_config(ranks)  # whether the batch divides, before a model is read
    torch.manual_seed(recipe.run.seed)
    # Weights that leave for a card, or for the other ranks, are no memory of each rank's: eight times 94 GB of 47 billion parameters.
    leave = trains_on_gpu() or recipe.run.zero_stage == 3
    precision = torch.bfloat16 if recipe.run.precision == "bfloat16" else torch.float32
    model, processor = load_model(recipe.model, dtype=precision, mapped=leave)
    if keeps_float32(recipe):
        widen_kept(model)
    reading = {"seed": recipe.run.seed, "max_tokens": recipe.data.max_tokens}
    stream = SampleStream(recipe.data.sources, processor, **reading)
    heldout = SampleStream(recipe.data.heldout, processor, **reading) if recipe.data.heldout else None
    text = text_windows(recipe.data.heldout_text, processor, recipe.data.max_tokens) if recipe.data.heldout_text else []
    described = on_first_rank(lambda: describe_run(recipe))
    start = on_first_rank(lambda: look_for_start(recipe, described))
    if start.is_finished:
        if rank == 0:
            print(f"{recipe.out} is finished already, by this recipe: nothing to do", flush=True)
        return None
    apply_parts(model, recipe.parts)
    model.gradient_checkpointing = recipe.run.activation_checkpointing
    model.training = True
    reached = put_on_adapters(model, recipe.lora) if recipe.lora else None
    groups, costs = parameter_groups(model, recipe.parts, recipe.optimizer), count_costs(model)
    if recipe.run.encoder_activation_checkpointing:  # costs come first: counted on shapes, without what is made again
        checkpoint_encoder(model.vision_encoder)
    parts = parts_table(model, recipe.parts, groups) + (f"\n{reached}" if reached else "")
    fp8 = start_fp8(model, recipe.fp8, on_gpu=trains_on_gpu())
    parts += f"\n{fp8.report.summary()}" if fp8 else ""
    batch_norms = len(trained_batch_norms(model.vision_encoder))
    recipe = _fitted(recipe, stream, costs, ranks, rank_blind=batch_norms > 0)
    if batch_norms:
        parts += f"\n{_batch_norms_text(batch_norms, ranks, recipe.data.micro_batches)}"
    share_statistics(model.vision_encoder)
    settings = recipe.deepspeed_config(ranks)
    first_step = start.standing.step if start.standing else 0
    dealt = predict(recipe.data.batch_samples, recipe.data.micro_batches, ranks, *(cache(m) for m in sample_costs(stream, costs)),
                    pack_tokens=recipe.data.pack_tokens, rank_blind=batch_norms > 0, first_step=first_step)  # fmt: skip
    if rank == 0:
        print(f"{parts}\n{_plan(recipe, stream, ranks)}\n{dealt.text(ranks)}", flush=True)
    # The optimizer's shards of other ranks than before are laid out anew first.
    needs_layout = start.checkpoint is not None and start.ranks != ranks and recipe.run.zero_stage > 0
    laid_out = on_first_rank(lambda: reshaped(start.checkpoint)) if needs_layout else None
    if needs_layout:
        settings["checkpoint"] = {"load_universal": True}
    optimizer = make_optimizer(groups, recipe.optimizer, offload=bool(recipe.run.offload))
    engine, optimizer = start_engine(model, optimizer, recipe, settings, ranks)
    watch = AdapterWatch(engine.module) if recipe.lora else None
    # Read now: loading a checkpoint may put new groups in the place of these.
    calendars = [(rate_name(group), group["peak_lr"], group["warmup"]) for group in optimizer.param_groups]
    standing, states = Standing(), None
    ledger = Ledger(source_names([Path(source.folder) for source in stream.sources]), [source.never_read() for source in stream.sources])
    if start.checkpoint:
        states = load_checkpoint(engine, start.checkpoint, start.ranks, engine_folder=laid_out)
        standing, ledger = start.standing, ledger.restore(start.ledger)
        standing.starts += 1
        if fp8:
            fp8.restore(standing.fp8_put_back)
        if rank == 0:
            print(f"going on from {start.checkpoint}: step {standing.step}, {standing.spent_seconds:.0f} s of training", flush=True)
    if laid_out:
        torch.distributed.barrier()
        if rank == 0:
            shutil.rmtree(laid_out, ignore_errors=True)
    return Prepared(
        recipe, engine, optimizer, calendars, processor, stream, heldout, costs, described, start, standing, ledger, parts, batch_norms,
        dealt, watch, fp8, states, text,
    )  # fmt: skip
