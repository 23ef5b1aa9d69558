"""--dry-run: the recipes that come along, against figures worked out by hand from their shapes."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train_vlm.flops import count_costs
from train_vlm.freezing import apply_parts
from train_vlm.launching import run_program
from train_vlm.planning import plan_text, planned_model, step_work
from train_vlm.recipe import Plan, load_recipe
from train_vlm.saved_activations import activation_bytes, kept_by_encoder, kept_by_projector
from train_vlm.shards import convert
from vision_encoders import build_vision_encoder

RECIPES = Path(__file__).resolve().parents[2] / "train_vlm" / "recipes"

# Of InternViT-300M: 24 layers of 1,025 positions; attention over all of them; patches of 14 x 14 x 3.
TILE = 24 * (2 * 1025 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 1025**2 * 1024) + 2 * 1024 * 588 * 1024
PROJECTOR = 2 * 4096 + 4096 * 21504 + 21504 + 21504 * 4096 + 4096


@pytest.fixture(scope="module")
def align():
    recipe = load_recipe(RECIPES / "8b_align.yaml")
    model, _ = planned_model(recipe)
    apply_parts(model, recipe.parts)
    return recipe, model


def test_the_8b_has_the_published_parts(align):
    _, model = align
    assert model.parameter_counts() == {"vision_encoder": 304_012_288, "projector": PROJECTOR, "language_model": 8_100_852_736}
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == PROJECTOR


def test_operations_of_a_step_are_those_counted_by_hand(align):
    """13 tiles, 3,401 positions; the frozen decoder passes a gradient on (twice the forward pass), the encoder none (once)."""
    recipe, model = align
    work = step_work(recipe, model, count_costs(model))
    assert (work.tiles, work.tokens) == (13, 13 * 257 + 60)
    mamba = 4096 * (2 * 8192 + 2 * 1024 + 128) + 4 * (8192 + 2048) + 8192 * 4096
    attention = 4096 * (2 * 4096 + 2 * 1024)
    matrices = 24 * mamba + 4 * attention + 24 * 2 * 4096 * 21504
    by_hand = (
        13 * TILE
        + 13 * 256 * 2 * 4096 * 21504 * (2 + 3)  # linear_1: itself and its gradient; linear_2 also hands one on
        + work.tokens * (2 * 2 * matrices + 3 * 24 * 128 * (5 * 64 * 128 + 3 * 64))
        + work.tokens * (work.tokens + 1) / 2 * 3 * 4 * 4 * 32 * 128
        + 20 * 2 * 2 * 131072 * 4096
    )
    assert work.flops == pytest.approx(1024 * by_hand, rel=0.002)


def test_hours_are_operations_over_what_the_cards_do(align):
    """545 steps of 113 PFLOP on 8 H100 (989 TFLOP/s each) at 40 %: 5.4 hours. Twice the cards at half of it take as long."""
    recipe, model = align
    work = step_work(recipe, model, count_costs(model))
    hours = 545 * work.flops / (8 * 989e12 * 0.4) / 3600
    assert hours == pytest.approx(5.4, abs=0.05)
    for cards, mfu, expected in ((8, 40.0, hours), (16, 20.0, hours)):
        text = plan_text(replace(recipe, plan=replace(recipe.plan, cards=cards, mfu_percent=mfu)))
        assert f"{expected:,.1f} hours, {expected * cards:,.0f} GPU-hours" in text


def test_the_encoder_s_activations_are_counted_on_shapes():
    """The same numbers as autograd keeps for a real tile; a frozen encoder keeps none."""
    encoder = build_vision_encoder(
        "internvit", image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2
    )
    assert kept_by_encoder(encoder.requires_grad_(False)) == 0
    encoder.requires_grad_(True)
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        encoder(torch.zeros(1, 3, 32, 32))
    real = sum(t.untyped_storage().nbytes() // 4 for place, t in kept.items() if place not in weights)
    assert kept_by_encoder(encoder) == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize(("encoder_trains", "projector_trains"), [(True, True), (False, True), (True, False), (False, False)])
def test_the_projector_s_activations_are_counted_on_shapes(tiny_model, encoder_trains, projector_trains):
    """The same numbers as autograd keeps for the features of a real tile, whichever of encoder and projector trains."""
    model = copy.deepcopy(tiny_model)
    model.vision_encoder.requires_grad_(encoder_trains)
    model.projector.requires_grad_(projector_trains)
    with torch.no_grad():
        features = model.vision_encoder(torch.zeros(1, 3, model.vision_encoder.image_size, model.vision_encoder.image_size))
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.projector.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        model.projector(features.requires_grad_(encoder_trains))
    real = sum(t.untyped_storage().nbytes() // 4 for place, t in kept.items() if place not in weights)
    assert kept_by_projector(model) == real and (real > 0) == (encoder_trains or projector_trains)
    counted = activation_bytes(model, 100, 3, checkpointing=True, bytes_a_number=2)
    assert counted - activation_bytes(model, 100, 0, checkpointing=True, bytes_a_number=2) == 6 * (
        real + kept_by_encoder(model.vision_encoder)
    )


def test_activation_checkpointing_keeps_block_inputs(align):
    """52 blocks x 16,384 positions x 4,096 numbers x 2 bytes = 6.5 GiB, and one open block on top."""
    _, model = align
    kept = activation_bytes(model, 16384, 0, checkpointing=True, bytes_a_number=2)
    assert kept == 16384 * (52 * 4096 + 3 * 21504) * 2
    assert activation_bytes(model, 16384, 0, checkpointing=False, bytes_a_number=2) > 5 * kept


def test_lora_of_the_4b_fits_a_card_of_24_gb(capsys):
    """Run as a user does, with overrides, without weights, data or DeepSpeed's launcher."""
    recipe = str(RECIPES / "4b_lora.yaml")
    assert run_program("sft", "", ["--recipe", recipe, "--dry-run"]) == 0
    out = capsys.readouterr().out
    # Rank 16 on each matrix of m x n: 16 (m + n).
    mamba = 16 * ((3072 + 2 * 7168 + 2 * 1024 + 112) + (7168 + 3072))
    adapters = 24 * mamba + 4 * 16 * (2 * (3072 + 4096) + 2 * (3072 + 1024)) + 24 * 16 * 2 * (3072 + 12288)
    assert f"{adapters:,}" in out and "LoRA of rank 16 reaches" in out and "  24, 40, 48, 80, 141  <- this recipe" in out
    assert ", decoder blocks: inputs alone\n" in out
    assert "the shapes of 4b and internvit" in out and "10,395 steps (1.00 epochs of 665,298 samples)" in out


MEMORY_GB = {"H100": 80}


@pytest.mark.parametrize("name", ["8b_align", "8b_sft", "4b_lora", "12b-v2_sft"])
def test_a_recipe_fits_the_cards_that_it_plans(name):
    """`fits cards of GB` of the recipe's own row, as the dry run prints it."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    (row,) = [line for line in plan_text(recipe).splitlines() if line.endswith("<- this recipe")]
    fits = row.removesuffix("<- this recipe").strip().rpartition("  ")[2].split(", ")
    assert str(MEMORY_GB[recipe.plan.card]) in fits


def test_the_plan_has_no_packs_without_a_sample():
    """128 samples on 64 cards in four packs each would leave half of them blank; a run makes two, and so it is planned."""
    recipe = load_recipe(RECIPES / "8b_sft.yaml", ["plan.cards=64"])
    (line,) = [line for line in plan_text(recipe).splitlines() if line.startswith("ZeRO 3 moves")]
    assert "in a step of 2 pack(s): 2.1 s at 50 GB/s" in line
    (line,) = [line for line in plan_text(load_recipe(RECIPES / "8b_sft.yaml")).splitlines() if line.startswith("a checkpoint")]
    assert line == "a checkpoint: 111.9 GiB on disk; up to 3 at a time: 335.7 GiB"


def test_the_plan_says_whose_blocks_are_computed_again(align):
    """The encoder has a switch of its own; nobody should take the one for the other."""
    recipe, _ = align
    endings = {(True, True): ", decoder and encoder blocks: inputs alone", (False, True): ", encoder blocks: inputs alone"}
    for (decoder, encoder), expected in (endings | {(False, False): " tiles"}).items():
        switched = replace(recipe.run, activation_checkpointing=decoder, encoder_activation_checkpointing=encoder)
        line = next(line for line in plan_text(replace(recipe, run=switched)).splitlines() if line.startswith("GiB of a rank"))
        assert line.endswith(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.preset=9b", "plan.preset is '9b'; expected one of tiny, 4b, 8b"),
        ("plan.card=H800", "plan.card is 'H800'; expected one of B200"),
        ("plan.vision_encoder=internvitt", "unknown vision encoder 'internvitt'"),
        ("plan.cards=65", "data.batch_samples is 64; expected at least one for each of 65 ranks"),
        ("data.pack_tokens=null", "data.batch_samples is 64; expected a multiple of ranks x micro_batches = 3 x 32"),
        ("plan.mfu_percent=0", "an MFU of 0.0 %; expected"),
        ("plan.tiles=-1", "-1.0 tiles"),
        ("plan.samples=0", "plan.samples is 0"),
        ("lora.targets=[in_prj]", "the LoRA target 'in_prj' matches no linear layer"),
        ("lora.rank=0", "lora has rank 0"),
        ("lora.targets=[]", "lora.targets is empty"),
        ("lora.targets=in_proj", "lora.targets is 'in_proj'; expected a list of layer names"),
        ("parts.language_model=null", "give parts.language_model their learning rate"),
        ("run.offload=gpu", "run.offload is 'gpu'; expected optimizer, all, or null"),
        ("run.offload=all", "run.offload is all with run.zero_stage 1; expected stage 3"),
        ("data.pack_tokens=100", "data.pack_tokens is 100; expected at least data.max_tokens (4096)"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, override, message):
    assert run_program("sft", "", ["--recipe", str(RECIPES / "4b_lora.yaml"), "--dry-run", "plan.cards=3", override]) == 2
    assert message in capsys.readouterr().err


def test_samples_that_are_all_too_long_are_told(capsys, tmp_path, tiny_folder, tiny_processor):
    """Of no tokens at all a division was made."""
    turns = [{"from": "human", "value": "Say something."}, {"from": "gpt", "value": "red"}]
    convert([{"id": "a", "conversations": turns}], tmp_path, tiny_processor, tmp_path / "shards")
    changes = [f"model={tiny_folder}", f"data.sources=[{{shards: {tmp_path / 'shards'}}}]", "data.max_tokens=2", "data.pack_tokens=2"]
    assert run_program("sft", "", ["--recipe", str(RECIPES / "4b_lora.yaml"), "--dry-run", *changes]) == 2
    assert "none of the first 1000 samples fits data.max_tokens (2)" in capsys.readouterr().err


def test_without_folder_and_preset_there_is_no_plan():
    assert "no plan: there is no model folder at" in plan_text(load_recipe(RECIPES / "quickstart_sft.yaml", ["model=/nowhere"]))
    assert Plan().preset is None
