"""The commands as a user meets them: both ways to start them, no torch to score, one line for bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import FakeEngine, FakeRequest
from PIL import Image

from eval_vqa.command_line import main
from eval_vqa.json_files import write_json

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path):
    """A folder per task with three questions about two images, one of them answered wrongly by answers()."""
    people = [{"answer": "red", "answer_confidence": "yes", "answer_id": place} for place in range(1, 11)]
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    rows = [{"question_id": key, "image_id": key % 2, "question": f"What color is the {key}?"} for key in (1, 2, 3)]
    marks = [{**row, "question_type": "what", "answer_type": "other", "answers": people, "multiple_choice_answer": "red"} for row in rows]
    write_json(tmp_path / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {**head, "task_type": "Open-Ended", "questions": rows})
    write_json(tmp_path / "vqav2/v2_mscoco_val2014_annotations.json", {**head, "annotations": marks})
    write_json(tmp_path / "vqav2/kinds.json", {"1": "color", "2": "color", "3": "shape"})
    gqa = {
        str(key): {
            "question": f"What color is the {key}?", "imageId": str(key % 2), "answer": "red", "isBalanced": True, "entailed": [],
            "groups": {"global": "g", "local": None}, "types": {"structural": "query", "semantic": "attr", "detailed": "d"},
            "semantic": [{"operation": "select", "argument": "x", "dependencies": []}],
        }
        for key in (1, 2, 3)
    }  # fmt: skip
    write_json(tmp_path / "gqa/testdev_balanced_questions.json", gqa)
    vizwiz = [{"image": f"{key}.jpg", "question": "What?", "answers": people, "answer_type": "other", "answerable": 1} for key in (1, 2, 3)]
    write_json(tmp_path / "vizwiz/val.json", vizwiz)
    for name in ("vqav2/val2014/COCO_val2014_%012d.jpg", "gqa/images/%d.jpg", "vizwiz/val/%d.jpg"):
        for number in range(4):
            path = tmp_path / (name % number)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
    write_json(tmp_path / "model/config.json", {})
    return tmp_path


def answers(task, count=3):
    third = ["red", "red", "blue"]
    if task == "gqa":
        return [{"questionId": str(key + 1), "prediction": third[key]} for key in range(count)]
    if task == "vizwiz":
        return [{"image": f"{key + 1}.jpg", "answer": third[key]} for key in range(count)]
    return [{"question_id": key + 1, "answer": third[key]} for key in range(count)]


def start(*args):
    environment = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("task", ["vqav2", "gqa", "vizwiz"])
@pytest.mark.parametrize("as_module", [False, True])
def test_score_starts_both_ways(data, task, as_module):
    write_json(data / "results.json", answers(task))
    program = ["-m", f"eval_vqa.{task}"] if as_module else [f"eval_vqa/{task}.py"]
    done = start(*program, "score", "--predictions", data / "results.json", "--data", data / task)
    assert (done.returncode, done.stderr) == (0, "")
    assert "66.67%" in done.stdout
    assert json.loads((data / "scores.json").read_text())["scores"]["accuracy"] == pytest.approx(66.67, abs=0.01)


@pytest.mark.parametrize("task", ["vqav2", "gqa", "vizwiz"])
def test_scoring_imports_no_torch(data, task):
    write_json(data / "results.json", answers(task))
    code = (
        "import sys; from eval_vqa.command_line import main; "
        f"code = main({task!r}, ['score', '--predictions', {str(data / 'results.json')!r}, '--data', {str(data / task)!r}]); "
        "sys.exit(code or len({'torch', 'transformers', 'numpy', 'vlm', 'PIL'} & set(sys.modules)))"
    )
    assert start("-c", code).returncode == 0


BLOCKED = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "numpy", "PIL", "vlm", "tqdm"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Refuse())
from eval_vqa.command_line import main
"""


@pytest.mark.parametrize("task", ["vqav2", "gqa", "vizwiz"])
def test_scoring_and_baselines_work_where_torch_cannot_be_imported(data, task):
    """Not only is torch not imported: on a machine without it, numpy and Pillow everything that scores still runs."""
    write_json(data / "results.json", answers(task))
    score = ["score", "--predictions", str(data / "results.json"), "--data", str(data / task)]
    train = data / "vqav2/v2_mscoco_val2014_annotations.json"
    baseline = ["baseline", "--train", str(train), "--data", str(data / task)]
    done = start("-c", BLOCKED + f"sys.exit(main({task!r}, {score!r}) or main({task!r}, {baseline!r}))")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_record_says_what_was_measured(data):
    write_json(data / "results.json", answers("vqav2"))
    args = ["score", "--predictions", str(data / "results.json"), "--data", str(data / "vqav2"), "--out", str(data / "s.json")]
    assert main("vqav2", args) == 0
    record = json.loads((data / "s.json").read_text())
    assert record["kinds"] == {"color": {"accuracy": 100.0, "count": 2}, "shape": {"accuracy": 0.0, "count": 1}}
    assert (record["split"], record["counts"]["scored"], record["per_question"]) == ("val2014", 3, {"1": 100.0, "2": 100.0, "3": 0.0})
    assert set(record["data"]) == {"questions", "annotations", "kinds"}
    assert record["prompt_sha256"] is None  # predicted elsewhere
    assert record["scores"]["version"] == "2021"


def run(task, data, *more, engine=None, command="run"):
    """main() with a fake engine and fake requests."""
    import eval_vqa.predicting as predicting

    original = predicting.predict
    predicting.predict = lambda *args, **kwargs: original(*args, **{**kwargs, "make_request": FakeRequest})
    try:
        args = [command, "--model", str(data / "model"), "--data", str(data / task), "--out", str(data / "out"), *more]
        return main(task, args, load_engine=lambda args: engine or Red())
    finally:
        predicting.predict = original


class Red(FakeEngine):
    """Always says the right thing, as models say it."""

    def generate(self, requests, on_answer=None):
        def red(index, answer):
            answer.text = "Red."
            on_answer(index, answer)

        return super().generate(requests, red)


@pytest.mark.parametrize("task", ["vqav2", "gqa", "vizwiz"])
def test_run_predicts_and_scores(data, task, capsys):
    assert run(task, data) == 0
    record = json.loads((data / "out/scores.json").read_text())
    assert record["scores"]["accuracy"] == 100.0
    assert record["prompt_sha256"] == record["run"]["prompt_sha256"]
    assert record["run"]["counts"]["stop_reasons"] == {"end_of_turn": 3}
    assert "100.00%" in capsys.readouterr().out
    for name in ("predictions.jsonl", "submission.json"):
        assert main(task, ["score", "--predictions", str(data / "out" / name), "--data", str(data / task)]) == 0


def test_limit_scores_what_was_asked_and_says_so(data, capsys):
    assert run("vqav2", data, "--limit", "2") == 0
    assert json.loads((data / "out/scores.json").read_text())["counts"] == {
        "scored": 2, "empty_answers": 0, "problems": 0, "missing": 0, "unknown": 0, "subset_only": True,
    }  # fmt: skip
    assert "not an official score" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--limit", "--batch"])
def test_numbers_that_ask_for_nothing_are_refused_before_anything_is_opened(data, option, capsys):
    assert run("vqav2", data, option, "0") == 2
    assert f"{option} must be at least 1, found 0" in capsys.readouterr().err
    assert not (data / "out").exists()


def test_unreadable_images_give_exit_code_1_and_are_listed(data, capsys):
    (data / "vizwiz/val/2.jpg").unlink()
    assert run("vizwiz", data, "--on-missing", "blank") == 1
    assert "1 questions had a problem" in capsys.readouterr().err
    record = json.loads((data / "out/scores.json").read_text())
    assert (record["scores"]["accuracy"], record["counts"]["problems"]) == (66.67, 1)
    assert record["run"]["problems"][0]["image"] == "2.jpg"


def test_skipped_questions_are_not_scored(data):
    (data / "vizwiz/val/2.jpg").unlink()
    assert run("vizwiz", data, "--on-missing", "skip") == 1
    record = json.loads((data / "out/scores.json").read_text())
    assert (record["scores"]["accuracy"], record["counts"]["scored"]) == (100.0, 2)


def test_the_result_names_the_model_by_content(data):
    run("gqa", data, command="predict")
    write_json(data / "model/config.json", {"changed": True})
    assert run("gqa", data, command="predict") == 2


def test_explicit_paths_replace_the_folder(data):
    folder = data / "vqav2"
    args = ["score", "--predictions", str(data / "r.json"), "--questions", str(folder / "v2_OpenEnded_mscoco_val2014_questions.json")]
    write_json(data / "r.json", answers("vqav2"))
    assert main("vqav2", [*args, "--annotations", str(folder / "v2_mscoco_val2014_annotations.json")]) == 0
    assert main("vqav2", args) == 2  # nothing to score against


def test_baseline_prints_majority_and_ceiling(data, capsys):
    train = data / "vqav2/v2_mscoco_val2014_annotations.json"
    for task in ("vqav2", "gqa", "vizwiz"):
        assert main(task, ["baseline", "--train", str(train), "--data", str(data / task), "--out", str(data / "b.json")]) == 0
        assert "majority answer per question type: 100.00%" in capsys.readouterr().out
        assert json.loads((data / "b.json").read_text())["ceiling"] == (None if task == "gqa" else 100.0)


def test_answerability_is_scored_from_its_own_file(data, capsys):
    write_json(data / "r.json", answers("vizwiz"))
    write_json(data / "a.json", [{"image": f"{key}.jpg", "answerable": 0.9} for key in (1, 2, 3)])
    args = ["score", "--predictions", str(data / "r.json"), "--data", str(data / "vizwiz"), "--answerability", str(data / "a.json")]
    assert main("vizwiz", args) == 0
    assert "average_precision" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["gqa", "vizwiz"])
def test_an_unknown_id_is_listed_and_gives_exit_code_1(data, task, capsys):
    """Officially it is ignored; silently it would hide that the wrong file is being scored."""
    stranger = {"questionId": "99", "prediction": "red"} if task == "gqa" else {"image": "99.jpg", "answer": "red"}
    write_json(data / "r.json", [*answers(task), stranger])
    assert main(task, ["score", "--predictions", str(data / "r.json"), "--data", str(data / task)]) == 1
    assert "not in this split, 1: '99" in capsys.readouterr().err
    record = json.loads((data / "scores.json").read_text())
    assert (len(record["unknown_ids"]), record["counts"]["unknown"], record["counts"]["scored"]) == (1, 1, 3)


@pytest.mark.parametrize("task", ["vqav2", "gqa", "vizwiz"])
@pytest.mark.parametrize(("on_missing", "code", "accuracy", "scored"), [("fail", 2, None, None), ("skip", 1, 100.0, 2),
                                                                        ("blank", 1, 66.67, 3)])  # fmt: skip
def test_a_question_without_answer_is_an_error_left_out_or_wrong(data, task, on_missing, code, accuracy, scored):
    write_json(data / "r.json", answers(task, 2))
    args = ["score", "--predictions", str(data / "r.json"), "--data", str(data / task), "--on-missing", on_missing]
    assert main(task, args) == code
    if accuracy is not None:
        record = json.loads((data / "scores.json").read_text())
        assert (round(record["scores"]["accuracy"], 2), record["counts"]["scored"]) == (accuracy, scored)
        assert record["missing_ids"] == {"vqav2": [3], "gqa": ["3"], "vizwiz": ["3.jpg"]}[task]
        assert record["counts"]["subset_only"] == (on_missing == "skip")


def test_vqav2_drops_unknown_ids_only_when_told_to(data, capsys):
    write_json(data / "r.json", [*answers("vqav2"), {"question_id": 9, "answer": "x"}])
    args = ["score", "--predictions", str(data / "r.json"), "--data", str(data / "vqav2")]
    assert main("vqav2", args) == 2
    assert "not annotated 1: 9" in capsys.readouterr().err
    assert main("vqav2", [*args, "--on-missing", "blank"]) == 1
    assert json.loads((data / "scores.json").read_text())["unknown_ids"] == [9]


def test_vizwiz_scores_answerability_from_its_own_predictions(data):
    assert run("vizwiz", data) == 0
    scores = json.loads((data / "out/scores.json").read_text())["scores"]
    assert scores["answerability"] == {"average_precision": 0.0, "f1_score": 0.0}  # all can be answered; 0.5 counts as answerable


def test_a_result_carries_what_is_needed_to_repeat_it(data):
    run("vqav2", data)
    record = json.loads((data / "out/scores.json").read_text())
    known = record["run"]
    for key in ("prompt_sha256", "model_fingerprint", "questions_sha256", "images_sha256"):
        assert len(known[key]) == 64
    assert len(known["preprocessing"]["sha256"]) == len(record["normaliser"]["sha256"]) == 64
    assert known["decoding"] == {"temperature": 0.0, "seed": None}
    assert known["stop_rule"]["max_new_tokens"] == 16
    assert known["versions"]["python"] and known["split"] == "val2014"
    assert record["data"]["annotations"]["sha256"] != record["data"]["questions"]["sha256"]


def test_ranks_are_processes_and_a_failure_of_one_is_the_runs(data):
    """Through real processes, as far as the model folder, which is none: a line from each rank that got there, exit code 2."""
    (data / "model/config.json").unlink()
    args = ["predict", "--model", data / "model", "--data", data / "vizwiz", "--out", data / "o"]
    done = start("eval_vqa/vizwiz.py", *args, "--ranks", "2")
    assert done.returncode == 2
    assert set(done.stderr.splitlines()) == {line for line in done.stderr.splitlines() if "is no checkpoint" in line} != set()
    assert main("vizwiz", [*map(str, args), "--ranks", "0"]) == 2
    assert main("vizwiz", [*map(str, args), "--ranks=-1"]) == 2


def test_deepspeeds_launcher_may_add_its_argument(data):
    assert run("gqa", data, "--local_rank", "0") == 0


def corrupt(path, text):
    path.write_text(text)


@pytest.mark.parametrize(
    ("damage", "command", "message"),
    [
        (lambda d: corrupt(d / "vizwiz/val.json", "[{"), "run", "not valid JSON"),
        (lambda d: corrupt(d / "vizwiz/val.json", "[]"), "run", "holds no questions"),
        (lambda d: (d / "vizwiz/val.json").unlink(), "run", "should hold SPLIT.json"),
        (lambda d: (d / "model/config.json").unlink(), "run", "is no checkpoint"),
        (lambda d: (d / "vizwiz/val/1.jpg").unlink(), "run", "image files not found"),
        (lambda d: corrupt(d / "vizwiz/val/1.jpg", "x"), "run", "cannot be read"),
        (lambda d: corrupt(d / "r.json", "nonsense"), "score", "not valid JSON"),
        (lambda d: corrupt(d / "r.json", "{}"), "score", "expected a JSON list"),
        (lambda d: corrupt(d / "r.json", "[]"), "score", "without result"),
        (lambda d: (d / "r.json").unlink(), "score", "not found"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(data, capsys, damage, command, message):
    write_json(data / "r.json", answers("vizwiz"))
    damage(data)
    if command == "run":
        code = run("vizwiz", data)
    else:
        code = main("vizwiz", ["score", "--predictions", str(data / "r.json"), "--data", str(data / "vizwiz")])
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_data_folder_is_one_line(tmp_path, capsys):
    assert main("gqa", ["score", "--predictions", "x.jsonl", "--data", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main("gqa", ["score", "--predictions", "x.jsonl"]) == 2
    assert "--data FOLDER" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(data, capsys):
    assert run("gqa", data, engine=FakeEngine(crash_after=1)) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert run("gqa", data) == 0
