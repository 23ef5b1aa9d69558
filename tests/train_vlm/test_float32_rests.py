"""A parameter rounded to bfloat16 and its rest are together the float32 value, in the mixer's output as well."""

import copy

import torch

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
