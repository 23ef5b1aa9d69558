"""Finding the official layouts, reading their questions, and saying what is wrong with a folder."""

import json
import zipfile

import pytest

from eval_vqa import docvqa, textvqa
from eval_vqa.archives import is_file, read_bytes
from eval_vqa.json_files import file_sha256, read_json, write_json
from eval_vqa.official_files import locate_gqa, locate_vizwiz, locate_vqav2, read_vizwiz_questions, read_vqav2_questions
from eval_vqa.tasks import read_questions


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_vqav2_prefers_val2014_and_test_has_no_annotations(tmp_path):
    touch(tmp_path, "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json",
          "v2_OpenEnded_mscoco_train2014_questions.json", "v2_OpenEnded_mscoco_test-dev2015_questions.json")  # fmt: skip
    found = locate_vqav2(tmp_path, None)
    assert (found.split, found.annotations.name, found.images) == ("val2014", "v2_mscoco_val2014_annotations.json", tmp_path / "val2014")
    test = locate_vqav2(tmp_path, "test-dev2015")
    assert (test.annotations, test.images) == (None, tmp_path / "test2015")


def test_vqav2_image_names_follow_the_subset(tmp_path):
    images = {"val2014": "val2014/COCO_val2014_000000000042.jpg", "test-dev2015": "test2015/COCO_test2015_000000000042.jpg"}
    for subset, image in images.items():
        questions = {"data_subtype": subset, "questions": [{"question_id": 1, "image_id": 42, "question": "what?"}]}
        write_json(tmp_path / f"v2_OpenEnded_mscoco_{subset}_questions.json", questions)
        assert read_questions("vqav2", locate_vqav2(tmp_path, subset))[0].image == tmp_path / image


def test_gqa_split_is_a_tier_and_a_set(tmp_path):
    touch(tmp_path, "val_all_questions.json", "val_balanced_questions.json", "val_choices.json", "val_sceneGraphs.json", "kinds.json")
    found = locate_gqa(tmp_path, None)
    assert (found.split, found.choices.name, found.scene_graphs.name) == ("val_balanced", "val_choices.json", "val_sceneGraphs.json")
    assert locate_gqa(tmp_path, "val").split == "val_balanced"
    assert locate_gqa(tmp_path, "val_all").questions.name == "val_all_questions.json"
    touch(tmp_path, "testdev_balanced_questions.json")
    assert (locate_gqa(tmp_path, None).split, locate_gqa(tmp_path, None).choices) == ("testdev_balanced", None)


def test_gqa_questions_in_pieces(tmp_path):
    folder = tmp_path / "train_all_questions"
    folder.mkdir()
    for piece in (0, 1, 10):
        write_json(folder / f"train_all_questions_{piece}.json", {str(piece): {"question": "q", "imageId": "7"}})
    found = locate_gqa(tmp_path, "train_all")
    assert [(row.id, row.image.name) for row in read_questions("gqa", found)] == [("0", "7.jpg"), ("1", "7.jpg"), ("10", "7.jpg")]
    assert len(file_sha256(found.questions)) == 64


def test_vizwiz_with_and_without_its_annotations_folder(tmp_path):
    rows = [{"image": "VizWiz_val_00000000.jpg", "question": "what?"}]
    write_json(tmp_path / "flat" / "val.json", rows)
    write_json(tmp_path / "deep" / "Annotations" / "val.json", rows)
    for layout in ("flat", "deep"):
        row = read_questions("vizwiz", locate_vizwiz(tmp_path / layout, None))[0]
        assert row.image == tmp_path / layout / "val" / "VizWiz_val_00000000.jpg"


@pytest.mark.parametrize(("locate", "message"), [(locate_vqav2, "v2_OpenEnded"), (locate_gqa, "SPLIT_questions"), (locate_vizwiz, "SPLIT")])
def test_an_empty_folder_is_told_what_it_should_hold(tmp_path, locate, message):
    with pytest.raises(FileNotFoundError, match=message):
        locate(tmp_path, None)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        locate(tmp_path / "nowhere", None)


def test_a_split_that_is_not_there_names_those_that_are(tmp_path):
    touch(tmp_path, "train.json")
    with pytest.raises(FileNotFoundError, match="val.json not found; splits in that folder: train"):
        locate_vizwiz(tmp_path, "val")


def test_a_file_without_questions_is_an_error(tmp_path):
    write_json(tmp_path / "val.json", [])
    with pytest.raises(ValueError, match="holds no questions"):
        read_questions("vizwiz", locate_vizwiz(tmp_path, None))


def test_a_question_that_is_no_text_is_named(tmp_path):
    write_json(tmp_path / "val.json", [{"image": "a.jpg", "question": 5}])
    with pytest.raises(ValueError, match="1: 'a.jpg'"):
        read_questions("vizwiz", locate_vizwiz(tmp_path, None))


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (read_vqav2_questions, {"data_subtype": "val2014", "questions": [{"question_id": 5, "image_id": 1, "question": q} for q in "ab"]}),
        (read_vizwiz_questions, [{"image": 5, "question": q} for q in "ab"]),
        (textvqa.read_questions, {"data": [{"question_id": 5, "image_id": "x", "question": q} for q in "ab"]}),
        (docvqa.read_questions, {"data": [{"questionId": 5, "image": "x", "question": q} for q in "ab"]}),
    ],
)
def test_an_id_of_two_questions_is_an_error(tmp_path, read, content):
    """Only the second was asked, and nothing said so."""
    with pytest.raises(ValueError, match="ids that stand for different questions, 1: 5"):
        read(content, tmp_path)


def test_malformed_json_is_told_with_its_place(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1,\n "b" 2}')
    with pytest.raises(ValueError, match="line 2, column 6"):
        read_json(tmp_path / "x.json")
    (tmp_path / "y.json").write_bytes(b'"\xff\xfe"')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_json(tmp_path / "y.json")


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path):
    write_json(tmp_path / "x.json", [1])
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", [object()])
    assert json.loads((tmp_path / "x.json").read_text()) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def pack(archive, **files):
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in files.items():
            file.writestr(name, content if isinstance(content, bytes) else json.dumps(content))


def test_vqav2_is_read_from_its_downloads(tmp_path):
    questions = {"data_subtype": "val2014", "questions": [{"question_id": 1, "image_id": 42, "question": "what?"}]}
    pack(tmp_path / "v2_Questions_Val_mscoco.zip", **{"v2_OpenEnded_mscoco_val2014_questions.json": questions})
    pack(tmp_path / "v2_Annotations_Val_mscoco.zip", **{"v2_mscoco_val2014_annotations.json": {"annotations": []}})
    pack(tmp_path / "val2014.zip", **{"val2014/COCO_val2014_000000000042.jpg": b"picture"})
    found = locate_vqav2(tmp_path, None)
    assert read_json(found.annotations) == {"annotations": []}
    (row,) = read_questions("vqav2", found)
    assert is_file(row.image)
    assert read_bytes(row.image) == b"picture"
    (tmp_path / "unpacked.json").write_bytes(read_bytes(found.questions))
    assert file_sha256(found.questions) == file_sha256(tmp_path / "unpacked.json")  # the same hash, packed or not


def test_vqav2_in_the_usual_subfolders(tmp_path):
    touch(tmp_path, "questions/v2_OpenEnded_mscoco_val2014_questions.json", "annotations/v2_mscoco_val2014_annotations.json",
          "images/val2014/x.jpg")  # fmt: skip
    found = locate_vqav2(tmp_path, None)
    assert (found.annotations.parent.name, found.images) == ("annotations", tmp_path / "images" / "val2014")


def test_gqa_is_read_from_its_downloads(tmp_path):
    row = {"question": "q", "imageId": "7"}
    pack(tmp_path / "questions1.2.zip", **{
        "testdev_balanced_questions.json": {"5": row}, "train_all_questions/train_all_questions_0.json": {"0": row},
        "train_all_questions/train_all_questions_10.json": {"10": row}, "train_all_questions/train_all_questions_9.json": {"9": row},
        "val_balanced_questions.json": {"1": row},
    })  # fmt: skip
    pack(tmp_path / "eval.zip", **{"val_choices.json": {}})
    pack(tmp_path / "sceneGraphs.zip", **{"val_sceneGraphs.json": {}})
    pack(tmp_path / "images.zip", **{"images/7.jpg": b"picture"})
    (question,) = read_questions("gqa", locate_gqa(tmp_path, None))
    assert (question.id, read_bytes(question.image)) == ("5", b"picture")
    train = locate_gqa(tmp_path, "train_all")
    assert [row.id for row in read_questions("gqa", train)] == ["0", "9", "10"]
    assert len(file_sha256(train.questions)) == 64
    val = locate_gqa(tmp_path, "val")
    assert (val.choices.name, val.scene_graphs.name) == ("val_choices.json", "val_sceneGraphs.json")


def test_vizwiz_is_read_from_its_downloads(tmp_path):
    rows = [{"image": "VizWiz_val_00000000.jpg", "question": "what?"}]
    pack(
        tmp_path / "Annotations.zip", **{"Annotations/val.json": rows, "Annotations/test.json": rows, "__MACOSX/Annotations/val.json": b"x"}
    )
    pack(tmp_path / "val.zip", **{"val/VizWiz_val_00000000.jpg": b"picture"})
    (row,) = read_questions("vizwiz", locate_vizwiz(tmp_path, None))
    assert read_bytes(row.image) == b"picture"
    pack(tmp_path / "test.zip", **{"VizWiz_val_00000000.jpg": b"at the root"})
    test = locate_vizwiz(tmp_path, "test")
    assert (test.annotations, read_bytes(read_questions("vizwiz", test)[0].image)) == (None, b"at the root")


def test_splits_whose_answers_are_not_public_have_no_annotations(tmp_path):
    touch(tmp_path, "submission_all_questions.json", "test_all_questions.json")
    assert locate_gqa(tmp_path, "submission").annotations is None
    assert locate_gqa(tmp_path, "test_all").annotations is None
