"""The check before a run: what it counts is what is there, and pictures of an evaluation set are found by bytes and by pixels."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from planted_faults import plant

from train_vlm.shard_check import check_shards, histogram
from train_vlm.shards import convert, main


def picture(seed, size=(64, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def clean(tmp_path, tiny_processor):
    """Shards of six samples, each with a picture of its own."""
    (tmp_path / "images").mkdir()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    for number in range(6):
        picture(number).save(tmp_path / "images" / f"{number}.png")
    samples = [{"id": str(number), "image": f"{number}.png", "conversations": turns} for number in range(6)]
    convert(samples, tmp_path / "images", tiny_processor, tmp_path / "shards")
    return tmp_path / "shards"


def test_every_planted_fault_is_counted_once(tmp_path, tiny_processor):
    shards, longest = plant(tmp_path, tiny_processor, samples=60, each=4)
    found = check_shards(shards, tiny_processor, max_tokens=longest)
    assert found.samples == 60 and found.skipped == 16 and found.reduced == 4
    assert {reason: found.faults[reason] for reason in ("broken", "image missing", "too long", "nothing supervised")} == dict.fromkeys(
        ("broken", "image missing", "too long", "nothing supervised"), 4
    )
    # Bytes overwritten in the shard, a picture lost, a turn changed: 12 samples are no longer what their index was written for.
    assert found.faults["changed"] == 12 and found.is_bad(100.0)
    assert len(found.numbers["tokens"]) == 44 and max(found.numbers["tokens"]) <= longest
    assert sum(found.numbers["tiles"]) == 40 + 4 * 6  # seven tiles became six
    words = found.text()
    assert "too long: 4" in words and "tiles reduced to fit: 4 samples" in words and "not looked for" in words


def test_workers_find_the_same(tmp_path, tiny_processor):
    shards, longest = plant(tmp_path, tiny_processor, samples=20, each=2)
    one, two = (check_shards(shards, tiny_processor, max_tokens=longest, workers=workers) for workers in (0, 2))
    assert one.text() == two.text()


def test_a_clean_folder_passes(clean, tiny_folder, capsys):
    assert main(["check", "--shards", str(clean), "--model", str(tiny_folder), "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "6 samples in" in out and "tiles a sample" in out and "broken: 0" in out and "changed: 0" in out


@pytest.mark.parametrize("place", ["folder", "zip"])
def test_shared_pictures_are_found_by_bytes_and_by_pixels(clean, tmp_path, tiny_folder, capsys, place):
    """One copied, one saved in another format, one nobody else has, one that was never a picture."""
    evaluation = tmp_path / "evaluation" / "val"
    evaluation.mkdir(parents=True)
    (evaluation / "same.png").write_bytes((tmp_path / "images" / "2.png").read_bytes())
    picture(4).save(evaluation / "other_format.bmp")
    picture(99).save(evaluation / "new.png")
    (evaluation / "broken.jpg").write_bytes(b"nothing")
    target = tmp_path / "evaluation"
    if place == "zip":
        target = tmp_path / "evaluation.zip"
        with zipfile.ZipFile(target, "w") as archive:
            for path in evaluation.iterdir():
                archive.write(path, f"val/{path.name}")
    assert main(["check", "--shards", str(clean), "--model", str(tiny_folder), "--workers", "0", "--against", str(target)]) == 1
    out = capsys.readouterr().out
    assert "shared with an evaluation set: 2 pictures (of 7 hashes" in out
    lines = [line.strip() for line in out.splitlines() if " has " in line]
    assert len(lines) == 2 and lines[0].startswith("000000002 (2) has") and lines[0].endswith("same.png")
    assert lines[1].startswith("000000004 (4) has") and lines[1].endswith("other_format.bmp")


def test_another_evaluation_set_shares_nothing(clean, tmp_path, tiny_folder):
    (tmp_path / "other").mkdir()
    picture(77).save(tmp_path / "other" / "a.png")
    assert main(["check", "--shards", str(clean), "--model", str(tiny_folder), "--workers", "0", "--against", str(tmp_path / "other")]) == 0


def test_workers_read_whatever_way_python_starts_processes(clean, tmp_path, tiny_folder):
    """From Python 3.14 on processes are no longer forked by default, and the processor of a model cannot be pickled: no worker started."""
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("forkserver", force=True)
    try:
        arguments = ["--model", str(tiny_folder), "--workers", "1", "--against", str(tmp_path / "images")]
        assert main(["check", "--shards", str(clean), *arguments]) == 1  # its own pictures
    finally:
        torch.multiprocessing.set_start_method(before, force=True)


def test_faults_fail_the_check_above_the_limit(clean, tiny_folder, capsys):
    arguments = ["check", "--shards", str(clean), "--model", str(tiny_folder), "--workers", "0"]
    assert main([*arguments, "--max-tokens", "20"]) == 1
    assert "too long: 6" in capsys.readouterr().out
    assert main([*arguments, "--max-tokens", "20", "--max-skipped-percent", "100"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shards", "nowhere"], "no shards in nowhere"),
        (["--shards", "SHARDS", "--against", "nowhere"], "no images at nowhere"),
        (["--shards", "SHARDS", "--against", "EMPTY"], "holds no images"),
        (["--shards", "SHARDS", "--model", "nowhere"], "no model folder at nowhere"),
        (["--shards", "SHARDS", "--max-tiles", "0"], "max_tiles is 0; expected at least 1"),
    ],
)
def test_bad_input_is_one_clear_line(clean, tmp_path, tiny_folder, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"SHARDS": str(clean), "EMPTY": str(tmp_path / "empty")}
    given = ["--model", str(tiny_folder), *(places.get(argument, argument) for argument in arguments)]
    assert main(["check", "--workers", "0", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("shards: ") and message in error and error.count("\n") == 1


def test_a_damaged_index_is_one_clear_line(clean, tiny_folder, capsys):
    (index,) = clean.glob("*.index.jsonl")
    index.write_text(index.read_text() + "{")
    assert main(["check", "--shards", str(clean), "--model", str(tiny_folder)]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_histogram_counts_every_value_once():
    assert histogram([1, 1, 3], "tiles") == [
        "tiles", "                  1          2   66.7 %  ########################################",
        "                  3          1   33.3 %  ####################",
    ]  # fmt: skip
    values = list(range(100, 1100)) + [5000]
    lines = histogram(values, "tokens")[1:]
    assert len(lines) == 10 and "100 to 590" in lines[0]
    assert sum(int(line.split("%")[0].split()[3].replace(",", "")) for line in lines) == 1001
    assert histogram([], "x") == [] and len(histogram([7], "x")) == 2


def test_the_index_hash_is_checked(clean, tiny_processor):
    """A shard rewritten under an old index: every place may still fit, and the words be others."""
    (index,) = clean.glob("*.index.jsonl")
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    lines[3]["sha256"] = "0" * 64
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = check_shards(clean, tiny_processor, max_tokens=4096)
    assert found.faults["changed"] == 1 and found.skipped == 0 and "000000003" in found.examples["changed"][0]
