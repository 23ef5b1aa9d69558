"""The kept state: forking rows, slots, and its size."""

import torch

from vlm.decoder.state import DecoderState


def filled() -> DecoderState:
    generator = torch.Generator().manual_seed(0)
    state = DecoderState()
    state.convolution[0] = torch.randn(3, 3, 5, generator=generator)
    state.ssm[0] = torch.randn(3, 2, 4, 6, generator=generator)
    state.keys[1], state.values[1] = torch.randn(3, 2, 7, 4, generator=generator), torch.randn(3, 2, 7, 4, generator=generator)
    state.append_slots(torch.ones(3, 7, dtype=torch.bool))
    return state


def test_selected_rows_are_copies():
    """A fork that shares memory with its origin would let one question write into another's state."""
    state = filled()
    forked = state.select(torch.tensor([2, 0, 2, 2]))
    assert torch.equal(forked.ssm[0][0], state.ssm[0][2]) and torch.equal(forked.keys[1][1], state.keys[1][0])
    assert forked.slots.shape == (4, 7)
    before = state.ssm[0].clone()
    forked.ssm[0].zero_()
    forked.convolution[0].zero_()
    assert torch.equal(state.ssm[0], before) and state.convolution[0].any()


def test_reordering_changes_every_part_in_place():
    """Beam search keeps the object: a part left behind would mix two beams."""
    state, same = filled(), filled()
    state.slots[1, 3:] = False
    state.reorder_cache(torch.tensor([1, 1, 0]))
    for name in ("convolution", "ssm", "keys", "values"):
        for layer, tensor in getattr(state, name).items():
            assert torch.equal(tensor, getattr(same, name)[layer][[1, 1, 0]]), name
    assert state.slots[0].tolist() == state.slots[1].tolist() == [True] * 3 + [False] * 4


def test_seen_tokens_counts_slots():
    state = filled()
    assert DecoderState().seen_tokens == 0 and state.seen_tokens == state.get_seq_length() == 7
    state.append_slots(torch.ones(3, 2, dtype=torch.bool))
    assert state.seen_tokens == 9


def test_size_counts_every_tensor():
    state = filled()
    assert state.size_bytes() == 4 * (3 * 3 * 5 + 3 * 2 * 4 * 6 + 2 * 3 * 2 * 7 * 4)
