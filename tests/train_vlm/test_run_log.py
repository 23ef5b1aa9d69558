"""What a run tells: one log, also when it is told in several starts; other ranks are silent."""

import json

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


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, 10, "sft")
    log.advance()
    log.record(1, {"loss": 1.0, "lr/projector": 0.1})
    log.close({"steps": 1})
    assert not list(tmp_path.iterdir())
