"""The scan for short sequences and for one token equals the recurrence written as a loop in float64."""

import random

import pytest
import torch

from vlm.decoder import short_scan as module
from vlm.decoder.short_scan import scan_step, short_scan
from vlm.decoder.ssd import recurrent_scan


def inputs(rows, length, heads, width, groups, state, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows * 1000 + length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    steps = normal(rows, length, heads).abs()
    return (normal(rows, length, heads, width), steps, -normal(heads).abs(), normal(rows, length, groups, state),
            normal(rows, length, groups, state), normal(heads), normal(rows, heads, width, state))  # fmt: skip


@pytest.mark.parametrize("cached_bytes", [1, 2**14, 2**30])
@pytest.mark.parametrize("is_fresh", [False, True])
def test_random_shapes_equal_the_recurrence(monkeypatch, cached_bytes, is_fresh):
    """Whatever the number of rows worked on together."""
    monkeypatch.setattr(module, "CACHED_BYTES", cached_bytes)
    draw = random.Random(cached_bytes)
    for _ in range(8):
        groups = draw.choice((1, 2, 3))
        x, steps, A, B, C, D, states = inputs(draw.randint(1, 7), draw.choice((1, 2, 17, 128)), groups * draw.choice((1, 2)), 4, groups, 6)
        expected, after = recurrent_scan(x, steps, A, B, C, D, initial_states=None if is_fresh else states)
        found = short_scan(x, steps, A, B, C, D, states, is_fresh=is_fresh)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(states, after)


@pytest.mark.parametrize("cached_bytes", [1, 2**14, 2**30])
def test_rows_go_on_from_a_common_state_and_leave_it_alone(monkeypatch, cached_bytes):
    monkeypatch.setattr(module, "CACHED_BYTES", cached_bytes)
    draw = random.Random(cached_bytes)
    for _ in range(8):
        groups = draw.choice((1, 2, 3))
        x, steps, A, B, C, D, states = inputs(draw.randint(1, 7), draw.choice((1, 2, 17)), groups * draw.choice((1, 2)), 4, groups, 6)
        common = torch.randn(states.shape[1:], dtype=states.dtype)
        kept = common.clone()
        expected, after = recurrent_scan(x, steps, A, B, C, D, initial_states=common.expand_as(states).clone())
        found = short_scan(x, steps, A, B, C, D, states, common=common)  # what stood in `states` is not read
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(states, after)
        assert torch.equal(common, kept)


def test_padding_neither_decays_nor_feeds_the_state():
    x, steps, A, B, C, D, states = inputs(2, 9, 4, 8, 2, 16)
    steps[1, 5:] = 0.0
    expected, after = recurrent_scan(x[1:, :5], steps[1:, :5], A, B[1:, :5], C[1:, :5], D, initial_states=states[1:])
    found = short_scan(x, steps, A, B, C, D, states)
    torch.testing.assert_close(found[1:, :5], expected)
    torch.testing.assert_close(states[1:], after)


@pytest.mark.parametrize("cached_bytes", [1, 2**30])
def test_a_step_equals_a_sequence_of_one(monkeypatch, cached_bytes):
    monkeypatch.setattr(module, "CACHED_BYTES", cached_bytes)
    x, steps, A, B, C, D, states = inputs(5, 1, 6, 4, 3, 8)
    expected, after = recurrent_scan(x, steps, A, B, C, D, initial_states=states)
    found = scan_step(x[:, 0], steps[:, 0], A, B[:, 0], C[:, 0], D, states)
    torch.testing.assert_close(found, expected[:, 0])
    torch.testing.assert_close(states, after)


def test_a_strong_decay_does_not_overflow():
    """exp(a_l - a_s) above the diagonal would be infinite, and infinite times zero is no number."""
    x, steps, A, B, C, D, states = inputs(1, 60, 2, 4, 1, 4, torch.float32)
    found = short_scan(x, steps * 100, A * 100, B, C, D, states)
    assert found.isfinite().all() and states.isfinite().all()
