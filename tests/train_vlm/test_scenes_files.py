"""The files that the command writes: official formats, told truthfully, apart from each other and the same on every run."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from train_vlm.scenes import KINDS, caption, make_scene
from train_vlm.scenes import build as build_module
from train_vlm.scenes.__main__ import main, write_scenes
from train_vlm.scenes.build import SETS, Chunk, build_chunk, build_sets, without_repeats
from train_vlm.scenes.captions import caption_by_color
from train_vlm.scenes.dissent import best_constant
from train_vlm.scenes.questions import QUESTION_TYPES
from train_vlm.scenes.scene import NUMBERS, WORDS

TRAIN, HELDOUT = 60, 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    write_scenes(out, TRAIN, HELDOUT, seed=5, workers=1, is_quiet=True)
    return out


def read(folder, path):
    return json.loads((folder / path).read_text())


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.*"))
        if path.name != "summary.json"
    }


def test_same_seed_writes_the_same_bytes_whatever_the_number_of_workers(tmp_path, folder):
    write_scenes(tmp_path, TRAIN, HELDOUT, seed=5, workers=3, is_quiet=True)
    assert hashes(tmp_path) == hashes(folder)


def test_heldout_sets_do_not_change_with_the_size_of_training(tmp_path, folder):
    write_scenes(tmp_path, 10, HELDOUT, seed=5, workers=1, is_quiet=True)
    heldout = {path: digest for path, digest in hashes(folder).items() if path.startswith("heldout")}
    assert heldout == {path: digest for path, digest in hashes(tmp_path).items() if path.startswith("heldout")}


def test_another_seed_gives_other_pictures_and_a_smaller_run_leaves_none_behind(tmp_path):
    write_scenes(tmp_path, 12, 10, seed=1, workers=1, is_quiet=True)
    first = {digest for path, digest in hashes(tmp_path).items() if path.endswith(".jpg")}
    write_scenes(tmp_path, 4, 5, seed=2, workers=1, is_quiet=True)
    second = {digest for path, digest in hashes(tmp_path).items() if path.endswith(".jpg")}
    assert len(second) == 4 + 1 + 1 + 5
    assert not first & second


def test_no_picture_stands_in_two_sets_or_twice_in_one(folder):
    pictures = [path for path in folder.rglob("*.jpg")]
    assert len(pictures) == TRAIN + HELDOUT // 5 * 2 + HELDOUT
    assert len({path.read_bytes() for path in pictures}) == len(pictures)


def test_a_picture_seen_before_is_drawn_again_and_its_neighbours_stay():
    chunk = Chunk("train", 0, 0, 4)
    made, _ = build_chunk(chunk)
    again, _ = without_repeats(chunk, made, seen={made[2][0].sha256})
    assert [a[0].sha256 == b[0].sha256 for a, b in zip(made, again, strict=True)] == [True, True, False, True]
    assert [picture.number for picture, _ in again] == [1, 2, 3, 4]


def test_repeats_across_sets_are_found_while_building(monkeypatch):
    """Two sets that would draw the very same scenes end up without a common picture."""
    real = build_module.picture_seed
    monkeypatch.setattr(build_module, "picture_seed", lambda seed, name, index, attempt=0: real(seed, "x", index, attempt))
    written = {}
    sets = dict((name, pictures) for name, pictures, _ in build_sets({"heldout/gqa": 5, "train": 5}, 0, 1, written.__setitem__))
    digests = [picture.sha256 for pictures in sets.values() for picture in pictures]
    assert len(set(digests)) == 10
    assert {hashlib.sha256(data).hexdigest() for data in written.values()} == set(digests)


def test_tiles_of_every_set_come_in_the_promised_shares(folder):
    for row in read(folder, "summary.json")["sets"].values():
        assert list(row["tiles_percent"].values()) == pytest.approx([65, 25, 10], abs=2.5)


def test_llava_files_ask_ten_questions_a_picture_in_the_two_prompt_forms(folder):
    early, late, captions, kinds = (read(folder, f"train/{name}.json") for name in ("questions", "late_questions", "captions", "kinds"))
    assert [int(row["id"]) % 2 for row in early] == [1] * len(early) and [int(row["id"]) % 2 for row in late] == [0] * len(late)
    assert not any("logic" in kinds[row["id"]] for row in early) and sum("logic" in kinds[row["id"]] for row in late) > 0.9 * len(late)
    rows = sorted(early + late, key=lambda row: row["id"])
    short = "\nAnswer the question using a single word or phrase."
    vizwiz = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + short
    forms = Counter()
    for row, described in zip(rows, captions, strict=True):
        assert row["id"] == described["id"] and row["image"] == described["image"]
        with Image.open(folder / "train" / row["image"]) as image:
            assert image.format == "JPEG"
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * 10
        assert len(kinds[row["id"]]) == 10 and set(kinds[row["id"]]) <= set(KINDS)
        assert [turn["value"].count("<image>\n") for turn in turns] == [1] + [0] * 19
        assert all(turn["value"].endswith(short) for turn in turns[::2])
        assert len({turn["value"].endswith(vizwiz) for turn in turns[::2]}) == 1
        forms[turns[0]["value"].endswith(vizwiz)] += 1
        by = " by color" if int(row["id"]) % 3 == 0 else ""
        assert described["conversations"][0] == {"from": "human", "value": f"<image>\nDescribe the picture{by}."}
        assert described["conversations"][1]["from"] == "gpt" and described["conversations"][1]["value"].endswith(".")
    assert 0.15 < forms[True] / TRAIN < 0.55
    assert len(rows) == TRAIN


def test_captions_belong_to_their_pictures(folder):
    pictures = {}
    for _, made, _ in build_sets({"train": TRAIN}, 5, 1, lambda path, data: None):
        pictures |= {f"{picture.number:012d}": picture for picture in made}
    for row in read(folder, "train/captions.json"):
        picture = pictures[row["id"]]
        describe = caption_by_color if picture.number % 3 == 0 else caption
        assert row["conversations"][1]["value"] == describe(make_scene(picture.seed))
        assert hashlib.sha256((folder / "train" / row["image"]).read_bytes()).hexdigest() == picture.sha256


@pytest.mark.parametrize(("folder_name", "subset"), [("heldout/vqav2", "val2014"), ("train/vqav2", "train2014")])
def test_vqav2_files_have_the_official_form(folder, folder_name, subset):
    questions = read(folder, f"{folder_name}/v2_OpenEnded_mscoco_{subset}_questions.json")
    annotations = read(folder, f"{folder_name}/v2_mscoco_{subset}_annotations.json")
    kinds = read(folder, f"{folder_name}/kinds.json")
    assert set(questions) == {"info", "task_type", "data_type", "data_subtype", "questions", "license"}
    assert set(annotations) == {"info", "license", "data_type", "data_subtype", "annotations"}
    assert (questions["task_type"], questions["data_type"], questions["data_subtype"]) == ("Open-Ended", "mscoco", subset)
    asked = {row["question_id"]: row for row in questions["questions"]}
    assert len(asked) == len(questions["questions"]) == len(annotations["annotations"]) == len(kinds)
    unanimous = 0
    for row in annotations["annotations"]:
        assert set(row) == {"question_type", "multiple_choice_answer", "answers", "image_id", "answer_type", "question_id"}
        question = asked[row["question_id"]]
        assert question["image_id"] == row["image_id"] and kinds[str(row["question_id"])] in KINDS
        assert row["question_type"] in QUESTION_TYPES and row["answer_type"] in ("yes/no", "number", "other")
        words = question["question"].lower().rstrip("?").replace(",", "").split()
        types = [kind for kind in QUESTION_TYPES if words[: len(kind.split())] == kind.split()]
        assert row["question_type"] == max(types, key=len, default="none of the above")
        assert [answer["answer_id"] for answer in row["answers"]] == list(range(1, 11))
        assert {answer["answer_confidence"] for answer in row["answers"]} <= {"yes", "maybe", "no"}
        texts = Counter(answer["answer"] for answer in row["answers"])
        assert texts[row["multiple_choice_answer"]] >= 6 and sorted(texts.values())[:-1] <= [2] * (len(texts) - 1)
        assert all(text == text.lower().strip() and not set(text) & set(".,;?!") for text in texts)
        unanimous += len(texts) == 1
    assert 0.4 < unanimous / len(asked) < 0.7


def test_vqav2_pictures_stand_where_the_official_ones_would(folder):
    questions = read(folder, "heldout/vqav2/v2_OpenEnded_mscoco_val2014_questions.json")["questions"]
    assert len(questions) >= HELDOUT
    for image_id in {row["image_id"] for row in questions}:
        assert (folder / "heldout/vqav2/val2014" / f"COCO_val2014_{image_id:012d}.jpg").is_file()


def test_gqa_files_have_the_official_form(folder):
    rows = read(folder, "heldout/gqa/val_all_questions.json")
    balanced = read(folder, "heldout/gqa/val_balanced_questions.json")
    choices, kinds = read(folder, "heldout/gqa/val_choices.json"), read(folder, "heldout/gqa/kinds.json")
    graphs = read(folder, "heldout/gqa/val_sceneGraphs.json")
    assert len(balanced) >= HELDOUT and balanced == {key: row for key, row in rows.items() if row["isBalanced"]}
    assert 0 < len(rows) - len(balanced) < len(balanced) / 2
    assert set(choices) == set(kinds) == set(rows)
    keys = {
        "question",
        "imageId",
        "answer",
        "fullAnswer",
        "isBalanced",
        "groups",
        "types",
        "semantic",
        "semanticStr",
        "entailed",
        "equivalent",
        "annotations",
    }
    for row_id, row in rows.items():
        assert set(row) == keys
        assert (folder / "heldout/gqa/images" / f"{row['imageId']}.jpg").is_file()
        assert row["types"]["structural"] in ("query", "verify", "logical", "choose", "compare")
        assert row["types"]["semantic"] in ("attr", "cat", "global", "obj", "rel")
        assert "Common" not in row["types"]["detailed"]
        assert (row["groups"]["global"] is not None) == (row["types"]["structural"] == "query")
        assert row["answer"] in choices[row_id]["valid"] and row["answer"] in choices[row_id]["plausible"]
        assert row["answer"] != "unanswerable"
        assert all(d < position for position, step in enumerate(row["semantic"]) for d in step["dependencies"])
        objects = graphs[row["imageId"]]["objects"]
        for part in ("question", "answer", "fullAnswer"):
            assert set(row["annotations"][part].values()) <= set(objects)
        for span, object_id in row["annotations"]["question"].items():
            start, _, end = span.partition(":")
            words = [word.strip("?,").lower() for word in row["question"].split()][int(start) : int(end or int(start) + 1)]
            named = (objects[object_id]["name"], *objects[object_id]["attributes"], "object")
            assert words and all(word in named for word in words)
        assert all(rows[other]["imageId"] == row["imageId"] for other in row["entailed"])
    assert {row["types"]["structural"] for row in balanced.values()} == {"query", "verify", "logical", "choose", "compare"}
    assert {row["types"]["semantic"] for row in balanced.values()} == {"attr", "cat", "global", "obj", "rel"}


def test_gqa_entailed_answers_are_true_and_most_are_linked(folder):
    """Each entailed question's answer is found again by brute force on the picture's scene."""
    from test_scenes import true_answer

    rows = read(folder, "heldout/gqa/val_all_questions.json")
    scenes = {}
    for _, made, _ in build_sets({"heldout/gqa": HELDOUT // 5}, 5, 1, lambda path, data: None):
        scenes = {str(picture.number): picture.scene for picture in made}
    entailed = {other for row in rows.values() for other in row["entailed"]}
    assert {row_id for row_id, row in rows.items() if not row["isBalanced"]} <= entailed
    for row_id in entailed:
        assert rows[row_id]["answer"] == true_answer(scenes[rows[row_id]["imageId"]], rows[row_id]["question"][:-1].lower())


def test_gqa_scene_graphs_hold_what_is_in_the_picture(folder):
    for image_id, graph in read(folder, "heldout/gqa/val_sceneGraphs.json").items():
        with Image.open(folder / "heldout/gqa/images" / f"{image_id}.jpg") as image:
            assert image.size == (graph["width"], graph["height"])
        for object_id, thing in graph["objects"].items():
            assert 0 <= thing["x"] and thing["x"] + thing["w"] <= graph["width"] + 1
            if thing["name"] in ("number", "word"):
                assert thing["attributes"][0] in (*NUMBERS, *WORDS)
            for relation in thing["relations"]:
                other = graph["objects"][relation["object"]]
                back = {"to the left of": "to the right of", "above": "below"}
                back |= {value: key for key, value in back.items()}
                assert {"name": back[relation["name"]], "object": object_id} in other["relations"]


def test_vizwiz_file_has_the_official_form_and_a_ceiling_below_one_hundred(folder):
    rows, kinds = read(folder, "heldout/vizwiz/val.json"), read(folder, "heldout/vizwiz/kinds.json")
    assert len(rows) >= HELDOUT and [row["image"] for row in rows] == [f"VizWiz_val_{index:08d}.jpg" for index in range(len(rows))]
    ceilings = []
    for row in rows:
        assert set(row) == {"image", "question", "answers", "answer_type", "answerable"}
        assert (folder / "heldout/vizwiz/val" / row["image"]).is_file()
        texts = Counter(answer["answer"] for answer in row["answers"])
        (truth, most), *others = texts.most_common()
        assert len(row["answers"]) == 10 and most >= 2 and all(count < most for _, count in others)
        assert all(set(answer) == {"answer", "answer_confidence"} for answer in row["answers"])
        assert row["answerable"] == (truth != "unanswerable") == (kinds[row["image"]] not in ("unanswerable", "unprinted"))
        expected = "unanswerable" if not row["answerable"] else "yes/no" if truth in ("yes", "no") else None
        assert row["answer_type"] == (expected or ("number" if truth.isdigit() else "other"))
        ceilings.append(best_constant([answer["answer"] for answer in row["answers"]]))
    assert 0.25 <= sum(not row["answerable"] for row in rows) / len(rows) <= 0.30
    summary = read(folder, "summary.json")
    assert summary["vizwiz_ceiling_percent"] == pytest.approx(100 * sum(ceilings) / len(ceilings), abs=0.01)
    assert 85 < summary["vizwiz_ceiling_percent"] < 99.5


def test_best_constant_is_leave_one_out_with_three_agreeing():
    """By hand: m of ten alike score 0, .3, .6, .9, 1 for m = 0, 1, 2, 3, 4 and more."""
    assert best_constant([str(n) for n in range(10)]) == pytest.approx(0.3)
    assert best_constant(["a"] * 2 + [str(n) for n in range(8)]) == pytest.approx(0.6)
    assert best_constant(["a"] * 3 + ["b"] * 2 + [str(n) for n in range(5)]) == pytest.approx(0.9)
    assert best_constant(["a"] * 4 + ["b"] * 3 + [str(n) for n in range(3)]) == pytest.approx(1.0)


def test_summary_counts_what_was_written_and_speed_is_sixty_a_second(folder):
    summary = read(folder, "summary.json")
    assert set(summary["sets"]) == set(SETS)
    for row in summary["sets"].values():
        assert sum(row["kinds"].values()) == row["questions"]
        assert row["scenes_per_processor_second"] > 60
        assert max(row["blind_percent"].values()) < 45


def test_bad_numbers_are_refused_in_one_line(tmp_path, capsys):
    for option, value in (("--train", "0"), ("--heldout", "-1"), ("--workers", "0"), ("--seed", "-5")):
        assert main(["--out", str(tmp_path / "x"), option, value]) == 2
        told = capsys.readouterr()
        assert told.err == f"scenes: {option} is {value}, expected {0 if option == '--seed' else 1} or more\n"
        assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path, capsys):
    Path(tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "below"), "--train", "2", "--heldout", "2", "--workers", "1"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len([line for line in told if line.startswith("scenes: cannot write to")]) == 1
    assert os.path.isfile(tmp_path / "file")


def test_command_prints_the_table_and_writes_the_summary_last(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--train", "3", "--heldout", "5", "--workers", "1"]) == 0
    told = capsys.readouterr().out
    assert "VizWiz ceiling" in told and "scenes/s/core" in told
    newest = max(tmp_path.rglob("*.*"), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "summary.json"
