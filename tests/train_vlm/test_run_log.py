"""What a run tells: one line a logged step, taken back where steps are made again, and nothing from other ranks."""

import json
import sys
import types

import pytest

from train_vlm.run_log import RunLog, cut_log


def write_steps(folder, steps, **start):
    log = RunLog(folder, 10, "sft", **start)
    for step in steps:
        log.advance()
        log.record(step, {"loss": float(step), "lr/projector": 0.1, "stream": "abc"})
    log.close({"steps": steps[-1]})


def read_steps(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_that_goes_on_takes_back_what_is_made_again(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 4, 5])
    write_steps(tmp_path, [4, 5, 6], step=3, spent_seconds=100.0)
    assert read_steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["seconds"] >= 100.0
    assert json.loads((tmp_path / "summary.json").read_text()) == {"steps": 6}
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 2


def test_a_new_run_begins_anew(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    write_steps(tmp_path, [1])
    assert read_steps(tmp_path) == [1] and len(list((tmp_path / "tensorboard").glob("events*"))) == 1


def test_half_a_line_is_dropped(tmp_path):
    """A kill in the middle of a write; the next line would be glued to it, and no reader could parse the file any more."""
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "lo')
    cut_log(tmp_path / "log.jsonl", 5)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "loss": 2}\n'


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, 10, "sft", wandb="project")
    log.set_total(3)
    log.advance()
    log.record(1, {"loss": 1.0, "lr/projector": 0.1})
    log.close({"steps": 1})
    assert not list(tmp_path.iterdir())


def test_weights_and_biases_hears_the_same_and_knows_the_run_again(tmp_path, monkeypatch):
    """A second start under a new id would be a second run on the page."""
    heard, starts = [], []

    class Run:
        def log(self, values, step):
            heard.append((step, values["loss"]))

        def finish(self):
            heard.append("finished")

    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: starts.append(settings) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write_steps(tmp_path / "a.log", [1, 2], wandb="scenes", settings={"stage": "sft"})
    write_steps(tmp_path / "a.log", [2], wandb="scenes", step=1)
    write_steps(tmp_path / "a.log", [1], wandb="scenes")
    assert heard == [(1, 1.0), (2, 2.0), "finished", (2, 2.0), "finished", (1, 1.0), "finished"]
    assert starts[0]["project"] == "scenes" and starts[0]["name"] == "a" and starts[0]["config"] == {"stage": "sft"}
    assert starts[0]["id"] == starts[1]["id"] != starts[2]["id"] and starts[1]["resume"] == "allow"


def test_missing_weights_and_biases_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="run.wandb needs Weights & Biases: pip install wandb"):
        RunLog(tmp_path, 10, "sft", wandb="scenes")
