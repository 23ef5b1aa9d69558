"""Packed sequences side by side: every one once, little padding, and there and back with the gradients of plain indexing."""

import itertools

import torch

from vlm.decoder.side_by_side import PADDING_LIMIT, SideBySide, groups_of_similar_length


def test_groups_hold_every_sequence_once_and_waste_little():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = tuple(torch.randint(1, 500, (30,), generator=generator).tolist())
        groups = groups_of_similar_length(lengths)
        assert sorted(itertools.chain(*groups)) == list(range(30))
        assert all(max(lengths[i] for i in group) <= PADDING_LIMIT * min(lengths[i] for i in group) for group in groups)


def test_there_and_back_is_the_same_row():
    lengths = (5, 1, 7, 5, 30, 6)
    layout = SideBySide.of(lengths)
    packed = torch.randn(sum(lengths), 3)
    parts = layout.spread(packed)
    assert [tuple(part.shape[:2]) for part in parts] == list(layout.groups) and len(parts) < len(lengths)
    assert torch.equal(layout.join(parts), packed)
    starts = [0, *itertools.accumulate(lengths)]
    rows = {tuple(packed[start].tolist()): length for start, length in zip(starts, lengths, strict=False)}
    for part in parts:  # a sequence a row, from its first position on, its last one repeated behind it
        for row in part:
            start = next(place for place in starts if torch.equal(packed[place], row[0]))
            length = rows[tuple(row[0].tolist())]
            assert torch.equal(row[:length], packed[start : start + length]) and (row[length:] == row[length - 1]).all()


def test_gradients_are_those_of_indexing_where_padding_is_not_seen():
    """Sums over what comes before, as causal attention makes them, in each row."""
    lengths = (4, 5, 2)
    layout = SideBySide.of(lengths)
    packed = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 3, dtype=torch.float64)
    (layout.join([part.cumsum(1) ** 2 for part in layout.spread(packed)]) * weight).sum().backward()
    expected = packed.detach().clone().requires_grad_()
    (torch.cat([part.cumsum(0) ** 2 for part in expected.split(lengths)]) * weight).sum().backward()
    torch.testing.assert_close(packed.grad, expected.grad)
