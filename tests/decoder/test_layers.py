"""The whole decoder: equal to plain transformers, packed = separate, padded = alone, cached = uncached."""

import copy

import pytest
import torch
from nvidia_layout import MIXTURE
from small_decoders import small_decoder
from transformers.models.nemotron_h import NemotronHForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHAttention, NemotronHMamba2Mixer

import vlm.decoder.mixer as mixer_module
from vlm.decoder.layers import run_layers, take_over_mixers
from vlm.decoder.layout import Layout
from vlm.decoder.state import DecoderState


def make_decoder(pattern: str = "M-M*-M", **overrides) -> NemotronHForCausalLM:
    return small_decoder(pattern, time_step_min=1e-9, **overrides)


@pytest.fixture(scope="module")
def decoder():
    """Our decoder in float64: what differs is a bug, not rounding."""
    ours = make_decoder().double()
    take_over_mixers(ours)
    return ours


def embed(decoder, *lengths):
    return [torch.randn(1, length, decoder.config.hidden_size, dtype=decoder.dtype) for length in lengths]


def alone(decoder, text):
    return run_layers(decoder, text, Layout.rows([text.shape[1]], text.shape[1]))


@pytest.mark.parametrize("pattern", ["M-M*-M", "ME*-M"])
@pytest.mark.parametrize("mask", ["none", "left"])
def test_logits_equal_plain_transformers(pattern, mask):
    """The one test that ties all our operations to the published model; the stock model is built apart and not touched."""
    stock = make_decoder(pattern, **(MIXTURE if "E" in pattern else {}))
    ours = copy.deepcopy(stock)
    assert take_over_mixers(ours) == {"mamba": pattern.count("M"), "attention": pattern.count("*")}
    ids = torch.randint(0, 60, (2, 37))
    attention_mask = torch.ones_like(ids)
    if mask == "left":
        attention_mask[0, :9] = 0
    with torch.no_grad():
        expected = stock(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
        layout = Layout.from_mask(attention_mask, 2, 37)
        found = ours.lm_head(run_layers(ours, ours.get_input_embeddings()(ids), layout))
        through_their_loop = ours(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
    real = attention_mask.bool()
    assert expected[real].abs().max() > 0.5
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-4)
    torch.testing.assert_close(through_their_loop[real], expected[real], rtol=0, atol=1e-4)
    for module in stock.modules():
        assert not isinstance(module, NemotronHMamba2Mixer) or type(module) is NemotronHMamba2Mixer
        assert not isinstance(module, NemotronHAttention) or type(module) is NemotronHAttention


def test_gradients_equal_plain_transformers():
    stock = make_decoder()
    ours = copy.deepcopy(stock)
    take_over_mixers(ours)
    ids = torch.randint(0, 60, (1, 25))
    stock(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    ours(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for (name, a), (_, b) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(
            b.grad, a.grad, rtol=1e-3, atol=1e-4 * a.grad.abs().max().item() + 1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_pack_equals_its_samples(decoder):
    texts = embed(decoder, 1, 30, 2, 70, 1, 1, 11)
    packed = run_layers(decoder, torch.cat(texts, dim=1), Layout.packed([text.shape[1] for text in texts]))
    torch.testing.assert_close(packed, torch.cat([alone(decoder, text) for text in texts], dim=1))


def test_gradients_of_a_pack_equal_those_of_its_samples(decoder):
    """Weights and inputs: a leak in the backward pass alone would train each sample on its neighbours."""
    texts = embed(decoder, 9, 1, 40)
    parameters = [p for p in decoder.parameters() if p.requires_grad]

    def gradients(output, inputs):
        # The square makes the gradient depend on the values, so that errors cannot cancel.
        return torch.autograd.grad((output**2).sum(), [*inputs, *parameters], allow_unused=True)

    inputs = [text.requires_grad_() for text in texts]
    packed = gradients(run_layers(decoder, torch.cat(inputs, dim=1), Layout.packed([9, 1, 40])), inputs)
    separate = gradients(torch.cat([alone(decoder, text) for text in inputs], dim=1), inputs)
    for a, b in zip(packed, separate, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_changing_one_sample_never_moves_its_neighbours(decoder):
    """To the bit: values and gradients of the others, before and after it."""
    texts = embed(decoder, 12, 8, 15)
    layout = Layout.packed([12, 8, 15])
    others = [slice(0, 12), slice(20, 35)]

    def run(middle):
        row = torch.cat([texts[0], middle, texts[2]], dim=1).requires_grad_()
        out = run_layers(decoder, row, layout)
        (gradient,) = torch.autograd.grad(sum((out[:, place] ** 2).sum() for place in others), row)
        return out, gradient

    first, first_gradient = run(texts[1])
    second, second_gradient = run(texts[1] * 100 + 7)
    for place in others:
        assert torch.equal(first[:, place], second[:, place])
        assert torch.equal(first_gradient[:, place], second_gradient[:, place])
    for gradient in (first_gradient, second_gradient):
        assert gradient.abs().max() > 0 and not gradient[:, 12:20].any()
    assert not torch.allclose(first[:, 12:20], second[:, 12:20])


def test_a_dropped_seq_idx_is_seen(decoder, monkeypatch):
    """A planted fault: the test of neighbours must be able to fail."""
    scan = mixer_module.chunk_scan
    monkeypatch.setattr(mixer_module, "chunk_scan", lambda *a, **k: scan(*a, **(k | {"seq_idx": None})))
    texts = embed(decoder, 12, 8)
    packed = run_layers(decoder, torch.cat(texts, dim=1), Layout.packed([12, 8]))
    assert (packed[:, 12:] - alone(decoder, texts[1])).abs().max() > 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_batch_mates_change_nothing(decoder, side):
    texts = embed(decoder, 20, 1, 33)
    rows, masks = [], []
    for text in texts:
        padding = torch.full((1, 33 - text.shape[1], decoder.config.hidden_size), 9.0, dtype=decoder.dtype)
        ones, zeros = torch.ones(1, text.shape[1]), torch.zeros(1, padding.shape[1])
        rows.append(torch.cat([padding, text] if side == "left" else [text, padding], dim=1))
        masks.append(torch.cat([zeros, ones] if side == "left" else [ones, zeros], dim=1))
    mask = torch.cat(masks)
    out = run_layers(decoder, torch.cat(rows), Layout.from_mask(mask, 3, 33))
    for row, text in enumerate(texts):
        torch.testing.assert_close(out[row, mask[row].bool()], alone(decoder, text)[0])


@pytest.mark.parametrize("pieces", [[1] * 24, [24], [10, 1, 1, 12], [3, 21]])
def test_cached_equals_uncached(decoder, pieces):
    (text,) = embed(decoder, 24)
    state, parts = DecoderState(), []
    for part in text.split(pieces, dim=1):
        parts.append(run_layers(decoder, part, Layout.rows([part.shape[1]], part.shape[1]), state))
    assert state.seen_tokens == 24
    torch.testing.assert_close(torch.cat(parts, dim=1), alone(decoder, text))


def test_ragged_rows_continue_where_their_own_text_ended(decoder):
    """Three ragged pieces in a row: windows, states and slots of a short row must skip its padding each time."""
    plan = [[7, 2, 1], [1, 6, 3], [4, 4, 9]]
    texts = embed(decoder, *(sum(piece[row] for piece in plan) for row in range(3)))
    state, found = DecoderState(), [[], [], []]
    starts = [0, 0, 0]
    for piece in plan:
        width = max(piece)
        batch = torch.full((3, width, decoder.config.hidden_size), 5.0, dtype=decoder.dtype)
        for row in range(3):
            batch[row, : piece[row]] = texts[row][0, starts[row] : starts[row] + piece[row]]
        out = run_layers(decoder, batch, Layout.rows(piece, width), state)
        for row in range(3):
            found[row].append(out[row, : piece[row]])
            starts[row] += piece[row]
    for row in range(3):
        torch.testing.assert_close(torch.cat(found[row]), alone(decoder, texts[row])[0])


def test_a_forked_state_equals_computing_again(decoder):
    """One picture, several questions: each goes on from a copy and must not see the others."""
    prefix, *questions = embed(decoder, 18, 5, 5, 5)
    state = DecoderState()
    run_layers(decoder, prefix, Layout.rows([18], 18), state)
    forked = state.select(torch.tensor([0, 0, 0]))
    out = run_layers(decoder, torch.cat(questions), Layout.rows([5] * 3, 5), forked)
    for row, question in enumerate(questions):
        torch.testing.assert_close(out[row], alone(decoder, torch.cat([prefix, question], dim=1))[0, 18:])
    assert state.seen_tokens == 18 and state.keys[3].shape[2] == 18


def test_activation_checkpointing_changes_no_gradient(decoder):
    (text,) = embed(decoder, 15)
    text.requires_grad_()
    layout = Layout.packed([4, 11])
    results = [run_layers(decoder, text, layout, activation_checkpointing=on) for on in (False, True)]
    gradients = [torch.autograd.grad((result**2).sum(), text)[0] for result in results]
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("layout", [Layout.rows([5], 5), Layout.packed([5, 5]), Layout.packed([3, 3])])
def test_a_layout_for_another_batch_is_refused(decoder, layout):
    """Computed on, positions would silently belong to the wrong sample."""
    rows = (
        torch.zeros(2, 5, 48, dtype=torch.float64) if not layout.is_packed or sum(layout.lengths) == 10 else torch.zeros(1, 5, 48).double()
    )
    with pytest.raises(ValueError, match="the layout describes"):
        run_layers(decoder, rows, layout)


@pytest.mark.parametrize("layout", [Layout.packed([2, 3]), Layout.from_mask(torch.tensor([[0, 1, 1, 1, 1]]), 1, 5)])
def test_a_state_refuses_packs_and_left_padding(decoder, layout):
    with pytest.raises(ValueError, match="a kept state needs one sequence a row, padded on the right"):
        run_layers(decoder, torch.zeros(1, 5, 48, dtype=torch.float64), layout, DecoderState())
