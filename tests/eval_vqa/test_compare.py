"""The comparison of two runs: scores, intervals, flips, and which setting changed."""

import json

import pytest
from scored_runs import TILES, make_data, make_run

from eval_vqa.compare import changed_settings, compare, main
from eval_vqa.json_files import read_json, write_json
from eval_vqa.measured_run import open_run


@pytest.fixture
def runs(tmp_path):
    data = make_data(tmp_path / "data")
    return make_run(tmp_path / "a", data, {0: "blue", 1: "yes", 2: "green"}), make_run(tmp_path / "b", data, {1: "yes", 3: "yes"})


def test_scores_flips_and_intervals(runs):
    result = compare(*map(open_run, runs))
    assert result["overall"] == {"type": "all", "count": 12, "a": pytest.approx(77.5), "b": pytest.approx(1000 / 12),
                                 "difference": pytest.approx(1000 / 12 - 77.5), "low": result["overall"]["low"],
                                 "high": result["overall"]["high"]}  # fmt: skip
    assert result["overall"]["low"] < result["overall"]["difference"] < result["overall"]["high"]
    by_type = {row["type"]: row for row in result["per_type"]["question type"]}
    assert (by_type["what"]["count"], by_type["what"]["b"], by_type["is the"]["b"]) == (6, 100.0, pytest.approx(400 / 6))
    assert list(result["per_type"]) == ["answer type", "question type"]
    assert result["flipped"] == [
        {"id": 0, "a": "blue", "b": "red", "percent_a": 30.0, "percent_b": 100.0},
        {"id": 2, "a": "green", "b": "red", "percent_a": 0.0, "percent_b": 100.0},
        {"id": 3, "a": "no", "b": "yes", "percent_a": 100.0, "percent_b": 0.0},
    ]
    assert result["settings"] == []


def test_a_run_compared_with_itself_differs_in_nothing(runs):
    result = compare(open_run(runs[0]), open_run(runs[0]))
    assert (result["overall"]["difference"], result["overall"]["low"], result["overall"]["high"]) == (0.0, 0.0, 0.0)
    assert (result["flipped"], result["settings"]) == ([], [])


@pytest.mark.parametrize(
    ("setting", "changed"),
    [
        ("prompt", {"prompt": "{question}"}),
        ("tiles", {"preprocessing": {"tiles": {**TILES, "max_tiles": 1}, "visual_tokens_per_tile": 2, "sha256": "s"}}),
        ("stop rule", {"stop_rule": {"max_new_tokens": 4}}),
        ("model", {"model_fingerprint": "g"}),
        ("quantised weights", {"quantize": "int8"}),
        ("stop reasons", {"counts": {"stop_reasons": {"length": 12}, "tiles": {"3": 12}}}),
    ],
)
def test_a_changed_setting_is_named(tmp_path, setting, changed):
    data = make_data(tmp_path / "data")
    a, b = make_run(tmp_path / "a", data), make_run(tmp_path / "b", data, **changed)
    assert [row["setting"] for row in changed_settings(open_run(a), open_run(b))] == [setting]


def test_a_changed_normaliser_is_named(tmp_path):
    """The same predictions scored by the program of 2017."""
    from eval_vqa.command_line import main as evaluate

    data = make_data(tmp_path / "data")
    a, b = make_run(tmp_path / "a", data), make_run(tmp_path / "b", data)
    evaluate("vqav2", ["score", "--predictions", str(b / "predictions.jsonl"), "--data", str(data), "--version", "2017"])
    (row,) = changed_settings(open_run(a), open_run(b))
    assert (row["setting"], row["a"]["name"], row["b"]["name"]) == ("normaliser", "VQAv2 2021", "VQAv2 2017")


def test_the_command_prints_the_table_and_writes_a_page_with_pictures(runs, tmp_path, capsys):
    assert main([str(runs[0]), str(runs[1]), "--out", str(tmp_path / "page")]) == 0
    printed = capsys.readouterr().out
    assert "3 answers differ: 2 score more in B, 1 less" in printed
    assert "95 % interval" in printed
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("<img") == 3
    assert "Gained: B scores more" in page and "Question 2?" in page
    assert len(json.loads((tmp_path / "page" / "compare.json").read_text())["flipped"]) == 3


def test_a_picture_that_is_not_there_is_said_in_its_place(runs, tmp_path, capsys):
    """As after a run with `--on-missing blank`, or of pictures that stayed elsewhere."""
    for picture in tmp_path.rglob("COCO_val2014_000000000002.jpg"):
        picture.unlink()
    assert main([str(runs[0]), str(runs[1]), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("<img") == 3 and "COCO_val2014_000000000002.jpg not found" in page


def test_the_table_needs_no_torch(runs):
    import subprocess
    import sys
    from pathlib import Path

    code = f"import sys; from eval_vqa.compare import main; main([{str(runs[0])!r}, {str(runs[1])!r}]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, timeout=100).returncode == 0


def test_only_questions_of_both_are_compared(runs, capsys):
    record = read_json(runs[0] / "scores.json")
    del record["per_question"]["5"]
    write_json(runs[0] / "scores.json", record)
    result = compare(*map(open_run, runs))
    assert (result["questions"], result["only_b"]) == (11, [5])
    assert main([str(runs[0]), str(runs[1])]) == 0
    assert "not in A, 1: 5" in capsys.readouterr().out


def moved(runs):
    for path in (runs[0].parent / "data").glob("*questions.json"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda runs: (runs[0] / "scores.json").unlink(), "score the run first"),
        (moved, "not found"),
        (lambda runs: write_json(runs[0] / "scores.json", {"task": "chess"}), "the task 'chess' is unknown"),
        (lambda runs: write_json(runs[0] / "scores.json", {**read_json(runs[0] / "scores.json"), "run": None}), "give it with --data"),
        (lambda runs: write_json(runs[0] / "scores.json", {**read_json(runs[0] / "scores.json"), "per_question": {}}), "none of its"),
    ],
)
def test_what_cannot_be_compared_is_one_line(runs, capsys, damage, message):
    damage(runs)
    assert main([str(runs[0]), str(runs[1])]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_runs_of_two_tasks_are_refused(runs):
    a, b = map(open_run, runs)
    b.record["task"] = "gqa"
    with pytest.raises(ValueError, match="only runs of one task"):
        compare(a, b)


def test_data_that_moved_can_be_given(runs):
    new = runs[0].parent / "elsewhere"
    (runs[0].parent / "data").rename(new)
    assert main([str(runs[0]), str(runs[1]), "--data", str(new)]) == 0
