"""`--dry-run`: what a recipe would train, whether it fits, and how long it takes, without weights, data or a GPU.

The model stands on the meta device, from its folder's config or from the recipe's `plan.preset`; parameters and operations are counted on
it by the code that trains (freezing.py, flops.py). Memory is counted from parameters (memory_plan.py). Time is the operations of all steps
over what the cards would do at the MFU that the plan assumes: an assumption, not a measurement.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from train_vlm.adapters import put_on_adapters
from train_vlm.dealing import fewest_micro_batches
from train_vlm.flops import KNOWN_DEVICES, FlopCosts, count_costs
from train_vlm.freezing import apply_parts, parameter_groups, parts_table
from train_vlm.memory_plan import CARDS_GB, GIB, cards_that_fit, checkpoint_bytes, memory_rows, moved_bytes
from train_vlm.plan_section import Plan
from train_vlm.reading import SampleStream
from train_vlm.recipe import Recipe, RecipeError
from train_vlm.saved_activations import activation_bytes
from vision_encoders import build_vision_encoder
from vlm.configuration import VisionEncoderConfig, VLMConfig
from vlm.decoder.presets import PRESETS, preset_config
from vlm.modeling import VisionLanguageModel
from vlm.processing import VLMProcessor

__all__ = ["StepWork", "plan_text", "planned_model", "step_work"]

LOOKED_AT = 1000  # samples of existing shards whose mean stands for all
CARDS_A_MACHINE = 8


def planned_model(recipe: Recipe) -> tuple[VisionLanguageModel, str] | None:
    """The model on the meta device, and where its shape comes from; None when there is neither folder nor preset.

    Raises RecipeError for an unknown preset, ValueError for a folder that is no checkpoint or an unknown encoder.
    """
    folder, plan = Path(recipe.model), recipe.plan or Plan()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} is no model checkpoint: config.json missing; expected a folder made by python -m vlm.assemble or a run"
            )
        config = VLMConfig.from_pretrained(folder)
        with torch.device("meta"):
            return VisionLanguageModel(config), f"the config of {folder}"
    if plan.preset is None:
        return None
    if plan.preset not in PRESETS:
        raise RecipeError(f"plan.preset is {plan.preset!r}; expected one of {', '.join(PRESETS)}")
    with torch.device("meta"):
        encoder, text = build_vision_encoder(plan.vision_encoder), preset_config(plan.preset)
        config = VLMConfig(
            vision_config=VisionEncoderConfig(
                encoder=encoder.encoder_settings,
                hidden_size=encoder.hidden_size,
                image_size=encoder.image_size,
                patch_size=encoder.patch_size,
            ),
            text_config=text,
            projector_hidden_size=text.intermediate_size,
            visual_tokens_per_tile=(encoder.image_size // encoder.patch_size // 2) ** 2,
        )
        model = VisionLanguageModel(config, vision_encoder=encoder)
    return model, f"the shapes of {plan.preset} and {plan.vision_encoder} (no folder at {folder} yet)"


@dataclass(frozen=True)
class StepWork:
    """An average sample and a step of `samples` of them: tiles, positions, supervised tokens, operations; `source` says who told."""

    samples: int
    tiles: float
    tokens: float
    supervised_tokens: float
    flops: float
    source: str
    in_all: int | None = None


def step_work(recipe: Recipe, model: VisionLanguageModel, costs: FlopCosts) -> StepWork:
    """From the shards' indexes when model folder and shards are there, else from the plan's assumptions, within data.max_tokens."""
    batch = recipe.data.batch_samples
    if Path(recipe.model).is_dir() and all(Path(source.shards).is_dir() for source in recipe.data.sources):
        processor = VLMProcessor.from_pretrained(recipe.model)
        stream = SampleStream(recipe.data.sources, processor, seed=recipe.run.seed, max_tokens=recipe.data.max_tokens)
        found = [stream.expected(position) for position in range(LOOKED_AT)]
        tiles, tokens, supervised = (sum(entry[key] for entry in found) / LOOKED_AT for key in ("tiles", "tokens", "supervised_tokens"))
        if not tokens:
            raise RecipeError(f"none of the first {LOOKED_AT} samples fits data.max_tokens ({recipe.data.max_tokens}); raise it")
        flops, source = costs.step(found) / LOOKED_AT * batch, f"the first {LOOKED_AT} samples of the shards"
        return StepWork(batch, tiles, tokens, supervised, flops, source, sum(map(len, stream.sources)))
    plan, a_tile = recipe.plan or Plan(), model.config.visual_tokens_per_tile + 1
    tiles = min(plan.tiles, max(0, int((recipe.data.max_tokens - plan.text_tokens) // a_tile)))
    limits = {source.max_tiles for source in recipe.data.sources}
    if None not in limits:
        tiles = min(tiles, max(limit + (limit > 1) for limit in limits))
    tokens = tiles * a_tile + plan.text_tokens
    sample = {"tiles": tiles, "tokens": tokens, "supervised_tokens": plan.supervised_tokens}
    flops = costs.step([sample]) * batch
    return StepWork(batch, tiles, tokens, plan.supervised_tokens, flops, "the plan's assumptions", plan.samples)


def _count(value: float) -> str:
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f} "


def _work_lines(recipe: Recipe, work: StepWork) -> list[str]:
    plan, steps = recipe.plan or Plan(), recipe.run.steps
    if plan.card not in KNOWN_DEVICES:
        raise RecipeError(f"plan.card is {plan.card!r}; expected one of {', '.join(KNOWN_DEVICES)}")
    peak = KNOWN_DEVICES[plan.card][0 if recipe.run.precision == "bfloat16" else 1]
    reached = plan.cards * peak * plan.mfu_percent / 100
    lines = [
        f"a sample: {work.tiles:.1f} tiles, {work.tokens:,.0f} tokens, {work.supervised_tokens:,.0f} supervised ({work.source})",
        f"a step: {work.samples:,} samples, {work.samples * work.tiles:,.0f} tiles, {work.samples * work.tokens:,.0f} tokens, "
        f"{_count(work.flops)}FLOP; {work.flops / reached:,.1f} s on {plan.cards} x {plan.card} at {plan.mfu_percent:g} % MFU",
    ]
    if steps is not None:
        hours = steps * work.flops / reached / 3600
        epochs = f" ({steps * work.samples / work.in_all:.2f} epochs of {work.in_all:,} samples)" if work.in_all else ""
        lines.append(
            f"the run: {steps:,} steps{epochs}, {_count(steps * work.flops)}FLOP; {hours:,.1f} hours, {hours * plan.cards:,.0f} GPU-hours"
        )
    return lines


def _memory_lines(recipe: Recipe, model: VisionLanguageModel, work: StepWork) -> list[str]:
    plan, data = recipe.plan or Plan(), recipe.data
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    width = 2 if recipe.run.precision == "bfloat16" else 4
    packs = data.micro_batches if data.pack_tokens is None else fewest_micro_batches(data.batch_samples, data.micro_batches, plan.cards)
    share = plan.cards * packs
    tokens = data.pack_tokens or max(work.tokens, work.samples * work.tokens / share)
    tiles = tokens / work.tokens * work.tiles
    kept = activation_bytes(model, tokens, tiles, checkpointing=recipe.run.activation_checkpointing,
                            encoder_checkpointing=recipe.run.encoder_activation_checkpointing, bytes_a_number=width)  # fmt: skip
    lean = [part for part, is_lean in (("decoder", recipe.run.activation_checkpointing),
                                       ("encoder", recipe.run.encoder_activation_checkpointing)) if is_lean]  # fmt: skip
    lines = [
        f"GiB of a rank, {plan.cards} ranks; activations estimated for a pack of {tokens:,.0f} tokens and {tiles:.0f} tiles"
        f"{', ' + ' and '.join(lean) + ' blocks: inputs alone' if lean else ''}",
        f"{'':<28}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'gathered':>10}{'card':>9}{'+ activ.':>10}{'host':>9}  fits cards of GB",
    ]
    for row in memory_rows(trained, frozen, plan.cards, precision=recipe.run.precision, kind=recipe.optimizer.kind):
        chosen = "  <- this recipe" if (row.zero_stage, row.offload) == (recipe.run.zero_stage, recipe.run.offload) else ""
        fits = cards_that_fit(row, kept)
        figures = (row.weights, row.gradients, row.optimizer, row.gathered, row.card, row.card + kept, row.host)
        cells = "".join(f"{value / GIB:>{size}.1f}" for value, size in zip(figures, (9, 11, 11, 10, 9, 10, 9), strict=True))
        words = ", ".join(map(str, fits)) if fits else f"none up to {CARDS_GB[-1]}"
        lines.append(f"{row.name:<28}{cells}  {words}{chosen}")
    whole, here = row.whole / GIB, min(plan.cards, CARDS_A_MACHINE)
    lines.append(
        f"at the start the ranks of a machine share the pages of the model's files, {whole:.1f} GiB; what is not {recipe.run.precision} "
        f"there is cast by each rank, {here * whole:.1f} GiB on a machine of {here}"
    )
    saved = checkpoint_bytes(trained, precision=recipe.run.precision, kind=recipe.optimizer.kind) / GIB
    lines.append(f"a checkpoint: {saved:.1f} GiB on disk; up to {recipe.run.keep + 1} at a time: {(recipe.run.keep + 1) * saved:.1f} GiB")
    if recipe.run.zero_stage == 3 and plan.cards > 1:
        moved = moved_bytes(trained, frozen, precision=recipe.run.precision) * packs
        lines.append(
            f"ZeRO 3 moves {moved / 1e9:.0f} GB a rank in a step of {packs} pack(s): {moved / 1e9 / plan.network_gb_s:.1f} s "
            f"at {plan.network_gb_s:g} GB/s; where computing takes less, it waits"
        )
    return lines


def plan_text(recipe: Recipe) -> str:
    """The plan, for a terminal. Raises RecipeError or ValueError for a recipe, preset, card or folder that does not fit."""
    planned = planned_model(recipe)
    if planned is None:
        return f"no plan: there is no model folder at {recipe.model} yet; name its shape by plan.preset ({', '.join(PRESETS)})"
    model, source = planned
    cards = (recipe.plan or Plan()).cards
    recipe.deepspeed_config(cards)
    if recipe.run.precision == "bfloat16":
        model.to(torch.bfloat16)
    apply_parts(model, recipe.parts)
    with torch.device("meta"):
        reached = [put_on_adapters(model, recipe.lora)] if recipe.lora else []
    table = parts_table(model, recipe.parts, parameter_groups(model, recipe.parts, recipe.optimizer))
    work = step_work(recipe, model, count_costs(model))
    blocks = [f"model: {source}", table, *reached, "", *_memory_lines(recipe, model, work), "", *_work_lines(recipe, work)]
    return "\n".join(blocks)
