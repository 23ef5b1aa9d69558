"""How a start decides what it is, when a run saves, and that a second start has the optimizer and the clock of the first."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from train_vlm.adapters import adapter_folder
from train_vlm.checkpointing import save_checkpoint
from train_vlm.muon import MuonAdamW
from train_vlm.progress import Progress, learning_rate_share
from train_vlm.recipe import Data, Parts, Recipe, Run, Source
from train_vlm.resuming import SavePlan, Standing, checkpoint_content, checkpoints_of, look_for_start, mark_finished

DESCRIBED = {"run.seed": 0, "model": "abc"}


class Engine:
    """Stands for DeepSpeed's; what it writes is not looked at here."""

    module = torch.nn.Linear(1, 1)

    def save_checkpoint(self, folder, tag, **settings):
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "state").write_bytes(b"state")


@pytest.fixture
def recipe(tmp_path):
    return Recipe("sft", "model", str(tmp_path / "out"), Data((Source("shards"),)), Parts(projector=1e-3), Run(steps=10))


def save(recipe, described=DESCRIBED, **standing):
    content = checkpoint_content(recipe, described, Standing(**standing), {"sources": []})
    return save_checkpoint(Engine(), checkpoints_of(recipe.out), standing["step"], content, keep=2)


def test_an_empty_place_is_a_fresh_start(recipe):
    start = look_for_start(recipe, DESCRIBED)
    assert not start.is_finished and start.checkpoint is None


def test_its_own_checkpoint_is_gone_on_from_with_everything_that_stood_in_it(recipe, one_rank):
    before = {"step": 7, "smooth_loss": 1.5, "spent_seconds": 33.0, "waiting_seconds": 2.0, "starts": 3, "text_perplexity": 12.5}
    path = save(recipe, **before)
    start = look_for_start(recipe, DESCRIBED)
    assert (start.checkpoint, start.ranks) == (path, 1) and start.standing.to_dict().items() >= before.items()


def test_a_finished_model_is_left_alone_and_a_longer_run_goes_on(recipe, one_rank):
    save(recipe, step=10)
    (checkpoints_of(recipe.out).with_name("out")).mkdir()
    mark_finished(recipe, DESCRIBED, Standing(step=10), {})
    assert look_for_start(recipe, DESCRIBED).is_finished
    longer = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, steps=20))
    assert look_for_start(longer, DESCRIBED).standing.step == 10


def test_what_another_recipe_left_is_refused_with_the_key_or_replaced_when_told(recipe, one_rank, capsys):
    save(recipe, {**DESCRIBED, "run.seed": 1}, step=4)
    with pytest.raises(ValueError, match="run.seed was 1, is 0.*run.replace=true"):
        look_for_start(recipe, DESCRIBED)
    told = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, replace=True))
    assert look_for_start(told, DESCRIBED).checkpoint is None
    assert "starting over" in capsys.readouterr().out and not checkpoints_of(recipe.out).exists()


def test_adapters_of_another_recipe_go_with_its_model(recipe, one_rank):
    """After a run with LoRA one without it took its place, and the old OUT.adapter stood beside a model that it does not belong to."""
    save(recipe, {**DESCRIBED, "lora.rank": 4}, step=4)
    adapter = adapter_folder(recipe.out)
    adapter.mkdir()
    told = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, replace=True))
    look_for_start(told, DESCRIBED)
    assert not adapter.exists()


def test_a_checkpoint_beyond_the_recipes_end_is_refused(recipe, one_rank):
    save(recipe, step=8)
    shorter = dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, steps=5))
    with pytest.raises(ValueError, match="past the end"):
        look_for_start(shorter, DESCRIBED)


def test_a_folder_that_is_no_run_is_never_overwritten(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="exists already"):
        look_for_start(recipe, DESCRIBED)


def test_a_run_in_minutes_has_its_clock_and_its_rate_back(recipe, one_rank):
    """Pauses between two starts are no training: 45 of 60 seconds are spent, whenever it goes on; the rate is that of second 45."""
    timed = dataclasses.replace(recipe, run=Run(minutes=1.0))
    save(timed, step=90, spent_seconds=45.0)
    standing = look_for_start(timed, DESCRIBED).standing
    clock = iter((1000.0, 1000.0, 1014.0, 1016.0))  # started days later
    progress = Progress(None, 1.0, spent=standing.spent_seconds, clock=lambda: next(clock))
    assert progress.position(90) == (45.0, 60.0)
    assert learning_rate_share(*progress.position(91), 0.1, 0.2) < 0.21
    assert progress.position(92)[0] > 60.0


def test_checkpoints_by_the_clock_cost_at_most_two_percent():
    """A large model takes a minute to save: once a minute would be half of the run."""
    plan = SavePlan(None, 1.0, last_step=-1, now=0.0)
    assert plan.is_on and not plan.is_due(5, 59.0) and plan.is_due(5, 60.0)
    assert plan.saved(5, 60.0, 63.0) == "a checkpoint takes 3 s: the next comes in 2 min, not 1"
    assert not plan.is_due(6, 63.0 + 149.0) and plan.is_due(6, 63.0 + 150.0)
    assert plan.saved(6, 213.0, 216.0) is None  # told once


def test_checkpoints_by_the_clock_never_become_hours_apart():
    """A job of four hours that saves for five minutes, once in 15,000 s, would get no further from one of its kills to the next."""
    plan = SavePlan(None, 30.0, last_step=-1, now=0.0)
    assert plan.saved(5, 1800.0, 2100.0) == "a checkpoint takes 300 s: the next comes in 120 min, not 30"
    assert not plan.is_due(6, 2100.0 + 7199.0) and plan.is_due(6, 2100.0 + 7200.0)
    assert SavePlan(3, None, last_step=-1, now=0.0).saved(3, 0.0, 1e6) is None


def test_checkpoints_by_steps_and_none_at_all():
    plan = SavePlan(3, None, last_step=-1, now=0.0)
    assert [step for step in range(1, 8) if plan.is_due(step, 1e9)] == [3, 6]
    assert not SavePlan(None, None, last_step=-1, now=0.0).is_on


def test_both_halves_of_muon_go_on_with_their_momentum():
    """Loaded into a fresh optimizer, as after a kill: the next steps are the same to the last bit. AdamW's half could go on with a table of
    states of its own, which is neither saved nor loaded."""

    def made():
        generator = torch.Generator().manual_seed(0)
        matrix, vector = (torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((16, 24), (7,)))
        groups = [{"params": [matrix], "lr": 0.1, "weight_decay": 0.1, "kind": "muon"},
                  {"params": [vector], "lr": 0.1, "weight_decay": 0.0, "kind": "adamw"}]  # fmt: skip
        return (matrix, vector), MuonAdamW(groups)

    def steps(parameters, optimizer, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(100 + number)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    whole, first = made(), made()
    steps(*whole, range(6))
    steps(*first, range(3))
    saved = copy.deepcopy(first[1].state_dict())
    second = made()
    with torch.no_grad():
        for parameter, value in zip(second[0], first[0], strict=True):
            parameter.copy_(value)
    second[1].load_state_dict(saved)
    steps(*second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole[0], second[0], strict=True))
    assert "momentum" in second[1].state[second[0][0]] and "exp_avg" in second[1].state[second[0][1]]
