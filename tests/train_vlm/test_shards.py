"""Shards: what goes in comes out, the index tells the truth, and what is unusable is counted by reason."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train_vlm import shard_writing
from train_vlm.reading import SampleStream, ShardedSource
from train_vlm.recipe import Source
from train_vlm.shards import convert, main

ROOT = Path(__file__).resolve().parents[2]


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def turns(question, answer="red"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, size in enumerate([(64, 64), (200, 64), (64, 130)]):
        noise(*size, number).save(folder / f"{number}.png")
    noise(50, 50, 9).save(folder / "photo.with.dots.JPG", "JPEG")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:100])
    return folder


GOOD = [
    {"id": "one", "image": "0.png", "conversations": turns("<image>\nWhat colour?")},
    {"id": "two", "image": ["1.png", "2.png"], "conversations": turns("<image><image>\nWhich?", "the first")},
    {"id": "text", "conversations": turns("No picture, but <image> in the text.")},
    {"id": 4, "image": "photo.with.dots.JPG", "conversations": turns("<image>\nAnd?")},
    {"id": "five", "image": "2.png", "conversations": turns("<image>\nLast?")},
]
BAD = {
    "image missing": {"id": "m", "image": "nowhere.png", "conversations": turns("<image>")},
    "image broken": {"id": "b", "image": "broken.png", "conversations": turns("<image>")},
    "malformed": {"id": "x", "conversations": "hello"},
    "nothing supervised": {"id": "n", "image": "0.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]},
}


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_answer_without_words_teaches_nothing(tmp_path, images, tiny_processor, monkeypatch, answer):
    """The end of its turn is a token to learn: a set with blank answers taught the model to say nothing, and no count showed it."""
    blank = {"id": "blank", "image": "0.png", "conversations": turns("<image>\nWhat colour?", answer)}
    assert convert([GOOD[0], blank], images, tiny_processor, tmp_path / "out")["skipped"] == {"nothing supervised": 1}
    monkeypatch.setattr(shard_writing, "has_answer", lambda messages: True)  # shards that were written before
    convert([blank], images, tiny_processor, tmp_path / "old")
    stream = SampleStream((Source(str(tmp_path / "old")),), tiny_processor, seed=0, max_tokens=1000)
    assert stream[0]["skipped"] == "nothing supervised"


def test_a_text_beside_the_turns_is_not_the_sample(tmp_path, images, tiny_processor):
    """Data sets often have the whole conversation once more as "text": it was trained on as plain text, without the picture."""
    messages = [{"role": "user", "content": [{"type": "image", "image": "0.png"}]}, {"role": "assistant", "content": "red"}]
    convert([{"id": "a", "messages": messages, "text": "user: assistant: red"}], images, tiny_processor, tmp_path / "out")
    source = ShardedSource(tmp_path / "out")
    (_, read), _ = source.read(0), source.close()
    assert [message["role"] for message in read] == ["user", "assistant"]


@pytest.mark.parametrize("name", ["photo.gz", "photo", "photo.jpg?width=64"])
def test_a_picture_s_bytes_are_kept_whatever_its_file_is_called(tmp_path, images, tiny_processor, name):
    """By the name .gz webdataset compressed them: a good picture was a broken one in the shard."""
    content = (images / "0.png").read_bytes()
    (images / name).write_bytes(content)
    convert([{"id": "a", "image": name, "conversations": turns("<image>")}], images, tiny_processor, tmp_path / "out")
    source = ShardedSource(tmp_path / "out")
    (_, read), _ = source.content(0), source.close()
    assert read == [content]


def test_missing_webdataset_is_told_with_the_command(tmp_path, tiny_folder, monkeypatch, capsys):
    (tmp_path / "words.txt").write_text("a red ball")
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert main(["convert", "--text", str(tmp_path / "words.txt"), "--model", str(tiny_folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("shards: writing shards needs webdataset") and "pip install 'nemotron-h-vision[train]'" in error


def test_samples_come_back_as_they_went_in(tmp_path, images, tiny_processor):
    """Over several shards: words, pictures in their order, and every number of the index."""
    summary = convert(GOOD, images, tiny_processor, tmp_path / "out", samples_per_shard=2)
    assert (summary["samples"], summary["shards"], summary["skipped"]) == (5, 3, {})
    source = ShardedSource(tmp_path / "out")
    assert len(source) == 5
    names = [source.read(number)[0] for number in range(5)]
    assert names == ["one", "two", "text", "4", "five"]
    _, messages = source.read(1)
    pictures = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    assert [picture.size for picture in pictures] == [(200, 64), (64, 130)]
    assert np.array_equal(np.asarray(pictures[0]), np.asarray(Image.open(images / "1.png")))
    assert messages[1]["content"] == [{"type": "text", "text": "the first"}]
    for number in range(5):
        _, messages = source.read(number)
        prepared = tiny_processor.prepare(messages)
        entry = source.entries[number][1]
        assert entry["tiles"] == prepared.num_tiles and entry["tokens"] == len(prepared.rendered.input_ids)
        assert entry["supervised_tokens"] == sum(label >= 0 for label in prepared.rendered.labels)
    assert summary["tokens"] == sum(entry["tokens"] for _, entry in source.entries)


def test_the_index_points_at_the_bytes_and_hashes_them(tmp_path, images, tiny_processor):
    """An offset of the header instead of the data would be off by 512 bytes."""
    convert(GOOD[:2], images, tiny_processor, tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.tar")
    lines = [json.loads(line) for line in shard.with_suffix(".index.jsonl").read_text().splitlines()]
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        for line in lines:
            parts = []
            for extension, (offset, size) in sorted(line["members"].items(), key=lambda item: item[0] != "json"):
                data = tar.extractfile(f"{line['key']}.{extension}").read()
                assert content[offset : offset + size] == data
                parts.append(data)
            assert line["sha256"] == hashlib.sha256(b"".join(parts)).hexdigest()


def test_shards_are_the_same_every_time(tmp_path, images, tiny_processor):
    """No time stamp, no user name, whatever number of processes decodes the pictures: two machines write the same bytes."""
    bad = {"id": "bad", "image": "nowhere.png", "conversations": GOOD[0]["conversations"]}
    found = {}
    for workers in (0, 0, 2):
        place = tmp_path / f"{workers} {len(found)}"
        summary = convert([bad, *GOOD, *GOOD, bad], images, tiny_processor, place, samples_per_shard=4, workers=workers)
        found[place] = summary | {"seconds": 0}, {path.name: path.read_bytes() for path in place.glob("shard-*")}
    first, *others = found.values()
    assert len(first[1]) == 6 and first[0]["skipped"] == {"image missing": 2} and all(other == first for other in others)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its file open
def test_webdataset_reads_our_shards(tmp_path, images, tiny_processor):
    """The format is webdataset's: its users open our files."""
    import webdataset

    convert(GOOD, images, tiny_processor, tmp_path / "out")
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False))
    assert len(samples) == 5 and Image.open(io.BytesIO(samples[1]["0.png"])).size == (200, 64)


def test_unusable_samples_are_counted_by_reason(tmp_path, images, tiny_processor):
    summary = convert([*BAD.values(), *GOOD], images, tiny_processor, tmp_path / "out")
    assert summary["samples"] == 5 and summary["skipped"] == dict.fromkeys(BAD, 1)
    assert "sample m" in summary["examples"]["image missing"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["skipped"] == summary["skipped"]


def test_no_usable_sample_is_an_error_with_the_reasons(tmp_path, images, tiny_processor):
    with pytest.raises(ValueError, match="none of 4 samples is usable: .*nowhere.png"):
        convert(list(BAD.values()), images, tiny_processor, tmp_path / "out")


def test_older_shards_do_not_stay(tmp_path, images, tiny_processor):
    """Three shards yesterday, one today: two old ones would be trained on in silence."""
    convert(GOOD, images, tiny_processor, tmp_path / "out", samples_per_shard=1)
    convert(GOOD[:1], images, tiny_processor, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("shard*")) == ["shard-000000.index.jsonl", "shard-000000.tar"]


def test_shards_of_a_stopped_conversion_are_not_read(tmp_path, images, tiny_processor, monkeypatch):
    """Killed after three of five shards, the first time and over an earlier conversion: three whole shards, which trained in silence."""
    real = shard_writing._index_of

    def killed(shard, facts):
        if shard.name == "shard-000003.tar":
            raise KeyboardInterrupt
        return real(shard, facts)

    for earlier in (False, True):
        folder = tmp_path / str(earlier)
        if earlier:
            convert(GOOD, images, tiny_processor, folder, samples_per_shard=1)
        monkeypatch.setattr(shard_writing, "_index_of", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(GOOD, images, tiny_processor, folder, samples_per_shard=1)
        monkeypatch.setattr(shard_writing, "_index_of", real)
        (folder / "shard-000003.tar").unlink()  # a kill a moment earlier: the three before it are whole
        with pytest.raises(ValueError, match="holds 3 samples and no summary.json.*convert its samples again"):
            ShardedSource(folder)
        convert(GOOD, images, tiny_processor, folder, samples_per_shard=1)
        assert len(ShardedSource(folder)) == 5


def test_shards_lost_after_the_conversion_are_missed(tmp_path, images, tiny_processor):
    """A copy that ended early; tiles left out by the recipe are none of it."""
    convert(GOOD, images, tiny_processor, tmp_path / "out", samples_per_shard=2)
    assert len(ShardedSource(tmp_path / "out", at_most_tiles=0)) < 5
    for path in (tmp_path / "out").glob("shard-000002*"):
        path.unlink()
    with pytest.raises(ValueError, match="list 4 samples, its summary.json 5; convert its samples again"):
        ShardedSource(tmp_path / "out")
    (tmp_path / "out" / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="summary.json is damaged"):
        ShardedSource(tmp_path / "out")


def run(tmp_path, images, model, samples, *more):
    file = tmp_path / "llava.json"
    file.write_text(samples if isinstance(samples, str) else json.dumps(samples))
    return main(["convert", "--llava", str(file), "--images", str(images), "--model", str(model), "--out", str(tmp_path / "out"), *more])


def test_the_command_writes_shards(tmp_path, images, tiny_folder, capsys):
    assert run(tmp_path, images, tiny_folder, GOOD) == 0
    assert "5 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("samples", "message"),
    [("{", "is no valid JSON"), ("[]", "holds no samples"), ([BAD["malformed"]], "none of 1 samples is usable"),
     ([BAD["image missing"], *GOOD], "16.7 % of the samples are unusable")],
)  # fmt: skip
def test_the_command_fails_with_one_clear_line(tmp_path, images, tiny_folder, capsys, samples, message):
    assert run(tmp_path, images, tiny_folder, samples) == 2
    assert message in capsys.readouterr().err


def test_the_command_names_a_missing_model(tmp_path, images, capsys):
    assert run(tmp_path, images, tmp_path / "nowhere", GOOD) == 2
    assert "no model folder at" in capsys.readouterr().err


def test_more_unusable_samples_can_be_accepted(tmp_path, images, tiny_folder):
    assert run(tmp_path, images, tiny_folder, [BAD["image missing"], *GOOD], "--max-skipped-percent", "20") == 0


def test_ctrl_c_is_one_line(tmp_path, images, tiny_folder, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("train_vlm.shards.convert", interrupted)
    (tmp_path / "samples.json").write_text(json.dumps(GOOD[:1]))
    assert main(["convert", "--llava", str(tmp_path / "samples.json"), "--images", str(images), "--model", str(tiny_folder), "--out",
                 str(tmp_path / "out")]) == 130  # fmt: skip
    assert capsys.readouterr().err == "shards: convert interrupted; it begins anew\n"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_disk_that_fails_ends_a_conversion_in_one_line(tmp_path, images, tiny_folder, workers):
    """With readers it was a page, and the process stayed: Python waits for children that do not listen to its SIGTERM."""
    sample = {"id": "a", "image": "/proc/self/mem", "conversations": GOOD[0]["conversations"]}  # gives an input/output error
    (tmp_path / "samples.json").write_text(json.dumps([*GOOD, sample, *GOOD]))
    done = subprocess.run([sys.executable, "-m", "train_vlm.shards", "convert", "--llava", tmp_path / "samples.json", "--images", images,
                           "--model", tiny_folder, "--out", tmp_path / "out", "--workers", workers],
                          cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "shards: [Errno 5] Input/output error" and "Trace" not in done.stderr
