"""Rows on a common state with what they have read since equal rows with states of their own, wherever they are moved to."""

import random

import pytest
import torch
from small_decoders import small_decoder

from vlm.decoder import decode_step, tails
from vlm.decoder.layers import run_layers, take_over_mixers
from vlm.decoder.layout import Layout
from vlm.decoder.serving import ServingDecoder
from vlm.decoder.short_scan import short_scan
from vlm.decoder.slots import Common
from vlm.decoder.ssd import recurrent_scan
from vlm.decoder.tails import Tail, TailStep


@pytest.mark.parametrize("seed", range(6))
def test_a_tail_gives_what_the_recurrence_gives(seed):
    """Sequences of different lengths read at once, then one token after the other, and at last the states."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    groups = draw.choice((1, 2))
    rows, heads, width, size, later = draw.randint(1, 4), groups * draw.choice((1, 3)), 4, 6, 5
    lengths = [draw.randint(1, 7) for _ in range(rows)]
    longest = max(lengths)
    total = longest + later
    x, steps, B, C = normal(rows, total, heads, width), normal(rows, total, heads).abs(), *(normal(rows, total, groups, size) for _ in "BC")
    A, D, common = -normal(heads).abs(), normal(heads), normal(heads, width, size)
    # What an earlier row left, never seen: large, and decayed further than anything here, so that its weight would be large too.
    shapes = (rows, 12, heads, width), (rows, groups, 12, size), (rows, 12, heads)
    tail = Tail(*(torch.full(shape, value, dtype=torch.float64) for shape, value in zip(shapes, (1e3, 1e3, -50.0), strict=True)))
    padded = steps[:, :longest].clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = 0.0
    first = (x[:, :longest], padded, A, B[:, :longest], C[:, :longest], D)
    found = [short_scan(*first, common.expand(rows, -1, -1, -1), common=common, tail=tail.first(longest))]
    for number in range(later):
        step = TailStep.of(slice(0, rows), [length + number for length in lengths], "cpu")
        place = longest + number
        found.append(step.scan(x[:, place], steps[:, place], A, B[:, place], C[:, place], D, tail, common)[:, None])
    found = torch.cat(found, dim=1)
    for row, length in enumerate(lengths):
        chosen = [*range(length), *range(longest, total)]
        sequence = (x[row : row + 1, chosen], steps[row : row + 1, chosen], A, B[row : row + 1, chosen], C[row : row + 1, chosen], D)
        expected, after = recurrent_scan(*sequence, initial_states=common[None])
        torch.testing.assert_close(found[row, chosen], expected[0])
        whole = tail.rows(slice(row, row + 1)).first(length + later)
        torch.testing.assert_close(whole.state(common), after)


@pytest.fixture(scope="module")
def decoder():
    model = small_decoder("M-M*-M*-").double()
    take_over_mixers(model)
    return ServingDecoder(model)


def expected_logits(decoder, ids):
    model = decoder.language_model
    hidden = run_layers(model, model.get_input_embeddings()(torch.tensor(ids))[None], Layout.rows([len(ids)], len(ids)))
    return decoder.logits(hidden[0])[-1]


def embed(decoder, ids):
    return decoder.language_model.get_input_embeddings()(torch.tensor(ids)).detach().clone()


@pytest.mark.parametrize(("capacity", "least_shared"), [(64, 1), (64, 2**18), (9, 1)], ids=["tails", "own keys", "settled on the way"])
def test_decoding_from_common_states_is_that_of_whole_texts(decoder, monkeypatch, capacity, least_shared):
    """Two families and two rows of no family in one batch; rows are moved, given up, kept, scored and buffers exchanged in between."""
    monkeypatch.setattr(tails, "LEAST_STATE_BYTES", 1)
    monkeypatch.setattr(tails, "CAPACITY", capacity)
    monkeypatch.setattr(decode_step, "LEAST_SHARED_ELEMENTS", least_shared)
    draw = random.Random(capacity)

    def words(count):
        return [draw.randrange(60) for _ in range(count)]

    prefixes, slots = [words(20), words(31)], decoder.slots(10, 80, with_tails=True)
    assert slots.tails is not None and decoder.slots(10, 80).tails is None
    origin = decoder.slots(2, 31)
    decoder.prefill(embed(decoder, sum(prefixes, [])), origin, [0, 1], [20, 31])
    for state in slots.ssm.values():
        state.fill_(float("nan"))  # a row with a tail has no state of its own
    texts: dict[int, list[int]] = {}
    for family, rows in ((0, [1, 2, 3]), (1, [5, 4, 7])):
        common = Common(origin, family, len(prefixes[family]))
        slots.fork(origin, [family] * 3, rows, with_ssm=False)
        asked = [words(draw.randint(1, 7)) for _ in rows]
        decoder.prefill(embed(decoder, sum(asked, [])), slots, rows, [len(each) for each in asked], commons=[common] * len(rows))
        for row, each in zip(rows, asked, strict=True):
            texts[row] = prefixes[family] + each
    slots.clear([0, 6])
    for row in (0, 6):
        texts[row] = words(9)
        decoder.prefill(embed(decoder, texts[row]), slots, [row], [9])
    assert slots.is_tail == [row in (1, 2, 3, 5, 4, 7) for row in range(10)]
    used = []
    for number in range(8):
        said = words(8)
        span = max(slots.counts[:8]) + 1
        found = decoder.decode(torch.tensor(said), slots, span)
        slots.advance(list(range(8)), [1] * 8)
        used.append(sum(slots.is_tail))
        for row in range(8):
            texts[row].append(said[row])
            expected = expected_logits(decoder, texts[row])
            torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        if number == 1:  # row 2 is over, and the last row fills its place
            slots.fork(slots, [7, 6], [2, 7])
            texts[2], texts[7] = list(texts[7]), list(texts[6])
        if number == 2:
            slots.grow(9, 96)
        if number == 3:  # kept for a next turn: a state like any other
            kept = decoder.slots(1, 60)
            kept.fork(slots, [1], [0])
            assert kept.common == [None] and kept.is_tail == [False]
            again = decoder.prefill(embed(decoder, [3, 5]), kept, [0], [2], last_only=True)
            torch.testing.assert_close(decoder.logits(again)[0], expected_logits(decoder, [*texts[1], 3, 5]), rtol=0, atol=1e-4)
        if number == 4:  # reading on in a row with a tail
            decoder.prefill(embed(decoder, [7, 8]), slots, [3], [2])
            texts[3] += [7, 8]
            assert not slots.is_tail[3]
    assert used[0] == 6 and used[-1] == (4 if capacity == 64 else 0)
    slots.vacate(range(8))
    assert slots.common == [None] * 9 and not any(slots.is_tail)


def test_small_states_and_long_questions_have_no_tails(decoder, monkeypatch):
    assert decoder.slots(4, 80, with_tails=True).tails is None
    monkeypatch.setattr(tails, "LEAST_STATE_BYTES", 1)
    monkeypatch.setattr(tails, "CAPACITY", 8)
    origin, slots = decoder.slots(1, 10), decoder.slots(2, 40, with_tails=True)
    decoder.prefill(embed(decoder, list(range(10))), origin, [0], [10])
    slots.fork(origin, [0, 0], [0, 1], with_ssm=False)
    decoder.prefill(embed(decoder, list(range(9))), slots, [0, 1], [8, 1], commons=[Common(origin, 0, 10)] * 2)
    assert slots.is_tail == [False, True]  # each for itself
    found = decoder.decode(torch.tensor([4, 4]), slots, 19)
    for row, read in enumerate((list(range(8)), [8])):
        expected = expected_logits(decoder, [*range(10), *read, 4])
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
