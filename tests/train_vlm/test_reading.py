"""The stream of samples: each once an epoch, the same for any number of ranks, sources by weight, damage counted."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from train_vlm.batching import MicroBatchPositions
from train_vlm.reading import SampleStream, ShardedSource, blend_cycle
from train_vlm.recipe import Source
from train_vlm.shards import convert


def write(folder, processor, count, name):
    images = folder / f"{name}-images"
    images.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 200, 3), dtype=np.uint8)).save(images / "a.png")
    samples = [
        {"id": f"{name}{number}", "image": "a.png" if number % 3 == 0 else [],
         "conversations": [{"from": "human", "value": ("<image>\n" if number % 3 == 0 else "") + f"q{number}"},
                           {"from": "gpt", "value": str(number)}]}
        for number in range(count)
    ]  # fmt: skip
    convert(samples, images, processor, folder / name, samples_per_shard=5)
    return folder / name


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tiny_processor):
    folder = tmp_path_factory.mktemp("reading")
    return {"a": write(folder, tiny_processor, 13, "a"), "b": write(folder, tiny_processor, 4, "b")}


@pytest.fixture
def stream(shards, tiny_processor):
    def stream(*sources, seed=3, max_tokens=1000):
        settings = tuple(Source(shards=str(shards[name]), weight=weight) for name, weight in sources)
        return SampleStream(settings, tiny_processor, seed=seed, max_tokens=max_tokens)

    return stream


def test_each_sample_comes_once_an_epoch_in_a_new_order(stream):
    """Drawn with replacement, a third of the data would be missed each epoch."""
    one = stream(("a", 1.0))
    epochs = [[one.locate(position)[1] for position in range(epoch * 13, (epoch + 1) * 13)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_is_the_seed_s_alone(stream):
    """Another process, or a start in the middle, must find the same samples at the same places."""
    one, same, other = stream(("a", 1.0)), stream(("a", 1.0)), stream(("a", 1.0), seed=4)
    expected = [one.locate(position) for position in range(40)]
    assert [same.locate(position) for position in reversed(range(40))] == expected[::-1]
    assert [other.locate(position) for position in range(40)] != expected


def test_sources_are_mixed_by_weight_and_each_keeps_its_epochs(stream):
    mixed = stream(("a", 3.0), ("b", 1.0))
    drawn = [mixed.locate(position) for position in range(2000)]
    assert Counter(source for source, _ in drawn) == {0: 1500, 1: 500}
    assert Counter(source for source, _ in drawn[:40]) == {0: 30, 1: 10}
    for source, size in ((0, 13), (1, 4)):
        numbers = [number for where, number in drawn if where == source]
        for start in range(0, len(numbers) - size, size):
            assert sorted(numbers[start : start + size]) == list(range(size))


def test_a_blend_is_spread_evenly():
    """All of one source first would make a curriculum nobody asked for."""
    cycle = blend_cycle([1, 2, 5], 800)
    assert Counter(cycle) == {0: 100, 1: 200, 2: 500}
    assert all(Counter(cycle[start : start + 8]) == {0: 1, 1: 2, 2: 5} for start in range(0, 800, 8))


def test_a_weight_too_small_to_be_read_is_refused(stream):
    """It would be a source in the recipe and in no step."""
    with pytest.raises(ValueError, match="raise it or leave the source out"):
        stream(("a", 1.0), ("b", 1e-5))


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (8, 1)])
def test_any_split_of_a_step_reads_the_same_samples(ranks, micro_batches):
    """1x4, 2x2 and 4x1 must be the same run."""
    steps = []
    for step in range(3):
        positions = []
        for rank in range(ranks):
            batches = iter(MicroBatchPositions(8, micro_batches, rank, ranks))
            for _ in range(step * micro_batches):
                next(batches)
            for _ in range(micro_batches):
                positions += next(batches)
        steps.append(sorted(positions))
    assert steps == [list(range(start, start + 8)) for start in (0, 8, 16)]


def test_a_later_start_reads_on():
    late, early = iter(MicroBatchPositions(4, 2, 0, 1, first_step=5)), iter(MicroBatchPositions(4, 2, 0, 1))
    for _ in range(10):
        next(early)
    assert [next(late) for _ in range(4)] == [next(early) for _ in range(4)]


def test_a_sample_is_ids_labels_and_pixels(stream, tiny_processor):
    one = stream(("a", 1.0))
    for position in range(13):
        sample = one[position]
        assert len(sample["input_ids"]) == len(sample["labels"])
        assert sample["input_ids"].count(tiny_processor.renderer.image_ids(1)[2]) == 16 * len(sample["pixels"])
        number = sample["id"].removeprefix("a")
        assert tiny_processor.tokenizer.decode([label for label in sample["labels"] if label >= 0], skip_special_tokens=True) == number


def test_tiles_are_limited_by_source_and_by_length(shards, tiny_processor):
    def tiles(**settings):
        stream = SampleStream((Source(shards=str(shards["a"]), **settings),), tiny_processor, seed=0, max_tokens=1000)
        return max(len(stream[position]["pixels"]) for position in range(13))

    assert tiles() == 4 and tiles(max_tiles=1) == 1
    few = SampleStream((Source(shards=str(shards["a"]), at_most_tiles=1),), tiny_processor, seed=0, max_tokens=1000)
    assert len(few.sources[0]) == 8 and few.sources[0].left_out == 5


def test_more_tiles_than_the_model_cuts_are_refused(shards, tiny_processor):
    """Each larger picture would be refused as broken, and indexes, which count up to the model's limit, would promise packs too short."""
    most = tiny_processor.image_processor.max_tiles
    with pytest.raises(ValueError, match=f"max_tiles of .* is {most + 1}; the model cuts an image into at most {most} tiles"):
        SampleStream((Source(shards=str(shards["a"]), max_tiles=most + 1),), tiny_processor, seed=0, max_tokens=1000)


def test_what_is_too_long_is_skipped_with_a_reason(stream):
    reasons = {stream(("a", 1.0), max_tokens=3)[position]["skipped"] for position in range(13)}
    assert reasons == {"too long"}


def test_damage_in_a_shard_is_skipped_with_a_reason(shards, tmp_path, tiny_processor):
    """A picture whose bytes are broken, and a shard cut off: the run goes on and counts."""
    folder = write(tmp_path, tiny_processor, 4, "c")
    (shard,) = folder.glob("*.tar")
    entry = ShardedSource(folder).entries[0][1]
    offset, size = entry["members"]["0.png"]
    content = bytearray(shard.read_bytes())
    content[offset : offset + size] = b"\x00" * size
    last = ShardedSource(folder).entries[3][1]["members"]["0.png"][0]
    shard.write_bytes(content[: last + 10])
    stream = SampleStream((Source(shards=str(folder)),), tiny_processor, seed=0, max_tokens=1000)
    results = [stream[position] for position in range(4)]
    broken = [result["detail"] for result in results if "skipped" in result]
    assert (
        len(broken) == 2
        and any("is truncated" in detail for detail in broken)
        and any("not a readable image" in detail for detail in broken)
    )


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no shards in"):
        ShardedSource(tmp_path)
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="has no index x.index.jsonl"):
        ShardedSource(tmp_path)
    (tmp_path / "x.index.jsonl").write_text("{")
    with pytest.raises(ValueError, match="x.index.jsonl is damaged"):
        ShardedSource(tmp_path)
    (tmp_path / "x.index.jsonl").write_text("")
    with pytest.raises(ValueError, match="hold 0 samples"):
        ShardedSource(tmp_path)


def test_the_index_is_json_lines(shards):
    """Other tools read it with one line of code."""
    for path in shards["a"].glob("*.index.jsonl"):
        for line in path.read_text().splitlines():
            assert {"key", "members", "tiles", "tokens", "sha256"} <= json.loads(line).keys()
