"""Checkpoints are whole or not there: what a kill leaves half written is thrown away, what is damaged is put aside, the newest few stay."""

import json
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from train_vlm.checkpointing import load_checkpoint, newest_checkpoint, random_states, save_checkpoint, set_random_states


class Engine:
    """Stands for DeepSpeed's: one file, written and read where it is told."""

    def __init__(self):
        self.module = torch.nn.BatchNorm1d(2)  # parameters and running statistics
        self.optimizer = torch.optim.AdamW(self.module.parameters(), weight_decay=0.25)

    def save_checkpoint(self, folder, tag, **settings):
        (Path(folder) / tag).mkdir(exist_ok=True)
        torch.save(
            {"module": dict(self.module.named_parameters()), "optimizer": self.optimizer.state_dict()}, Path(folder) / tag / "state.pt"
        )

    def load_checkpoint(self, folder, tag, **settings):
        state = torch.load(Path(folder) / tag / "state.pt", weights_only=False)
        self.module.load_state_dict(state["module"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        return folder, {}


@pytest.fixture
def engine(one_rank):
    return Engine()


def save(engine, folder, *steps, keep=2):
    return [save_checkpoint(engine, folder, step, {"at": step}, keep=keep) for step in steps][-1]


def test_the_newest_few_stay_and_the_newest_is_found(engine, tmp_path):
    save(engine, tmp_path, 2, 4, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000006"]
    found, manifest = newest_checkpoint(tmp_path)
    assert found.name == "step-00000006" and manifest["standing"] == {"at": 6} and manifest["ranks"] == 1


def test_a_half_written_checkpoint_is_thrown_away_and_never_found(engine, tmp_path):
    """The folder a kill leaves has the hidden name; renaming is the last thing done."""
    save(engine, tmp_path, 2)
    (tmp_path / ".step-00000004.partial" / "engine").mkdir(parents=True)
    assert newest_checkpoint(tmp_path)[0].name == "step-00000002"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def damage_bytes(checkpoint):
    path = checkpoint / "engine" / "state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(checkpoint):
    path = checkpoint / "rank-0.pt"
    path.write_bytes(path.read_bytes()[:-7])


def other_format(checkpoint):
    manifest = json.loads((checkpoint / "run.json").read_text())
    (checkpoint / "run.json").write_text(json.dumps(manifest | {"format": 99}))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damage_bytes, "the content of engine/state.pt has changed"),
        (truncate, "rank-0.pt has"),
        (lambda checkpoint: (checkpoint / "rank-0.pt").unlink(), "rank-0.pt is missing"),
        (lambda checkpoint: (checkpoint / "run.json").write_text("{"), "run.json cannot be read"),
        (other_format, "its format is 99"),
    ],
)
def test_a_damaged_newest_checkpoint_is_put_aside_with_its_reason(engine, tmp_path, capsys, spoil, reason):
    """One flipped bit in the optimizer would train on in silence, as another run."""
    spoil(save(engine, tmp_path, 2, 4))
    assert newest_checkpoint(tmp_path)[0].name == "step-00000002"
    assert reason in capsys.readouterr().out and (tmp_path / "step-00000004.damaged").is_dir()
    assert newest_checkpoint(tmp_path)[0].name == "step-00000002"  # asked again: quiet
    assert not capsys.readouterr().out


def test_nothing_whole_is_nothing(engine, tmp_path, capsys):
    truncate(save(engine, tmp_path, 2))
    assert newest_checkpoint(tmp_path) is None and "damaged" in capsys.readouterr().out


def test_a_full_disk_is_told_as_such(engine, tmp_path):
    """What torch raises then is a RuntimeError about positions in a file: a run of days ended with a traceback that names no disk."""
    kept = save(engine, tmp_path, 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as a full disk: a write that comes back short
    try:
        with pytest.raises(OSError, match="checkpoint of step 4 cannot be written to .* GiB are free .*make room, then give the same"):
            save(engine, tmp_path, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest_checkpoint(tmp_path)[0] == kept


def test_what_is_no_full_disk_is_raised_as_it_is(engine, tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise RuntimeError("a collective failed")

    monkeypatch.setattr(engine, "save_checkpoint", refuse)
    with pytest.raises(RuntimeError, match="a collective failed"):
        save(engine, tmp_path, 2)


def test_a_step_saved_again_replaces_itself(engine, tmp_path):
    save(engine, tmp_path, 2)
    with torch.no_grad():
        engine.module.weight.fill_(7.0)
    checkpoint = save(engine, tmp_path, 2)
    assert torch.load(checkpoint / "engine" / "state.pt", weights_only=False)["module"]["weight"][0] == 7.0


def test_weights_running_statistics_and_random_states_come_back(engine, tmp_path):
    """Running statistics are each rank's own, and DeepSpeed saves those of rank 0 only."""
    engine.module(torch.randn(8, 2))
    mean = engine.module.running_mean.clone()
    checkpoint = save(engine, tmp_path, 3)
    drawn = (torch.rand(2), np.random.rand(2), random.random())
    other = Engine()
    set_random_states(load_checkpoint(other, checkpoint, 1))
    assert torch.equal(other.module.running_mean, mean) and torch.equal(other.module.weight, engine.module.weight)
    again = (torch.rand(2), np.random.rand(2), random.random())
    assert torch.equal(drawn[0], again[0]) and np.array_equal(drawn[1], again[1]) and drawn[2] == again[2]


def test_another_number_of_ranks_leaves_random_states_alone(engine, tmp_path):
    checkpoint = save(engine, tmp_path, 3)
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    assert load_checkpoint(Engine(), checkpoint, 2) is None
    assert torch.equal(torch.get_rng_state(), expected)


def test_settings_of_a_group_are_those_of_the_run_after_loading(engine, tmp_path):
    """DeepSpeed's universal format gives every group the weight decay of the first."""
    checkpoint = save(engine, tmp_path, 3)
    other = Engine()
    other.optimizer.param_groups[0]["weight_decay"] = 0.5
    load_checkpoint(other, checkpoint, 1)
    assert other.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_random_states_are_those_of_all_generators():
    before = random_states()
    first = (torch.rand(1).item(), float(np.random.rand()), random.random())
    set_random_states(before)
    assert (torch.rand(1).item(), float(np.random.rand()), random.random()) == first
