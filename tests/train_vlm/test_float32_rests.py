"""A parameter rounded to bfloat16 and its rest are together the float32 value, in the outputs of mixers and norms as well."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from train_vlm.float32_rests import Float32Rests
from train_vlm.kept_precision import widen_kept
from vlm.decoder.layers import run_layers
from vlm.decoder.layout import Layout

KEPT = ("A_log", "D", "dt_bias")


def test_rounded_parameters_and_their_rests_compute_as_the_exact_ones(exact_model):
    """In float64 the sums differ in the last digits only; without the rests in the third."""
    decoder = copy.deepcopy(exact_model.language_model)
    for mixer in (block.mixer for block in decoder.model.layers if hasattr(block.mixer, "rests")):
        for name in KEPT:
            parameter = getattr(mixer, name)
            parameter.data.add_(torch.linspace(0.001, 0.01, parameter.numel(), dtype=parameter.dtype))
    rounded = copy.deepcopy(decoder)
    mixers = [block.mixer for block in rounded.model.layers if hasattr(block.mixer, "rests")]
    exact = [{name: getattr(mixer, name).detach().clone() for name in KEPT} for mixer in mixers]
    for mixer in mixers:
        for name in KEPT:
            getattr(mixer, name).data = getattr(mixer, name).data.bfloat16().double()
    text = torch.randn(1, 40, decoder.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layout = Layout.packed([25, 15], text.device)
    with torch.no_grad():
        expected, without = run_layers(decoder, text, layout), run_layers(rounded, text, layout)
        for mixer, values in zip(mixers, exact, strict=True):
            mixer.rests = {name: values[name] - getattr(mixer, name) for name in KEPT}
        found = run_layers(rounded, text, layout)
    scale = expected.abs().max()
    assert (without - expected).abs().max() > 1e-4 * scale
    assert (found - expected).abs().max() < 1e-12 * scale
    assert all("rests" not in vars(block.mixer) for block in decoder.model.layers)  # the class's empty one is nobody's to fill


def test_rounded_norms_and_their_rests_compute_as_the_exact_ones(exact_model):
    """The norms before mixers, those within them, and the one behind the last block; all of them are found."""
    decoder = copy.deepcopy(exact_model.language_model)
    weights = {name: p for name, p in decoder.named_parameters() if name.endswith(("norm.weight", "norm_f.weight"))}
    for parameter in weights.values():
        parameter.data.add_(torch.linspace(0.001, 0.01, parameter.numel(), dtype=parameter.dtype))
    rounded = copy.deepcopy(decoder)
    rests = Float32Rests(rounded)
    assert {name for name, *_ in rests.entries if name.endswith("weight")} == set(weights)
    for name in weights:
        rounded.get_parameter(name).data = rounded.get_parameter(name).data.bfloat16().double()
    text = torch.randn(1, 40, decoder.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layout = Layout.packed([25, 15], text.device)
    with torch.no_grad():
        expected, without = run_layers(decoder, text, layout), run_layers(rounded, text, layout)
        for name, owner, short, _ in rests.entries:
            if name in weights:
                owner.rests = {**owner.rests, short: weights[name] - owner.get_parameter(short)}
        found = run_layers(rounded, text, layout)
    scale = expected.abs().max()
    assert (without - expected).abs().max() > 1e-4 * scale
    assert (found - expected).abs().max() < 1e-12 * scale


def test_norms_in_float32_give_back_the_dtype_of_what_they_are_given(exact_model):
    """bfloat16 hidden states through layers whose A_log, D, dt_bias and norms are float32: matrices and outputs stay bfloat16, and what is
    kept is neither more nor less than these."""
    decoder = copy.deepcopy(exact_model.language_model).to(torch.bfloat16)
    plain = copy.deepcopy(decoder)
    widen_kept(decoder)
    wide = {name for name, p in decoder.named_parameters() if p.dtype == torch.float32}
    assert wide == {name for name, _ in decoder.named_parameters() if name.endswith((*KEPT, "norm.weight", "norm_f.weight"))}
    text = torch.randn(1, 40, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    layout = Layout.packed([25, 15], text.device)
    found = run_layers(decoder, text, layout)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, run_layers(plain, text, layout), atol=0.05, rtol=0.05)
    found.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for name, p in decoder.named_parameters() if name in wide)


class Mixer(nn.Module):
    """As much of a mixer as the rests need: three heads, which do not divide by two ranks."""

    rests = {}

    def __init__(self):
        super().__init__()
        for name in KEPT:
            setattr(self, name, nn.Parameter(torch.tensor([1.003, -2.0071, 0.30011])))

    def forward(self):
        return {name: getattr(self, name).float() + self.rests[name] for name in KEPT}


@pytest.fixture
def engine(monkeypatch):
    """Rank 1 of two, with what DeepSpeed would know: the parameters in bfloat16, float32 copies of them, pieces of two numbers."""
    mixer = Mixer()
    rests = Float32Rests(mixer)
    mixer.to(torch.bfloat16)
    pieces, copies = {}, {id(parameter): parameter.detach().float().clone() for parameter in mixer.parameters()}
    for parameter in mixer.parameters():
        parameter.ds_tensor = torch.empty(2)
    monkeypatch.setattr("deepspeed.utils.safe_set_local_fp32_param", lambda parameter, piece: pieces.update({id(parameter): piece}))
    monkeypatch.setattr("deepspeed.utils.safe_get_full_fp32_param", lambda parameter: copies[id(parameter)])
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    engine = SimpleNamespace(global_steps=0, module=mixer, device=torch.device("cpu"), copies=copies, pieces=pieces, rests=rests)
    rests.attach(engine)
    return engine


def test_the_copies_begin_from_the_values_before_the_cast_and_the_last_piece_is_padded(engine):
    """Three numbers in pieces of two: rank 1 has the third, and one of padding."""
    for name in KEPT:
        assert engine.pieces[id(getattr(engine.module, name))].tolist() == [pytest.approx(0.30011, abs=1e-7), 0.0]


def test_a_forward_pass_after_an_update_sees_the_copies_as_they_are_then(engine):
    """With rests from before the update the decay of the state would lag behind by what bfloat16 leaves of it."""
    parameter = engine.module.A_log
    engine.copies[id(parameter)] = torch.tensor([1.0061, -2.0183, 0.30033])
    parameter.data = engine.copies[id(parameter)].bfloat16()  # as DeepSpeed's step leaves it
    engine.global_steps += 1
    seen = engine.module()["A_log"]
    assert torch.allclose(seen, engine.copies[id(parameter)], atol=1e-7, rtol=0)
    assert not torch.allclose(parameter.float(), seen, atol=1e-4, rtol=0)  # bfloat16 alone is not there


def test_rests_are_read_once_an_update(engine):
    """Reading takes part of all ranks: not in every micro-batch."""
    before = engine.module()["D"]
    engine.copies[id(engine.module.D)] = torch.zeros(3)
    assert torch.equal(engine.module()["D"], before)
