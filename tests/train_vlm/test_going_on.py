"""Stopped runs of one process that go on: what must be the same then, whatever happened in between."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train_vlm.preparing import FITTED_SAMPLES, fitted_steps
from train_vlm.recipe import load_recipe
from train_vlm.shards import convert
from vlm.assemble import assemble
from vlm.checkpoint import save_model

ROOT = Path(__file__).resolve().parents[2]
SMALL_ENCODER = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
QUIET = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

pytestmark = pytest.mark.timeout(300)  # the first test waits for all runs


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Results of one_rank_scenarios.py, and the folder in which it worked."""
    folder = tmp_path_factory.mktemp("going_on")
    model, processor = assemble("tiny", vision_settings=SMALL_ENCODER, seed=0)
    save_model(model, processor, folder / "model")
    (folder / "images").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 60, 3), dtype=np.uint8)).save(folder / "images" / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a red ball"}]
    convert([{"id": str(n), "image": "a.png", "conversations": turns} for n in range(8)], folder / "images", processor, folder / "shards")
    script = str(Path(__file__).with_name("one_rank_scenarios.py"))
    own = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    meeting = {"MASTER_PORT": "0"}  # one process: any free port
    done = subprocess.run([sys.executable, script, str(folder / "shards"), str(folder / "model"), str(folder)],
                          env=own | QUIET | meeting, cwd=ROOT, capture_output=True, text=True, timeout=280)  # fmt: skip
    if done.returncode:
        pytest.fail(done.stderr[-3000:], pytrace=False)
    return json.loads((folder / "results.json").read_text()), folder


def test_a_stopped_run_with_dropout_goes_on_to_the_last_bit(seen):
    """Measuring the machine's peak and opening the loader drew numbers after the states had been put back: other masks, other weights."""
    same = seen[0]["dropout"]
    assert same["cut"]
    assert not same["plain"]  # dropout does something here, so the comparison means something


def test_a_run_that_is_asked_to_end_saves_and_goes_on_to_the_last_bit(seen):
    """A scheduler's SIGTERM ended it in the middle of a step, and its readers too: all since the last checkpoint had to be made again."""
    found = seen[0]["asked"]
    assert found["saved"] == [["step-00000001"], ["step-00000001", "step-00000003"]] and found["steps"] == 3
    assert "asked to end (SIGTERM) after step 1, saved in" in found["said"][0] and "(Ctrl-C) after step 3" in found["said"][1]
    assert found["equal"] and found["restored"]


def test_asked_while_it_is_prepared_a_run_ends_before_its_first_step(seen):
    """For minutes of a large model, on every start: the signal killed it, and who starts it again was told of a failure."""
    assert seen[0]["asked"]["said"][4] == "asked to end (SIGTERM) before step 1; the same command goes on from there True"


def test_asked_in_its_last_step_a_run_ends_as_always(seen):
    found = seen[0]["asked"]
    assert found["said"][2] == "" and found["last"]


def test_a_run_without_checkpoints_says_that_nothing_is_saved(seen):
    found = seen[0]["asked"]
    assert "after step 2; nothing is saved, because run.save_every_steps" in found["said"][3] and not found["unsaved"]


def test_measuring_the_peak_changes_no_step(seen):
    """run.peak_teraflops may change between two starts of one run."""
    assert seen[0]["dropout"]["told"]


def test_blocks_computed_again_make_the_same_run(seen):
    """With run.encoder_activation_checkpointing no run started: operations were counted on blocks that had been wrapped already."""
    found = seen[0]["computed_again"]
    assert found["difference"] < 1e-6 and found["operations_equal"]


def test_a_run_has_its_folder_to_itself_and_clears_away_what_dead_ones_left(seen):
    assert seen[0]["lock"] == {"within": True, "after": False, "left": False}


def test_summary_and_report_are_there_before_the_run_counts_as_finished(seen):
    """Killed between the two, the next start said "finished already" and they never came."""
    assert {"log.jsonl", "summary.json", "report.html", "report.md"} <= set(seen[0]["told"])


def test_a_run_without_a_usable_sample_ends_and_claims_no_loss(seen):
    """Its losses of 0 were smoothed as if they were some, and its report ended the run with an error."""
    found = seen[0]["nothing"]
    assert (found["loss"], found["steps"]) == (None, 5) and "5 steps in" in found["said"] and "no loss" in found["said"]


def test_a_source_that_is_held_out_and_trained_on_is_told(seen):
    assert "is held out and trained on: its held-out loss says nothing of new samples" in seen[0]["nothing"]["said"]


def test_a_missing_text_is_told_before_an_engine_starts(seen):
    """After minutes of loading a large model, and of shards, it is too late for a name that is not there."""
    found = seen[0]["nothing"]
    assert "no text at nowhere.txt" in found["error"] and found["engines"] == 0


def test_packs_that_nobody_fitted_are_told_when_they_come(seen):
    """Beyond the steps that are looked at before a run, a pack went over its limit in silence, and the card out of memory."""
    found = seen[0]["long"]
    assert found["told"] == [1, 2, 3, 4, 5] and found["counted"] == 5 and "packs over their limit" in found["report"]


def test_all_steps_of_the_real_recipes_are_fitted():
    """The 8B SFT recipe has 5,197; 5,000 were looked at."""
    recipes = [load_recipe(ROOT / "train_vlm" / "recipes" / f"{name}.yaml") for name in ("8b_sft", "4b_lora")]
    assert all(fitted_steps(recipe) == recipe.run.steps for recipe in recipes)
    assert fitted_steps(replace(recipes[0], run=replace(recipes[0].run, steps=10**6))) * recipes[0].data.batch_samples <= FITTED_SAMPLES
