"""What a run tells: one log, also when it is told in several starts; other ranks are silent."""

import json
import sys
from types import ModuleType

import pytest

from train_vlm.run_log import RunLog, cut_log


def test_lines_of_steps_that_are_made_again_are_cut_off(tmp_path):
    """A kill leaves lines beyond the checkpoint, and perhaps half a line."""
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (5, 10, 15)) + '{"step": 2')
    cut_log(path, 10)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5, 10]


def test_a_second_start_goes_on_with_the_log(tmp_path):
    values = {"loss": 1.0, "lr/projector": 0.1}
    for step in (0, 1):
        log = RunLog(tmp_path / "log", 2, "sft", step=step)
        log.advance()
        log.record(step + 1, values)
        log.close({"steps": step + 1})
    assert [json.loads(line)["step"] for line in (tmp_path / "log" / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert json.loads((tmp_path / "log" / "summary.json").read_text()) == {"steps": 2}


def test_closing_twice_keeps_the_first_summary(tmp_path):
    """At the end of a run, and again on the way out of it."""
    log = RunLog(tmp_path / "log", 2, "sft")
    log.close({"steps": 1})
    log.close({"steps": 2})
    assert json.loads((tmp_path / "log" / "summary.json").read_text()) == {"steps": 1}


def test_missing_tensorboard_is_told_with_the_command(tmp_path, monkeypatch):
    """ "No module named 'tensorboard'" came after the model had been loaded and named no package of ours."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ImportError, match=r"needs TensorBoard .*: pip install 'nemotron-h-vision\[train\]'"):
        RunLog(tmp_path / "log", 2, "sft")


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, 10, "sft")
    log.advance()
    log.record(1, {"loss": 1.0, "lr/projector": 0.1})
    log.close({"steps": 1})
    assert not list(tmp_path.iterdir())


def test_wandb_asked_for_and_missing_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        RunLog(tmp_path / "log", 10, "sft", wandb="seeing")


def test_a_run_without_wandb_never_imports_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    RunLog(tmp_path / "log", 10, "sft").close()
    assert not (tmp_path / "log" / "wandb_id").exists()


def test_wandb_hears_what_the_log_hears_and_a_second_start_is_the_same_run(tmp_path, monkeypatch):
    """A new run of its own after every kill would cut the curve into pieces."""
    started, told = [], []

    class Run:
        def log(self, values, step):
            told.append((step, values["loss"]))

        def finish(self):
            told.append("finished")

    def init(**settings):
        started.append(settings)
        return Run()

    fake = ModuleType("wandb")
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step in (0, 1):
        log = RunLog(tmp_path / "model.log", 2, "sft", step=step, wandb="seeing", settings={"run": {"steps": 2}})
        log.record(step + 1, {"loss": 3.0 - step, "lr/projector": 0.1})
        log.close({"steps": step + 1})
    assert told == [(1, 3.0), "finished", (2, 2.0), "finished"]
    assert [settings["project"] for settings in started] == ["seeing"] * 2 and started[0]["name"] == "model"
    assert started[0]["id"] == started[1]["id"] and started[0]["config"] == {"run": {"steps": 2}}
    RunLog(tmp_path / "model.log", 2, "sft", step=0, wandb="seeing").close()
    assert started[2]["id"] != started[0]["id"]  # begun anew
