"""The account of what was read: skipping is counted, too much of it stops the run, and the account survives a kill."""

import json

import pytest
import torch
from planted_faults import plant

from train_vlm.batching import MicroBatchPositions, pack
from train_vlm.ledger import COUNTS, REASONS, Ledger, count_batches
from train_vlm.reading import SampleStream
from train_vlm.recipe import Source


@pytest.fixture(scope="module")
def planted(tiny_processor, tmp_path_factory):
    """A thousand samples, fifty of each kind of fault."""
    return plant(tmp_path_factory.mktemp("planted"), tiny_processor, samples=1000, each=50)


def sample(name, source=0, tokens=4, tiles=1, reduced=0):
    return {"source": source, "id": name, "input_ids": list(range(tokens)), "labels": [-100, -100, *range(2, tokens)],
            "pixels": torch.zeros(tiles, 2, 2, 3, dtype=torch.uint8), "tiles_reduced": reduced}  # fmt: skip


def skipped(name, reason="broken", source=0):
    return {"source": source, "id": name, "skipped": reason, "detail": "why"}


def counted(samples, sources=1):
    return count_batches([pack(samples, 0, 2)], sources)


def ledger_of(good, bad):
    ledger = Ledger(["scenes"])
    ledger.add(counted([sample(f"s{n}") for n in range(good)] + [skipped(f"b{n}") for n in range(bad)]))
    ledger.add_examples([(0, "broken", f"b{n}: why") for n in range(bad)])
    return ledger


def test_every_planted_fault_is_in_its_place():
    """Five kinds of sample in two sources: a count in a neighbour's column or source would be a wrong account."""
    samples = [sample("a", tokens=5, tiles=2), sample("b", source=1, tokens=3, tiles=0, reduced=2)]
    for source in (0, 1):
        samples += [skipped(f"{reason}{n}{source}", reason, source) for place, reason in enumerate(REASONS) for n in range(place + source)]
    ledger = Ledger(["scenes", "text"])
    assert ledger.add(counted(samples, sources=2)) == 4
    rows = ledger.to_dict()["sources"]
    first = dict(zip(COUNTS, [1 + 0 + 1 + 2 + 3, 0, 1, 2, 3, 0, 3, 5, 2], strict=True))
    second = dict(zip(COUNTS, [1 + 1 + 2 + 3 + 4, 1, 2, 3, 4, 2, 1, 3, 0], strict=True))
    assert rows == [{"source": "scenes", **first, "left_out": {}}, {"source": "text", **second, "left_out": {}}]
    assert ledger.skipped == 16 and ledger["seen"] == 18


def test_supervised_tokens_are_those_of_the_loss():
    """The loss is divided by this number: counted otherwise than the loss counts, every gradient has another length."""
    batch = pack([sample("a"), sample("b", tokens=7), {**sample("c"), "labels": [0, 1, 2, 3]}], 0, 2)
    assert Ledger(["x"]).add(count_batches([batch], 1)) == batch["supervised_tokens"] == 2 + 5 + 3


def test_few_skipped_samples_are_counted_and_too_many_stop_the_run():
    ledger_of(149, 50).check(1.0)  # too early to judge
    with pytest.raises(ValueError, match="25.0 % of 200 samples are unusable, at most 1.0 % .*50 of scenes broken, e.g. b0: why"):
        ledger_of(150, 50).check(1.0)
    ledger_of(150, 50).check(25.0)


def test_nothing_usable_stops_the_run_at_once():
    """A run of ten steps on a folder of broken pictures would end with a loss of 0 and a saved model."""
    with pytest.raises(ValueError, match="100.0 % of 8 samples are unusable"):
        ledger_of(0, 8).check(1.0)


def test_the_stream_s_hash_knows_samples_and_steps_but_not_who_read_them():
    """Ranks and micro-batches deal a step's samples out differently; another sample, or another step, is another stream."""
    samples = [sample(name) for name in "abcd"]

    def stream(*steps):
        ledger = Ledger(["x"])
        for parts in steps:
            ledger.add(sum(counted(part) for part in parts))
        return ledger.stream

    whole = stream([samples], [samples])
    assert whole == stream([samples[:1], samples[1:]], [samples[2:][::-1], samples[:2]])
    assert whole != stream([samples], [[*samples[:3], sample("e")]])
    assert stream([samples[:2]], [samples[2:]]) != stream([samples[2:]], [samples[:2]])
    assert whole != stream([samples]) and len(whole) == 16


def test_an_account_goes_through_json_and_on():
    first, whole = ledger_of(3, 2), ledger_of(3, 2)
    again = Ledger(["scenes"]).restore(json.loads(json.dumps(first.to_dict())))
    assert again.to_dict() == first.to_dict()
    for ledger in (again, whole):
        ledger.add(counted([sample("z"), skipped("y", "too long")]))
    assert again.to_dict() == whole.to_dict()
    with pytest.raises(ValueError, match="has 1 sources, the recipe 2"):
        Ledger(["a", "b"]).restore(first.to_dict())


def test_examples_stay_few():
    ledger = ledger_of(0, 50)
    assert ledger.examples == {"0: broken": ["b0: why", "b1: why", "b2: why"]}


def test_the_table_says_what_was_used_skipped_and_never_read():
    ledger = Ledger(["scenes", "text"], [{"image missing when the shards were written": 7}, {}])
    ledger.add(counted([sample("a", tokens=1500), skipped("b", source=1)], sources=2))
    ledger.add_examples([(1, "broken", "text/b: no picture")])
    lines = ledger.text().splitlines()
    assert lines[0].split() == "source seen skipped, broken tiles reduced supervised tokens tokens tiles never read".split()
    assert lines[1].split() == ["scenes", "1", "0", "0", "1,498", "1,500", "1", "7"]
    assert lines[2].split() == ["text", "1", "1", "0", "0", "0", "0", "0"]
    assert lines[3:] == [
        "skipped from text, broken: text/b: no picture",
        "never read of scenes: 7, image missing when the shards were written",
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_of_a_thousand_samples_exactly_the_planted_faults_are_counted(tiny_processor, planted, ranks):
    """5 % of every kind, spread over four shards and read in the order of a run by one rank or two: none missed, none twice, none in
    another's column."""
    shards, longest = planted
    stream = SampleStream((Source(str(shards)),), tiny_processor, seed=1, max_tokens=longest)
    readers = [iter(MicroBatchPositions(40, 1, rank, ranks, cost=lambda place: stream.expected(place)["tokens"])) for rank in range(ranks)]
    ledger, said = Ledger(["planted"]), []
    for _ in range(25):
        batches = [pack([stream[place] for place in next(reader)], 0, 64) for reader in readers]
        ledger.add(sum(count_batches([batch], 1) for batch in batches))
        said += [example for batch in batches for example in batch["skipped"]]
    ledger.add_examples(said)
    stream.sources[0].close()
    assert ledger["seen"] == 1000 and ledger.skipped == 200
    assert {reason: ledger[reason] for reason in REASONS} == dict.fromkeys(REASONS, 50) and ledger["tiles_reduced"] == 50
    # What was planted under a name is what was found under it. (A sample whose picture cannot be read has only its place for a name.)
    for _, reason, detail in said:
        assert detail.startswith(f"{reason} " if reason in ("too long", "nothing supervised") else "shards/")
    ledger.check(20.0)
    with pytest.raises(ValueError, match="20.0 % of 1000 samples are unusable, at most 19.9 %") as stopped:
        ledger.check(19.9)
    assert all(f"50 of planted {reason}, e.g. " in str(stopped.value) for reason in REASONS)
