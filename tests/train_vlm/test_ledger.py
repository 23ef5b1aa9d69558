"""The account of what was read: skipping is counted, too much of it stops the run, and it goes on where a checkpoint left it."""

import json

import pytest
import torch

from train_vlm.ledger import Ledger, count_batches


def counts(seen, skipped=0, first=0):
    samples = [
        {"source": 0, "id": f"s{number}", "tiles_reduced": 0, "supervised_tokens": 2, "tokens": 10, "tiles": 1}
        for number in range(first, first + seen - skipped)
    ]
    skips = [(0, "broken", f"s{number}: why") for number in range(skipped)]
    ids = [sample["id"] for sample in samples] + [f"bad{number}" for number in range(skipped)]
    return count_batches([{"seen": [0] * seen, "skipped": skips, "samples": samples, "ids": ids}], 1), skips


def ledger_of(*parts):
    ledger = Ledger(["a"], [{}])
    for part, skips in parts:
        ledger.add(part)
        ledger.add_examples(skips)
    return ledger


def test_few_skipped_samples_are_counted_and_too_many_stop_the_run():
    ledger = ledger_of(counts(199, 50))
    ledger.check(1.0)  # too early to judge
    ledger.add(counts(1)[0])
    with pytest.raises(ValueError, match="25.0 % of 200 samples are unusable, at most 1.0 % are accepted .*50 of a broken, e.g. s0: why"):
        ledger.check(1.0)
    ledger.check(25.0)


def test_nothing_usable_stops_the_run_at_once():
    """A run of ten steps on a folder of broken pictures would end with a loss of 0 and a saved model."""
    with pytest.raises(ValueError, match="100.0 % of 8 samples are unusable"):
        ledger_of(counts(8, 8)).check(1.0)


def test_a_step_gives_its_supervised_tokens():
    assert Ledger(["a"], [{}]).add(counts(5, 2)[0]) == 6


def test_the_account_goes_on_from_its_json():
    whole = ledger_of(counts(5, 2), counts(4, first=9))
    saved = json.loads(json.dumps(ledger_of(counts(5, 2)).to_dict()))
    again = Ledger(["a"], [{}]).restore(saved)
    again.add(counts(4, first=9)[0])
    assert again.to_dict() == whole.to_dict() and whole["seen"] == 9 and whole["broken"] == 2
    with pytest.raises(ValueError, match="has 1 sources, the recipe 2"):
        Ledger(["a", "b"], [{}, {}]).restore(saved)


def test_the_stream_s_hash_does_not_depend_on_who_read_a_sample():
    """Two ranks with half of a step's samples each, summed, give what one rank gives; other samples give another hash."""
    one = ledger_of(counts(6))
    two = Ledger(["a"], [{}])
    two.add(torch.add(counts(3)[0], counts(3, first=3)[0]))
    other = ledger_of(counts(6, first=1))
    assert one.to_dict()["stream"] == two.to_dict()["stream"] != other.to_dict()["stream"]
