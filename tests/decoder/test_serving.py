"""The engine's way through the decoder - packed prefill, forked rows, in-place decoding - equals the plain loop over the layers."""

import random

import pytest
import torch
from nvidia_layout import MIXTURE
from small_decoders import small_decoder

import vlm.decoder.serving_attention as serving_attention
from vlm.decoder.layers import run_layers, take_over_mixers
from vlm.decoder.layout import Layout
from vlm.decoder.packing import Packing
from vlm.decoder.serving import ServingDecoder
from vlm.decoder.slots import Common


def make_decoder(pattern: str, dtype=torch.float64, **overrides) -> ServingDecoder:
    model = small_decoder(pattern, **overrides).to(dtype)
    take_over_mixers(model)
    return ServingDecoder(model)


@pytest.fixture(scope="module")
def decoder():
    """In float64, as far as transformers' norms let it: what differs is a bug, not rounding."""
    return make_decoder("M-M*-M*-")


def logits_of(decoder, ids):
    """The obvious way: all of one sequence, no state. (T, vocabulary)"""
    model = decoder.language_model
    hidden = run_layers(model, model.get_input_embeddings()(ids)[None], Layout.rows([len(ids)], len(ids)))
    return decoder.logits(hidden[0])


def embed(decoder, *texts):
    return decoder.language_model.get_input_embeddings()(torch.cat(texts)).detach().clone()


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("mask_elements", [2**26, 1000])
@pytest.mark.parametrize("pattern", ["M-M*-M*-", "*-M", "ME*-M", "MMM", "*-*-"])
def test_random_segments_on_random_rows_equal_the_plain_loop(pattern, mask_elements, monkeypatch):
    """Fresh and continued segments of all lengths in one pack (some beyond the short scan), then one token each."""
    monkeypatch.setattr(serving_attention, "MASK_ELEMENTS", mask_elements)
    settings, tolerance = (MIXTURE | {"dtype": torch.float32}, 1e-4) if "E" in pattern else ({}, 1e-5)  # experts know no float64
    decoder, draw = make_decoder(pattern, **settings), random.Random(1)
    for _ in range(3):
        count = draw.randint(1, 6)
        texts = [torch.randint(0, 60, (draw.choice((2, 3, 9, 30, 31, 140)),)) for _ in range(count)]
        rows = draw.sample(range(8), count)
        slots = decoder.slots(8, 160)
        cuts = [draw.randint(0, len(text) - 1) for text in texts]
        found = [[] for _ in texts]
        for stage in (0, 1):
            parts = [text[:cut] if stage == 0 else text[cut:-1] for text, cut in zip(texts, cuts, strict=True)]
            which = [place for place in range(count) if len(parts[place])]
            if which:
                hidden = decoder.prefill(
                    embed(decoder, *(parts[place] for place in which)),
                    slots,
                    [rows[place] for place in which],
                    [len(parts[p]) for p in which],
                )
                for place, piece in zip(which, decoder.logits(hidden).split([len(parts[p]) for p in which]), strict=True):
                    found[place].append(piece)
        last = torch.zeros(max(rows) + 1, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            last[row] = text[-1]
        decoded = decoder.decode(last, slots, max(slots.counts) + 1)
        for row, text, parts in zip(rows, texts, found, strict=True):
            close(torch.cat([*parts, decoded[row : row + 1]]), logits_of(decoder, text), tolerance)


def test_no_mask_is_larger_than_what_was_set_aside(decoder, monkeypatch):
    """The second part of a long prompt sees all of the first: heads x its length x both would be tens of gigabytes at 100,000 tokens."""
    text, sizes, attend = torch.randint(0, 60, (1, 300)), [], torch.nn.functional.scaled_dot_product_attention
    slots, expected = decoder.slots(1, 300), logits_of(decoder, text[0])[100:]
    decoder.prefill(embed(decoder, text[0, :100]), slots, [0], [100])

    def watched(query, key, value, *, attn_mask, scale):
        sizes.append((attn_mask.numel(), key.shape[2]))
        return attend(query, key, value, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(serving_attention, "MASK_ELEMENTS", 5000)
    monkeypatch.setattr(serving_attention.F, "scaled_dot_product_attention", watched)
    hidden = decoder.prefill(embed(decoder, text[0, 100:]), slots, [0], [200])
    close(decoder.logits(hidden), expected)
    assert max(size for size, _ in sizes) <= 5000 and {span for _, span in sizes} >= {300} and min(span for _, span in sizes) < 120


@pytest.mark.parametrize("pattern", ["M-M*-M*-", "M*", "MM", "--"])
def test_only_the_last_tokens_are_the_same_last_tokens(pattern):
    """Whichever layer is the last that keeps something, and without any."""
    decoder = make_decoder(pattern)
    texts = [torch.randint(0, 60, (length,)) for length in (5, 1, 12)]
    every = decoder.prefill(embed(decoder, *texts), decoder.slots(3, 12), [0, 1, 2], [5, 1, 12])
    last = decoder.prefill(embed(decoder, *texts), decoder.slots(3, 12), [0, 1, 2], [5, 1, 12], last_only=True)
    close(last, every[[4, 5, 17]])


def test_a_fork_goes_on_alone(decoder):
    """Two rows forked from one, one to a neighbour run and one apart; the origin may be of other buffers and must not move."""
    prefix, tails = torch.randint(0, 60, (20,)), [torch.randint(0, 60, (6,)) for _ in range(3)]
    origin, slots = decoder.slots(1, 20), decoder.slots(5, 26)
    decoder.prefill(embed(decoder, prefix), origin, [0], [20])
    before = [tensor.clone() for part in origin._parts() for tensor in part.values()]
    slots.fork(origin, [0, 0, 0], [1, 2, 4])
    hidden = decoder.prefill(embed(decoder, *tails), slots, [1, 2, 4], [6] * 3)
    for tail, found in zip(tails, decoder.logits(hidden).split(6), strict=True):
        close(found, logits_of(decoder, torch.cat([prefix, tail]))[20:])
    assert all(torch.equal(a, b) for a, b in zip(before, (t for part in origin._parts() for t in part.values()), strict=True))


@pytest.mark.parametrize("lengths", [(6, 6, 6), (6, 1, 5), (140, 3, 150)])
def test_rows_may_read_their_states_where_they_were_forked_from(decoder, lengths):
    """Forked without SSM states and told where these stand: the short scan, with and without padding, and the long one."""
    prefix, tails = torch.randint(0, 60, (20,)), [torch.randint(0, 60, (length,)) for length in lengths]
    origin, slots = decoder.slots(2, 20), decoder.slots(5, 180)
    decoder.prefill(embed(decoder, prefix), origin, [1], [20])
    for state in slots.ssm.values():
        state.fill_(float("nan"))  # as an earlier request may have left anything
    slots.fork(origin, [1, 1, 1], [4, 1, 2], with_ssm=False)
    hidden = decoder.prefill(embed(decoder, *tails), slots, [4, 1, 2], list(lengths), commons=[Common(origin, 1, 20)] * 3)
    for tail, found in zip(tails, decoder.logits(hidden).split(lengths), strict=True):
        close(found, logits_of(decoder, torch.cat([prefix, tail]))[20:])
    more = torch.randint(0, 60, (5,))
    slots.scrub([0, 3])
    decoded = decoder.decode(more, slots, max(slots.counts) + 1)
    for row, tail in zip((4, 1, 2), tails, strict=True):
        close(decoded[row], logits_of(decoder, torch.cat([prefix, tail, more[row : row + 1]]))[-1])


@pytest.mark.parametrize("cached_scores", [2**19, 1])
def test_one_call_reads_families_of_several_states(decoder, monkeypatch, cached_scores):
    """Rows of two pictures, mixed and of different lengths, one that goes on from its own copy and one that begins."""
    monkeypatch.setattr(serving_attention, "CACHED_SCORES", cached_scores)
    prefixes = [torch.randint(0, 60, (length,)) for length in (20, 33)]
    origin, slots = decoder.slots(2, 33), decoder.slots(8, 60)
    decoder.prefill(embed(decoder, *prefixes), origin, [0, 1], [20, 33])
    families = [Common(origin, row, len(prefixes[row])) for row in (0, 1)]
    rows, lengths = [3, 0, 6, 1, 7, 2, 5], [6, 9, 2, 5, 1, 6, 7]
    commons = [families[0], families[1], families[0], families[1], families[0], None, None]
    for state in slots.ssm.values():
        state.fill_(float("nan"))
    for row, common in zip(rows, commons, strict=True):
        if common is not None:
            slots.fork(origin, [common.row], [row], with_ssm=False)
    slots.fork(origin, [1], [2])
    slots.clear([5])
    before = [prefixes[0], prefixes[1]] * 2 + [prefixes[0], prefixes[1], prefixes[0][:0]]
    tails = [torch.randint(0, 60, (length,)) for length in lengths]
    hidden = decoder.prefill(embed(decoder, *tails), slots, rows, lengths, commons=commons)
    for prefix, tail, found in zip(before, tails, decoder.logits(hidden).split(lengths), strict=True):
        close(found, logits_of(decoder, torch.cat([prefix, tail]))[len(prefix) :])
    assert [slots.common[row] for row in rows] == commons
    slots.scrub([4])
    more = torch.randint(0, 60, (8,))
    decoded = decoder.decode(more, slots, max(slots.counts) + 1)
    for row, prefix, tail in zip(rows, before, tails, strict=True):
        close(decoded[row], logits_of(decoder, torch.cat([prefix, tail, more[row : row + 1]]))[-1])


def test_a_row_that_has_read_on_does_not_go_on_from_where_it_came(decoder):
    origin, slots = decoder.slots(1, 9), decoder.slots(1, 30)
    decoder.prefill(embed(decoder, torch.arange(9)), origin, [0], [9])
    slots.fork(origin, [0], [0])
    decoder.prefill(embed(decoder, torch.arange(4)), slots, [0], [4])
    with pytest.raises(ValueError, match="row 0 has read 13 tokens, the row it is to go on from 9"):
        decoder.prefill(embed(decoder, torch.arange(4)), slots, [0], [4], commons=[Common(origin, 0, 9)])


def test_growing_and_moving_rows_changes_nothing(decoder):
    """What admission and release do to the running rows: other buffers, other places."""
    texts = [torch.randint(0, 60, (length,)) for length in (9, 4, 7)]
    slots = decoder.slots(3, 10)
    decoder.prefill(embed(decoder, *(text[:-1] for text in texts)), slots, [0, 1, 2], [8, 3, 6])
    slots.grow(4, 64)
    slots.fork(slots, [2, 0], [1, 3])
    slots.vacate([2])
    decoded = decoder.decode(torch.stack([texts[0][-1], texts[2][-1], torch.tensor(0), texts[0][-1]]), slots, 10)
    for row, text in ((0, texts[0]), (1, texts[2]), (3, texts[0])):
        close(decoded[row], logits_of(decoder, text)[-1])
    slots.advance([0, 1, 3], [1, 1, 1])
    assert slots.counts == slots.lengths.tolist() == [9, 7, 0, 9]
    with pytest.raises(ValueError, match="do not fit into 4 rows of 8 slots"):
        slots.grow(4, 8)


def test_an_earlier_occupant_leaves_nothing_behind(decoder):
    """A freed row keeps its numbers; neither they nor, after `scrub`, non-finite ones may reach the next text."""
    text, slots = torch.randint(0, 60, (8,)), decoder.slots(2, 40)
    for old in (torch.ones, torch.zeros):
        decoder.prefill(embed(decoder, torch.randint(0, 60, (30,)), torch.randint(0, 60, (12,))), slots, [0, 1], [30, 12])
        if old is torch.ones:
            slots.clear([0, 1])
        else:
            for part in slots._parts():
                for tensor in part.values():
                    tensor.fill_(float("nan"))
            slots.scrub([0, 1])
        decoder.prefill(embed(decoder, text[:-1], text[:3]), slots, [0, 1], [7, 3])
        close(decoder.decode(text[[-1, 3]], slots, 8)[0], logits_of(decoder, text)[-1])
        slots.clear([0, 1])


def test_equal_rows_need_no_mask(decoder):
    slots = decoder.slots(2, 9)
    decoder.prefill(embed(decoder, torch.arange(8), torch.arange(8, 16)), slots, [0, 1], [8, 8])
    copy = decoder.slots(2, 9)
    copy.fork(slots, [0, 1], [0, 1])
    tokens = torch.tensor([3, 4])
    close(decoder.decode(tokens, slots, 9, even=True), decoder.decode(tokens, copy, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_keep_theirs_and_float32_states(dtype):
    decoder = make_decoder("M-*-", dtype)
    slots, text = decoder.slots(1, 16), torch.randint(0, 60, (12,))
    hidden = decoder.prefill(embed(decoder, text[:-1]), slots, [0], [11])
    assert hidden.dtype == slots.keys[2].dtype == slots.convolution[0].dtype == dtype and slots.ssm[0].dtype == torch.float32
    found, expected = decoder.decode(text[-1:], slots, 12)[0], logits_of(decoder, text)[-1]
    assert (found - expected).abs().max() < (1e-4 if dtype == torch.float32 else 0.1) * expected.abs().max()


def test_sizes_are_those_of_the_tensors(decoder):
    slots = decoder.slots(3, 64)
    assert slots.size_bytes() == 8 * 3 * (2 * 2 * 2 * 64 * 12 + 3 * (3 * (48 + 2 * 2 * 32) + 6 * 8 * 32))


@pytest.mark.parametrize(
    ("lengths", "rows"), [([], []), ([3, 0], [0, 1]), ([3, 3], [1, 1]), ([3], [0, 1])], ids=["none", "empty", "twice", "too many"]
)
def test_impossible_packs_are_refused(lengths, rows):
    """Two segments on one row would be read from the same state, and the second write would win."""
    with pytest.raises(ValueError, match="one or more tokens for different rows"):
        Packing(lengths, rows, [0] * len(rows), "cpu")


def test_more_tokens_than_slots_are_refused(decoder):
    slots = decoder.slots(1, 10)
    with pytest.raises(ValueError, match="rows have 10 slots"):
        decoder.prefill(embed(decoder, torch.arange(11)), slots, [0], [11])
    with pytest.raises(ValueError, match=r"found 5 embeddings for segments of \[4\] tokens"):
        decoder.prefill(embed(decoder, torch.arange(5)), slots, [0], [4])
