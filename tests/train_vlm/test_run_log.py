"""The account of what was read: skipping is counted, and too much of it stops the run."""

import json

import pytest

from train_vlm.run_log import Ledger, RunLog


def batch(seen, skipped=0):
    return {"seen": [0] * seen, "tiles_reduced": 1, "skipped": [(0, "broken", f"s{number}: why") for number in range(skipped)]}


def test_few_skipped_samples_are_counted_and_too_many_stop_the_run():
    ledger = Ledger()
    ledger.add(batch(199, 50))
    ledger.check(1.0)  # too early to judge
    ledger.add(batch(1))
    with pytest.raises(ValueError, match="25.0 % of 200 samples are unusable, at most 1.0 % are accepted .*50 broken, e.g. s0: why"):
        ledger.check(1.0)
    ledger.check(25.0)


def test_nothing_usable_stops_the_run_at_once():
    """A run of ten steps on a folder of broken pictures would end with a loss of 0 and a saved model."""
    ledger = Ledger()
    ledger.add(batch(8, 8))
    with pytest.raises(ValueError, match="100.0 % of 8 samples are unusable"):
        ledger.check(1.0)


def test_the_account_is_json():
    ledger = Ledger()
    ledger.add(batch(5, 2))
    account = json.loads(json.dumps(ledger.to_dict()))
    assert account == {"seen": {"0": 5}, "skipped": {"0: broken": 2}, "examples": {"0: broken": "s0: why"}, "tiles_reduced": 1}


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, 10, "sft")
    log.advance()
    log.record(1, {"loss": 1.0, "lr/projector": 0.1})
    log.close({"steps": 1})
    assert not list(tmp_path.iterdir())
