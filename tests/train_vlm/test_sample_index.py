"""Indexes as columns: the same entries as the files' lines, without their memory."""

import json
import os
import tracemalloc

import pytest

from train_vlm.sample_index import OpenFiles, SampleIndex


def write(folder, shards: int, lines: int, ending: str = "\n") -> list:
    """Index files whose lines differ in length and in number of images, with blank lines and letters that some take for line ends."""
    paths = []
    for shard in range(shards):
        paths.append(folder / f"shard-{shard:06d}.tar")
        entries = []
        for number in range(lines + shard):
            place = shard * 100_000 + number
            tiles = [1 + (place + image) % 7 for image in range(place % 4)]
            entry = {"key": f"{place:09d}", "members": {"json": [512 * place, 40 + place]}, "tiles": tiles, "tokens": 100 + place,
                     "supervised_tokens": place % 11, "note": "\u2028ü" * (number % 3)}  # fmt: skip
            entries.append(json.dumps(entry, ensure_ascii=False) + ending + "\n" * (number % 5 == 0))
        paths[-1].with_suffix(".index.jsonl").write_bytes("".join(entries).encode())
    return paths


def lines_of(shards) -> list:
    return [(shard, json.loads(line)) for shard in shards
            for line in shard.with_suffix(".index.jsonl").read_bytes().split(b"\n") if line.strip()]  # fmt: skip


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_entries_and_columns_are_those_of_the_files(tmp_path, ending):
    shards = write(tmp_path, 3, 7, ending)
    index, expected = SampleIndex(shards, OpenFiles(2)), lines_of(shards)
    assert len(expected) == 24 and list(index) == expected
    assert index.tokens.tolist() == [entry["tokens"] for _, entry in expected]
    assert index.supervised_tokens.tolist() == [entry["supervised_tokens"] for _, entry in expected]
    assert [index.tiles(number) for number in range(24)] == [entry["tiles"] for _, entry in expected]
    with pytest.raises(IndexError, match="sample 24 of 24"):
        index[24]


def test_samples_of_more_tiles_have_no_number(tmp_path):
    shards = write(tmp_path, 2, 9)
    index, all_of_them = SampleIndex(shards, OpenFiles(2), at_most_tiles=5), lines_of(shards)
    few = [(shard, entry) for shard, entry in all_of_them if sum(entry["tiles"]) <= 5]
    assert list(index) == few and 0 < index.left_out == len(all_of_them) - len(few)
    assert [index.tiles(number) for number in range(len(few))] == [entry["tiles"] for _, entry in few]


def test_a_shard_none_of_whose_samples_are_taken_is_nobody_s(tmp_path):
    """Numbers behind it would be looked for in it."""
    shards = write(tmp_path, 3, 2)
    for shard, tiles in zip(shards, (1, 9, 1), strict=True):
        path = shard.with_suffix(".index.jsonl")
        entries = [json.loads(line) | {"tiles": [tiles]} for line in path.read_bytes().split(b"\n") if line.strip()]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    index = SampleIndex(shards, OpenFiles(2), at_most_tiles=2)
    assert [shard for shard, _ in index] == [shards[0]] * 2 + [shards[2]] * 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Expecting property name"),
        ("[1]", "no attribute 'keys'"),
        ('{"key": "a", "tiles": [], "tokens": 1}', "a line without members"),
    ],
)
def test_a_damaged_line_is_told_with_its_file(tmp_path, line, words):
    shards = write(tmp_path, 1, 3)
    path = shards[0].with_suffix(".index.jsonl")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=f"index .*shard-000000.index.jsonl is damaged .*{words}.*write the shards again"):
        SampleIndex(shards, OpenFiles(2))


def test_a_sample_takes_some_thirty_bytes(tmp_path):
    """1.7 KB as dictionaries, in each rank and each of its readers."""
    shards = write(tmp_path, 1, 20_000)
    tracemalloc.start()
    index = SampleIndex(shards, OpenFiles(2))
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(index) == 20_000 and taken / 20_000 < 50


def test_only_so_many_files_stay_open(tmp_path):
    for number in range(5):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 10)
    files = OpenFiles(2)
    for number in (0, 1, 0, 2, 0, 3, 4, 0):
        assert files.read(tmp_path / str(number), 8, 4) == bytes([number]) * 2  # what is there
        assert len(files._files) <= 2
    files.close()
    assert not files._files and files.read(tmp_path / "1", 0, 1) == b"\x01"


def test_what_comes_in_pieces_is_read_whole(tmp_path, monkeypatch):
    """Some file systems give less than what is asked for, before the end."""
    (tmp_path / "a").write_bytes(bytes(range(100)))
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, offset: real(handle, min(size, 7), offset))
    assert OpenFiles(2).read(tmp_path / "a", 10, 50) == bytes(range(10, 60))
    assert OpenFiles(2).read(tmp_path / "a", 90, 50) == bytes(range(90, 100))
