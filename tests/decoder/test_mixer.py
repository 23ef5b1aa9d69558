"""Our Mamba-2 mixer against transformers' stock one with the same weights, and what the stock one cannot do."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

import vlm.decoder.mixer as mixer_module
from vlm.decoder.layout import Layout
from vlm.decoder.mixer import Mamba2Mixer
from vlm.decoder.presets import preset_config
from vlm.decoder.state import DecoderState

STOCK_FORWARD = NemotronHMamba2Mixer.forward
WIDTHS = {"hidden_size": 48, "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 12, "chunk_size": 16}


def make_pair(**overrides):
    """(stock, ours): the same weights, larger than at initialisation; the stock clamp out of the way."""
    torch.manual_seed(3)
    config = preset_config("tiny", pattern="M-", **({"time_step_min": 1e-9} | WIDTHS | overrides))
    stock = NemotronHMamba2Mixer(config, layer_idx=0).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ours = copy.deepcopy(stock)
    Mamba2Mixer.take_over(ours)
    return stock, ours


@pytest.fixture(scope="module")
def pair():
    return make_pair()


@pytest.mark.parametrize("length", [1, 3, 16, 50])
def test_it_equals_the_stock_mixer(pair, length):
    """Split order, gate before norm, groups, the clamp: one of them wrong and real checkpoints speak nonsense."""
    stock, ours = pair
    hidden = torch.randn(2, length, 48)
    torch.testing.assert_close(ours(hidden), stock(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("overrides", [{"use_bias": True}, {"use_conv_bias": False}, {"n_groups": 1}, {"conv_kernel": 2}])
def test_it_equals_the_stock_mixer_for_other_settings(overrides):
    stock, ours = make_pair(**overrides)
    hidden = torch.randn(2, 21, 48)
    torch.testing.assert_close(ours(hidden), stock(hidden), rtol=1e-4, atol=1e-5)


def test_it_equals_the_stock_mixer_under_a_left_padding_mask(pair):
    stock, ours = pair
    hidden, mask = torch.randn(2, 20, 48), torch.ones(2, 20, dtype=torch.long)
    mask[0, :7] = 0
    found, expected = ours(hidden, attention_mask=mask), stock(hidden, attention_mask=mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("overrides", [{}, {"use_bias": True}])
def test_padding_is_invisible(side, overrides):
    """With a bias in in_proj, masking the input alone lets the bias of padding positions into the convolution's first windows."""
    _, ours = make_pair(**overrides)
    text = torch.randn(1, 13, 48)
    padding = torch.randn(1, 9, 48) * 50
    row = torch.cat([padding, text] if side == "left" else [text, padding], dim=1)
    mask = torch.cat([torch.zeros(1, 9), torch.ones(1, 13)] if side == "left" else [torch.ones(1, 13), torch.zeros(1, 9)], dim=1)
    found = ours(row, attention_mask=mask.long())
    torch.testing.assert_close(found[mask.bool()], ours(text)[0], rtol=1e-4, atol=1e-5)


def test_right_padding_does_not_decay_the_state(pair):
    """The stock mixer's state after a right-padded row is that of the text and its padding."""
    _, ours = pair
    text = torch.randn(1, 10, 48)
    padded, alone = DecoderState(), DecoderState()
    ours(torch.cat([text, torch.randn(1, 30, 48)], dim=1), layout=Layout.rows([10], 40), state=padded)
    ours(text, layout=Layout.rows([10], 10), state=alone)
    torch.testing.assert_close(padded.ssm[0], alone.ssm[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.convolution[0], alone.convolution[0])


@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 12], [19, 1], [2, 18]])
def test_pieces_equal_the_whole(pair, pieces):
    """Decoding by steps and prefill in pieces are the same function as one call."""
    _, ours = pair
    hidden, state = torch.randn(2, 20, 48), DecoderState()
    parts = [ours(part, layout=Layout.rows([part.shape[1]] * 2, part.shape[1]), state=state) for part in hidden.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), ours(hidden), rtol=1e-4, atol=5e-5)


def test_a_pack_equals_its_samples_in_the_stock_mixer(pair):
    stock, ours = pair
    lengths = [5, 1, 17, 30, 2]
    hidden = torch.randn(1, sum(lengths), 48)
    expected = torch.cat([stock(part) for part in hidden.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(ours(hidden, layout=Layout.packed(lengths)), expected, rtol=1e-4, atol=1e-5)
    seq_idx = torch.arange(5, dtype=torch.int32).repeat_interleave(torch.tensor(lengths))[None]
    torch.testing.assert_close(ours(hidden, seq_idx=seq_idx), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", ["chunk_scan", "causal_convolution"])
def test_a_forgotten_border_is_seen(pair, monkeypatch, function):
    """The test above must be able to fail: without borders in the scan, or in the convolution, it does."""
    _, ours = pair
    hidden = torch.randn(1, 12, 48)
    right = ours(hidden, layout=Layout.packed([5, 7]))
    original = getattr(mixer_module, function)
    if function == "chunk_scan":
        monkeypatch.setattr(mixer_module, function, lambda *a, **k: original(*a, **(k | {"seq_idx": None})))
    else:
        monkeypatch.setattr(
            mixer_module, function, lambda x, w, b, layout, *rest, **k: original(x, w, b, Layout.rows([12], 12), *rest, **k)
        )
    wrong = ours(hidden, layout=Layout.packed([5, 7]))
    assert (right - wrong)[:, :5].abs().max() < 1e-5 < 1e-3 < (right - wrong)[:, 5:].abs().max()


def test_a_seq_idx_for_several_rows_is_refused(pair):
    with pytest.raises(ValueError, match="expected one packed row"):
        pair[1](torch.randn(2, 4, 48), seq_idx=torch.zeros(2, 4, dtype=torch.int32))


def test_the_time_step_limit_of_the_config_counts():
    """time_step_min is for initialisation; clamping to it changes NVIDIA's checkpoints."""
    _, free = make_pair()
    _, limited = make_pair(time_step_limit=(0.3, 0.4))
    _, raised = make_pair(time_step_min=0.09)
    hidden = torch.randn(1, 9, 48)
    assert limited.dt_limit == (0.3, 0.4) and free.dt_limit == (0.0, float("inf"))
    assert (free(hidden) - limited(hidden)).abs().max() > 1e-3
    raised.load_state_dict(free.state_dict())
    assert torch.equal(raised(hidden), free(hidden))


@pytest.mark.parametrize("name", ["in_proj", "out_proj"])
def test_projections_are_called_as_modules(name):
    """A LoRA or FP8 layer wraps them; a forward that reads `.weight` passes it by, and nobody notices."""
    _, ours = make_pair()

    class Silent(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, hidden):
            return self.inner(hidden) * 0.0

    hidden = torch.randn(1, 6, 48)
    before = ours(hidden)
    setattr(ours, name, Silent(getattr(ours, name)))
    ours.train()
    assert before.abs().max() > 0 and not ours(hidden).any()


def test_bfloat16_weights_are_scanned_in_float32():
    """A_log, D and dt_bias cast by an engine must not make the sums bfloat16: over 400 positions that is percents."""
    _, ours = make_pair()
    narrow = copy.deepcopy(ours).bfloat16()
    wide = copy.deepcopy(narrow).float()
    hidden = torch.randn(1, 400, 48).bfloat16()
    found, expected = narrow(hidden), wide(hidden.float())
    assert found.dtype == torch.bfloat16
    assert ((found.float() - expected).norm() / expected.norm()).item() < 0.01


def test_the_stock_class_stays_as_it_was(pair):
    """Plain transformers is the reference and the baseline in the same process."""
    stock, ours = pair
    assert type(stock) is NemotronHMamba2Mixer and type(ours) is Mamba2Mixer
    assert NemotronHMamba2Mixer.forward is STOCK_FORWARD
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]
