"""Memory of a rank by ZeRO's own arithmetic, against figures worked out by hand."""

import pytest

from train_vlm.memory_plan import CARDS_GB, GIB, MemoryRow, cards_that_fit, checkpoint_bytes, memory_rows, moved_bytes
from vlm.decoder import param_count, preset_config


def rows(*arguments, **settings):
    return {(row.zero_stage, row.offload): row for row in memory_rows(*arguments, **settings)}


def test_a_full_8b_costs_121_gib_with_gradients_in_bfloat16_and_15_more_with_their_sums_in_float32():
    """8,100,852,736 parameters x 16 bytes = 120.7 GiB, the usual figure; ours are 18 bytes, 135.8 GiB."""
    row = rows(param_count(preset_config("8b")), 0, 1)[1, None]
    assert (row.weights + row.gradients / 2 + row.optimizer) / GIB == pytest.approx(120.7, abs=0.05)
    assert row.card / GIB == pytest.approx(135.8, abs=0.05)
    assert cards_that_fit(row, 0.0) == []


def test_each_stage_shares_one_more_thing_out():
    """1e9 parameters on 4 ranks, by hand: 2, 4 and 12 GB whole."""
    found = rows(10**9, 0, 4)
    shares = {stage: (found[stage, None].weights, found[stage, None].gradients, found[stage, None].optimizer) for stage in (1, 2, 3)}
    assert shares == {1: (2e9, 4e9, 3e9), 2: (2e9, 1e9, 3e9), 3: (0.5e9, 1e9, 3e9)}
    assert found[3, None].gathered == 2e9 and found[2, None].gathered == 0 and (0, None) not in found


def test_what_is_offloaded_lies_in_the_machine():
    found = rows(10**9, 2 * 10**9, 4)
    assert (found[2, "optimizer"].card, found[2, "optimizer"].host) == (6e9, 4e9)  # all weights | a quarter of 4 + 12
    assert (found[3, "optimizer"].weights, found[3, "optimizer"].host) == (1.5e9, 4e9)
    assert (found[3, "all"].weights, found[3, "all"].host) == (0.0, 5.5e9)
    assert (found[1, "optimizer"].gradients, found[1, "optimizer"].host) == (4e9, 4e9)  # ZeRO 1 keeps whole gradients on the card


def test_a_frozen_parameter_is_its_weight():
    row = rows(0, 10**9, 8)[1, None]
    assert (row.weights, row.gradients, row.optimizer) == (2e9, 0, 0)


def test_float32_has_no_second_copy_and_muon_one_moment():
    assert rows(10**9, 0, 1, precision="float32")[0, None].card == 16e9
    assert rows(10**9, 0, 1, precision="float32", kind="muon").keys() == {(0, None)}
    assert rows(10**9, 0, 1, precision="float32", kind="muon")[0, None].card == 12e9


def test_every_rank_reads_the_whole_model():
    """47 billion parameters on 64 cards are 1.5 GB of weights each, and 94 GB in the machine's memory for each rank at the start."""
    row = rows(0, 47 * 10**9, 64)[3, None]
    assert row.whole == 94e9 and row.card < 10e9 and cards_that_fit(row, 0.0) == list(CARDS_GB)


def test_what_a_checkpoint_takes_and_a_pack_moves():
    """1e9 that train and 2e9 that do not: 2 + 12 bytes of the first on disk; all weights twice and gradients once through the network."""
    assert checkpoint_bytes(10**9) == 14e9 and checkpoint_bytes(10**9, precision="float32") == 12e9
    assert moved_bytes(10**9, 2 * 10**9) == 14e9


def test_a_card_keeps_a_reserve():
    """22.5 GB of weights on a card of 24 GB leave too little for CUDA and its buffers."""
    assert cards_that_fit(MemoryRow(1, None, 22.5e9, 0, 0, 0, 0), 0.0) == [40, 48, 80, 141]
    assert cards_that_fit(MemoryRow(1, None, 21.5e9, 0, 0, 0, 0), 0.0) == list(CARDS_GB)
    assert cards_that_fit(MemoryRow(1, None, 21.5e9, 0, 0, 0, 0), 1e9) == [40, 48, 80, 141]
