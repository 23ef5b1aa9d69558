"""The quickstart's plan, its receipts, and its page from given scores. (The whole story takes a quarter of an hour: `make quickstart`.)"""

import json
import sys

import pytest
from PIL import Image

from train_vlm.quickstart import main, plan
from train_vlm.quickstart_report import TASK_NAMES, collect_scores, print_scores, write_report
from train_vlm.quickstart_steps import Step, run_steps


def write_step(name, path, text, needs=()):
    code = f"import pathlib; p = pathlib.Path({str(path)!r}); p.write_text(p.read_text() + {text!r} if p.exists() else {text!r})"
    return Step(name, ((sys.executable, "-c", code),), (path,), needs)


def test_finished_steps_are_reused_and_a_changed_command_runs_again_with_what_needs_it(tmp_path):
    """A stale result under a changed command would be reported as new."""
    first, second = tmp_path / "first", tmp_path / "second"
    steps = [write_step("one", first, "a"), write_step("two", second, "b", needs=("one",))]
    assert not any(receipt["reused"] for receipt in run_steps(steps, tmp_path).values())
    assert all(receipt["reused"] for receipt in run_steps(steps, tmp_path).values())
    changed = [write_step("one", first, "c"), steps[1]]
    assert not any(receipt["reused"] for receipt in run_steps(changed, tmp_path).values())
    assert (first.read_text(), second.read_text()) == ("ac", "bb")


def test_a_stopped_step_goes_on_and_one_of_another_command_or_recipe_starts_anew(tmp_path):
    """A trainer refuses checkpoints of another recipe: `make quickstart MINUTES=45` behind one of 15 minutes ended there."""
    left, recipe = tmp_path / "model.checkpoints", tmp_path / "recipe.yaml"
    recipe.write_text("steps: 1")
    done = tmp_path / "done"

    def step(code: str) -> Step:
        return Step("train", ((sys.executable, "-c", code, str(recipe)),), (done,), goes_on_from=(left,))

    stopped = (
        f"import pathlib, sys; pathlib.Path({str(left)!r}).mkdir(exist_ok=True); pathlib.Path({str(left)!r}, 'a').touch(); sys.exit(9)"
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match="exit code 9"):
            run_steps([step(stopped)], tmp_path)
    assert (left / "a").exists()
    (left / "b").touch()
    with pytest.raises(RuntimeError, match="exit code 9"):
        run_steps([step(stopped)], tmp_path)
    assert (left / "b").exists()  # the same command goes on
    recipe.write_text("steps: 2")
    with pytest.raises(RuntimeError, match="exit code 9"):
        run_steps([step(stopped)], tmp_path)
    assert (left / "a").exists() and not (left / "b").exists()


def test_a_step_whose_result_is_gone_runs_again(tmp_path):
    steps = [write_step("one", tmp_path / "first", "a")]
    run_steps(steps, tmp_path)
    (tmp_path / "first").unlink()
    assert run_steps(steps, tmp_path)["one"]["reused"] is False


def test_a_failing_step_stops_the_run_and_leaves_no_receipt(tmp_path):
    step = Step("bad", ((sys.executable, "-c", "import sys; sys.exit('no room on the disk')"),) * 2, (tmp_path / "x",))
    with pytest.raises(RuntimeError, match="bad failed with exit code 1(?s:.*)no room on the disk"):
        run_steps([step], tmp_path)
    assert not (tmp_path / "receipts" / "bad.json").exists()


def test_a_step_that_makes_nothing_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="without making"):
        run_steps([Step("empty", ((sys.executable, "-c", ""),), (tmp_path / "x",))], tmp_path)


def test_training_gets_the_minutes_that_the_rest_leaves(tmp_path):
    steps = {step.name: step for step in plan(tmp_path, 15, pictures=100, heldout=10, ranks=2)}
    minutes = [
        float(part.split("=")[1])
        for step in steps.values()
        for command in step.commands
        for part in command
        if part.startswith("run.minutes=")
    ]
    assert len(minutes) == 4 and 10 < sum(minutes) < 13
    known = set()
    for step in steps.values():
        assert set(step.needs) <= known, f"{step.name} needs a later step"
        known.add(step.name)


def test_minutes_of_nothing_are_refused(capsys):
    assert main(["--minutes", "0"]) == 2
    assert "--minutes is 0" in capsys.readouterr().err


@pytest.fixture
def finished(tmp_path):
    """A finished run of two questions a set, one of them right."""
    for task in TASK_NAMES:
        for suffix, right in (("", 100.0), ("-grey", 0.0)):
            folder = tmp_path / "eval" / (task + suffix)
            folder.mkdir(parents=True)
            kinds = {"color": {"accuracy": right, "count": 1}, "count": {"accuracy": 0.0, "count": 1}}
            record = {"scores": {"accuracy": right / 2}, "kinds": kinds, "counts": {"scored": 2}, "per_question": {"1": right, "2": 0.0}}
            (folder / "scores.json").write_text(json.dumps(record))
        kinds = {"color": {"accuracy": 10.0, "count": 1}, "count": {"accuracy": 90.0, "count": 1}}
        majority = {"majority": {"scores": {"accuracy": 45.0}, "kinds": kinds}, "ceiling": 80.0 if task == "vizwiz" else None}
        (tmp_path / "eval" / f"{task}-majority.json").write_text(json.dumps(majority))
    answers = [{"question_id": 1, "answer": "red"}, {"question_id": 2, "answer": "<b>9</b>"}]
    (tmp_path / "eval" / "vqav2" / "submission.json").write_text(json.dumps(answers))
    data = tmp_path / "scenes" / "heldout" / "vqav2"
    (data / "val2014").mkdir(parents=True)
    for number in (1, 2):
        Image.new("RGB", (8, 8), "red").save(data / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    questions = [{"question_id": n, "image_id": n, "question": f"Question {n}?"} for n in (1, 2)]
    (data / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    truths = [{"question_id": n, "multiple_choice_answer": answer} for n, answer in ((1, "red"), (2, "3"))]
    (data / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": truths}))
    (data / "kinds.json").write_text('{"1": "color", "2": "count"}')
    for stage in ("model-captions", "model-align", "model-early", "model"):
        (tmp_path / f"{stage}.log").mkdir()
        (tmp_path / f"{stage}.log" / "log.jsonl").write_text("".join(json.dumps({"step": n, "loss": 5 / n}) + "\n" for n in (1, 2, 3)))
    return tmp_path


def test_the_baseline_is_the_larger_of_grey_and_majority(finished, capsys):
    scores = collect_scores(finished)
    assert scores["vqav2"]["baseline"] == 45.0 and scores["vqav2"]["kinds"]["count"]["baseline"] == 90.0
    assert scores["vizwiz"]["of_ceiling"] == pytest.approx(62.5)
    print_scores(finished)
    assert "62.5 % of its ceiling" in capsys.readouterr().out


def test_the_page_shows_scores_pictures_and_times_and_escapes_answers(finished):
    page = write_report(finished, {"scenes": {"seconds": 12.5, "peak_bytes": 2**30}}, minutes=15)
    text = page.read_text()
    assert "Question 1?" in text and "truth: 3 (count)" in text and "12.5" in text
    assert "<b>9</b>" not in text and "&lt;b&gt;9&lt;/b&gt;" in text
    assert (finished / "report.md").is_file()


@pytest.mark.parametrize("short", [("model-align",), ("model-captions", "model-align", "model-early", "model")])
def test_stages_too_short_for_a_line_in_their_log_do_not_fail_the_page(finished, short):
    """A quickstart of a minute on a busy machine trained, answered everything, and then failed at its last step, for want of a curve."""
    for stage in short:
        (finished / f"{stage}.log" / "log.jsonl").write_text("")
    text = write_report(finished, {"scenes": {"seconds": 12.5, "peak_bytes": 2**30}}, minutes=1).read_text()
    assert ("No stage was long enough" in text) == (len(short) == 4)


def test_ctrl_c_is_one_line_and_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("train_vlm.quickstart.run_steps", interrupted)
    assert main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nquickstart: stopped; the same command goes on from here\n"
