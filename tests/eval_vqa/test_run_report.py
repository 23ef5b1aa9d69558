"""The page about scored runs."""

import pytest
from PIL import Image
from scored_runs import make_data, make_run

from eval_vqa.command_line import main as evaluate
from eval_vqa.measured_run import open_run
from eval_vqa.published import PUBLISHED
from eval_vqa.run_report import Baselines, confusions, main
from eval_vqa.tile_view import tile_view


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", make_data(tmp_path / "data"), {0: "blue", 1: "yes", 3: "yes", 4: "<b>bold</b>"})


def test_the_page_has_everything_that_was_promised(run, tmp_path):
    data = tmp_path / "data"
    grey = make_run(tmp_path / "grey", data, {key: "no" for key in range(12)})
    train = data / "v2_mscoco_val2014_annotations.json"
    assert evaluate("vqav2", ["baseline", "--train", str(train), "--data", str(data), "--out", str(tmp_path / "majority.json")]) == 0
    args = [str(run), "--grey", str(grey), "--majority", str(tmp_path / "majority.json"), "--out", str(tmp_path / "page")]
    assert main(args) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    for text in ("LLaVA-1.5 7B", "test-dev", "train split in the training mix", "this model on grey pictures", "majority answer", "ceiling",
                 "question type", "answer type", "The 3 most frequent confusions", "why answers ended", "end: 12", "vqav2: failures",
                 "vqav2: successes", "3 tiles, ended by end", "prompt SHA-256", "normaliser SHA-256"):  # fmt: skip
        assert text in page, text
    assert "<b>bold</b>" not in page and "&lt;b&gt;bold&lt;/b&gt;" in page  # an answer is text, whatever it holds
    assert page.count("<img") == 3 + 8  # failures: 1, 3, 4 (0 got 30 points: neither); successes: the other eight


def test_confusions_are_counted_by_what_most_people_say(run):
    assert confusions(open_run(run)) == [("no", "yes", 2), ("red", "blue", 1), ("red", "<b>bold</b>", 1)]


def test_a_run_predicted_elsewhere_has_a_page_too(tmp_path):
    data = make_data(tmp_path / "data")
    run = make_run(tmp_path / "run", data)
    for name in ("run.json", "predictions.jsonl"):
        (run / name).unlink()
    (run / "results.json").write_text("[" + ", ".join(f'{{"question_id": {key}, "answer": "red"}}' for key in range(12)) + "]")
    assert evaluate("vqav2", ["score", "--predictions", str(run / "results.json"), "--data", str(data)]) == 0
    assert main([str(run), "--data", str(data), "--out", str(tmp_path / "page")]) == 0
    assert "predicted elsewhere" in (tmp_path / "page" / "report.html").read_text()


def test_a_missing_run_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "no"), "--out", str(tmp_path / "page")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_published_score_names_split_and_training():
    assert all(one.split and one.trained and 0 < one.score < 100 for rows in PUBLISHED.values() for one in rows)
    assert {one.split for one in PUBLISHED["vizwiz"]} == {"val", "test"}


def test_a_baseline_that_is_not_there_has_no_number():
    assert Baselines().majority_score() is None
    assert Baselines(majority={"majority": {"kinds": {"x": {"accuracy": 5.0}}}}).majority_score("kind", "x") == 5.0
    assert Baselines(majority={"majority": {"scores": {"perAnswerType": {"y": 7.0}}}}).majority_score("answer type", "y") == 7.0


TILES = {"tile_size": 16, "max_tiles": 6, "policy": "closest", "thumbnail": True}


def two_colours(path):
    image = Image.new("RGB", (32, 16), (255, 0, 0))
    image.paste((0, 0, 255), (16, 0, 32, 16))
    image.save(path)
    return path


def test_a_tile_view_shows_each_tile_the_gap_and_the_thumbnail(tmp_path):
    view = tile_view(two_colours(tmp_path / "x.png"), TILES)
    cell = 16 * (((456 - 10 - 9) // 3) // 16)
    assert view.size == (2 * cell + 3 + 10 + cell, cell)
    assert [view.getpixel((x, cell // 2)) for x in (0, cell + 1, cell + 3)] == [(255, 0, 0), (255, 255, 255), (0, 0, 255)]
    assert view.getpixel((2 * cell + 3 + 5, 1)) == (255, 255, 255)
    assert view.getpixel((2 * cell + 13 + 2, 1))[0] > 200


def test_a_reduced_number_of_tiles_is_what_is_shown(tmp_path):
    assert tile_view(two_colours(tmp_path / "x.png"), TILES, used=1).size == (144, 144)


def test_large_tiles_are_shown_small_and_unknown_tiling_shows_the_picture(tmp_path):
    Image.new("RGB", (1600, 1200)).save(tmp_path / "y.png")
    assert tile_view(tmp_path / "y.png", {**TILES, "tile_size": 448, "max_tiles": 12}).width <= 456
    assert max(tile_view(tmp_path / "y.png", {}).size) == 456
