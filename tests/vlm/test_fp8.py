"""FP8 products: the arithmetic beside a float64 reference written out by hand, ragged packs, and which layers are converted."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
import torchao.float8.float8_scaling_utils as scaling
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from transformers.models.nemotron_h import NemotronHForCausalLM

from vlm.decoder import Layout, preset_config, run_layers, take_over_mixers
from vlm.fp8 import convert_to_fp8, decoder_products
from vlm.fp8_linear import Fp8Linear
from vlm.lora import add_lora

FIT = {"mamba_num_heads": 16, "mamba_head_dim": 16}  # in_proj then has 592 outputs, 37 times 16
MIXTURE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 64}
HIDDEN_BY_TORCH = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile does so, too late
E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)  # bits of the mantissa, least exponent, largest value


def as_fp8(tensor: torch.Tensor, kind: tuple[int, int, float]) -> torch.Tensor:
    """What FP8 keeps of a tensor, in float64: scaled so that its largest value is the format's, rounded to even, scaled back."""
    bits, least, largest = kind
    scale = torch.tensor(largest / tensor.abs().max().double().item(), dtype=torch.float32)
    scaled = (tensor.float() * scale).double()
    exponent = scaled.abs().clamp(min=2.0**-40).log2().floor().clamp(min=least)
    step = 2.0 ** (exponent - bits)
    return ((scaled / step).round() * step).clamp(-largest, largest) / scale.double()


def reference(rows, weight, gradient):
    """(output, gradient of rows, gradient of weight) in float64: E4M3 for rows and weight, E5M2 for the gradient."""
    x, w, g = as_fp8(rows, E4M3), as_fp8(weight, E4M3), as_fp8(gradient, E5M2)
    return x @ w.T, g @ w, g.T @ x


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).norm() / expected.norm())


def make_layer(inputs=48, outputs=80, dtype=torch.float32, device="cpu", **settings) -> Fp8Linear:
    torch.manual_seed(0)
    holder = nn.Sequential(nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype))
    convert_to_float8_training(holder, config=Float8LinearConfig(emulate=device == "cpu"))
    Fp8Linear.take_over(holder[0], **settings)
    return holder[0]


def run(layer, tokens, dtype=torch.float32, device="cpu"):
    """Output and both gradients for random rows, and what the reference makes of the same."""
    torch.manual_seed(tokens)
    rows = torch.randn(1, tokens, layer.in_features, device=device).to(dtype).requires_grad_()
    gradient = (torch.randn(1, tokens, layer.out_features, device=device) * 1e-3).to(dtype)
    output = layer(rows)
    found = (output, *torch.autograd.grad(output, (rows, layer.weight), gradient))
    return [tensor.detach().squeeze(0) for tensor in found], reference(rows.detach()[0], layer.weight.detach(), gradient[0])


def make_decoder(pattern: str = "M*-M*-", dtype=torch.float32, **overrides) -> NemotronHForCausalLM:
    torch.manual_seed(0)
    decoder = NemotronHForCausalLM(preset_config("tiny", pattern=pattern, **(FIT | overrides))).to(dtype)
    take_over_mixers(decoder)
    return decoder


def run_decoder(decoder, lengths=(21, 12)):
    torch.manual_seed(1)
    embeddings = torch.randn(1, sum(lengths), decoder.config.hidden_size, dtype=decoder.dtype)
    return run_layers(decoder, embeddings, Layout.packed(lengths))


@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_all_three_products_equal_the_float64_reference(tokens):
    """A scale from elsewhere, E4M3 where E5M2 belongs, or a truncated cast: each is off by over 1e-2."""
    for found, expected in zip(*run(make_layer(), tokens), strict=True):
        assert found.shape == expected.shape and distance(found, expected) < 2e-6


def test_bfloat16_layers_differ_from_the_reference_by_rounding_of_the_result_only():
    for found, expected in zip(*run(make_layer(dtype=torch.bfloat16), 37, torch.bfloat16), strict=True):
        assert found.dtype == torch.bfloat16 and distance(found, expected) < 3e-3


def test_fp8_is_near_the_exact_product_but_not_equal():
    """The bounds above would hold for a layer that does nothing of the kind, were the reference not FP8 itself."""
    layer = make_layer()
    rows = torch.randn(64, 48)
    share = distance(layer(rows), F.linear(rows, layer.weight).double())
    assert 0.02 < share < 0.06


def test_ragged_packs_have_the_scales_of_unpadded_ones_to_the_bit(monkeypatch):
    """37 tokens, padded to 48 inside: torchao's own layer, which pads nothing, must find the same six scales, and the same products."""
    ours = make_layer()
    holder = nn.Sequential(nn.Linear(48, 80, bias=False))
    holder[0].weight.data.copy_(ours.weight.data)
    convert_to_float8_training(holder, config=Float8LinearConfig(emulate=True))
    seen, real = [], scaling.tensor_to_scale

    def recorded(tensor, *arguments, **settings):
        scale = real(tensor, *arguments, **settings)
        seen.append((tuple(tensor.shape), scale.item()))
        return scale

    monkeypatch.setattr(scaling, "tensor_to_scale", recorded)
    padded, _ = run(ours, 37)
    plain, _ = run(holder[0], 37)
    own, unpadded = seen[:6], seen[6:]
    assert [scale for _, scale in own] == [scale for _, scale in unpadded] and len(unpadded) == 6
    assert all(size % 16 == 0 for shape, _ in own for size in shape) and any(37 in shape for shape, _ in unpadded)
    for mine, theirs in zip(padded, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6 * theirs.abs().max().item())


def test_a_layer_that_goes_back_is_the_plain_layer_to_the_bit_with_the_same_parameters():
    """An engine holds on to module and parameter: neither may be a new one."""
    layer = make_layer()
    weight, rows = layer.weight, torch.randn(5, 48)
    before = layer(rows)
    layer.uses_fp8 = False
    assert torch.equal(layer(rows), F.linear(rows, weight)) and not torch.equal(layer(rows), before)
    assert layer.weight is weight and list(layer.state_dict()) == ["weight"]


@HIDDEN_BY_TORCH
def test_compiled_products_equal_the_eager_ones():
    """What runs on a GPU, compiled for the processor here; a second length must not need a graph of its own."""
    compiled, eager = make_layer(compiled=True), make_layer()
    for tokens in (37, 100):
        for mine, theirs in zip(run(compiled, tokens)[0], run(eager, tokens)[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6 * theirs.abs().max().item())


def test_products_come_in_the_order_in_which_they_run():
    """Counted by hooks on a real forward pass; routed experts are one module, whose two products stand together."""
    decoder = make_decoder("M*-ME*E", **MIXTURE)
    ran = []
    for name, module in decoder.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: ran.append(f"model.{name}"))
        elif name.endswith(".experts"):
            module.register_forward_hook(lambda *_, name=name: ran.extend([f"model.{name}.up_proj", f"model.{name}.down_proj"]))
    run_decoder(decoder)
    assert [name for name, _ in decoder_products(decoder)] == ran and len(ran) == 2 * 2 + 2 * 4 + 2 + 2 * 4


def test_the_8b_model_keeps_four_products_at_each_end():
    """Two layers at each end, as NVIDIA's preset has it; no other product of the published shape is unfit."""
    with torch.device("meta"):
        decoder = NemotronHForCausalLM(preset_config("8b"))
    report = convert_to_fp8(decoder)
    counted = [product for product in report.products if product.place]
    kept = [product.name.removeprefix("model.layers.") for product in counted if product.reason]
    ends = [(0, "in_proj"), (0, "out_proj"), (1, "up_proj"), (1, "down_proj")]
    assert kept == [f"{layer + start}.mixer.{name}" for start in (0, 50) for layer, name in ends]
    assert len(counted) == 112 and len(report.layers) == 104
    assert "104 of the decoder's 112 products" in report.summary()
    assert {product.name for product in report.products if product.place is None} >= {"model.embeddings", "lm_head"}


def test_a_mixture_counts_its_routed_experts_but_leaves_them():
    with torch.device("meta"):
        decoder = NemotronHForCausalLM(preset_config("30b-a3b"))
    report = convert_to_fp8(decoder)
    counted = [product for product in report.products if product.place]
    assert len(counted) == 23 * 2 + 6 * 4 + 23 * 4 and len(report.layers) == 23 * 2 + 6 * 4 + 23 * 2 - 2 - 2
    assert sum(product.reason == "routed experts, one tensor for all" for product in counted) == 2 * 23 - 2 - 2
    assert any(product.reason == "the router, computed in float32" for product in report.products if product.place is None)


def test_a_size_that_no_gpu_takes_is_named(tiny_model):
    """The tiny preset's in_proj has 584 outputs; a filter by shape alone would skip it without a word."""
    report = convert_to_fp8(copy.deepcopy(tiny_model).language_model)
    reasons = {product.place: product.reason for product in report.products if product.place}
    assert [place for place, reason in reasons.items() if reason is None] == [5, 6, 7, 8, 10, 11, 12]
    assert reasons[9] == "584 outputs, no multiple of 16" and reasons[4] == "among the first 4" and reasons[13] == "among the last 4"
    assert "not layers.3.mixer.in_proj: 584 outputs, no multiple of 16" in report.summary()


def test_every_converted_layer_runs_in_fp8_once_in_a_training_pass(monkeypatch):
    """A mixer that reads `out_proj.weight` past its layer would train in BF16 under a report that says FP8."""
    decoder = make_decoder("M*-ME*-", **MIXTURE)
    plain = run_decoder(decoder)
    report = convert_to_fp8(decoder, skip_first=0, skip_last=0)
    calls, real = [], Fp8Linear.product
    monkeypatch.setattr(Fp8Linear, "product", lambda layer, *arguments: calls.append(layer) or real(layer, *arguments))
    hidden = run_decoder(decoder)
    assert calls == list(report.layers.values()) and len(calls) == 2 * 2 + 2 * 4 + 2 * 2 + 2
    assert 0.001 < distance(hidden, plain.double()) < 0.2
    hidden.square().sum().backward()
    assert all(layer.weight.grad.any() for layer in calls)


def test_parameters_and_saved_names_stay_the_same():
    decoder = make_decoder()
    before, names = {name: id(p) for name, p in decoder.named_parameters()}, list(decoder.state_dict())
    convert_to_fp8(decoder)
    assert {name: id(p) for name, p in decoder.named_parameters()} == before and list(decoder.state_dict()) == names


def test_layers_under_an_adapter_are_found(tiny_model):
    pytest.importorskip("peft")
    model = add_lora(copy.deepcopy(tiny_model), ["out_proj"], rank=4)
    report = convert_to_fp8(model.language_model, skip_first=0, skip_last=0)
    assert "model.layers.0.mixer.out_proj.base_layer" in report.layers and len(report.layers) == 14
    assert {product.reason for product in report.products if "lora_" in product.name} == {"an adapter"}
    assert isinstance(model.language_model.model.layers[0].mixer.out_proj.base_layer, Fp8Linear)


def test_nothing_to_convert_is_an_error_with_the_reasons():
    with pytest.raises(ValueError, match="none of the decoder's 16 products can be in FP8: among the first 20"):
        convert_to_fp8(make_decoder(), skip_first=20)
    with pytest.raises(ValueError, match="skip_first = -1"):
        convert_to_fp8(make_decoder(), skip_first=-1)


def test_missing_torchao_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ImportError, match=r"pip install 'nemotron-h-vision\[train\]'"):
        convert_to_fp8(make_decoder())


def needs_fp8_units():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with FP8 units (compute capability 8.9)")


@pytest.mark.gpu
@HIDDEN_BY_TORCH
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [1, 2048, 3001])
def test_real_products_equal_the_reference(tokens, compiled):
    """Widths of the 8B model's attention; the GPU accumulates the output in fewer bits than float32."""
    needs_fp8_units()
    layer = make_layer(4096, 1024, torch.bfloat16, "cuda", compiled=compiled)
    for found, expected in zip(*run(layer, tokens, torch.bfloat16, "cuda"), strict=True):
        assert distance(found.cpu(), expected.cpu()) < 1e-2
