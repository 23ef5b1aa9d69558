"""Products with packed weights are those of the plain call, whatever happens to the weights."""

import pytest
import torch
import torch.nn.functional as F
from small_decoders import small_decoder
from torch import nn

from vlm.decoder import packed_weights
from vlm.decoder.layers import take_over_mixers
from vlm.decoder.packed_weights import PackedWeights
from vlm.decoder.serving import ServingDecoder

ENOUGH = 2**30

needs_operators = pytest.mark.skipif(packed_weights._operators() is None, reason="this torch has no oneDNN operators for linear layers")


def packed_count(packed: PackedWeights) -> int:
    return sum(weight.packed is not None for weight in packed.weights.values())


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1024), (2, 1024), (30, 96), (257, 80), (3, 50, 96)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_that_of_the_plain_call(dtype, shape, bias):
    torch.manual_seed(0)
    linear, packed = nn.Linear(shape[-1], 640, bias=bias).to(dtype), PackedWeights(ENOUGH)
    x = torch.randn(shape, dtype=dtype)
    with torch.inference_mode():
        found, expected = packed.of(linear)(x), linear(x)
    assert packed_count(packed) == 1 and found.shape == expected.shape and found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=(1e-6 if dtype == torch.float32 else 1e-2) * float(expected.abs().max()))


@needs_operators
def test_a_view_with_gaps_is_multiplied_as_it_is():
    """What a split leaves: rows that do not follow each other in memory."""
    linear, packed = nn.Linear(512, 300), PackedWeights(ENOUGH)
    x = torch.randn(40, 1300)[:, 200:712]
    with torch.inference_mode():
        torch.testing.assert_close(packed.of(linear)(x), linear(x), rtol=0, atol=1e-5)
    assert packed_count(packed) == 1


@needs_operators
def test_small_products_are_plain():
    linear, packed = nn.Linear(64, 64), PackedWeights(ENOUGH)
    with torch.inference_mode():
        packed.of(linear)(torch.randn(8, 64))
    assert packed_count(packed) == 0 and packed.free_bytes == ENOUGH


@needs_operators
def test_a_changed_weight_is_packed_anew():
    linear, packed = nn.Linear(128, 512), PackedWeights(ENOUGH)
    multiply, x = packed.of(linear), torch.randn(64, 128)
    with torch.no_grad():
        first = multiply(x)
        linear.weight[5] = 0.0
        second = multiply(x)
        linear.load_state_dict({"weight": torch.ones(512, 128), "bias": torch.zeros(512)})
        third = multiply(x)
    assert (second[:, 5] == second[0, 5]).all() and not (first[:, 5] == first[0, 5]).all()
    torch.testing.assert_close(third, x.sum(-1, keepdim=True).expand(-1, 512), rtol=0, atol=1e-4)
    assert packed.free_bytes == ENOUGH - 128 * 512 * 4  # the old copies are gone


@needs_operators
def test_what_does_not_fit_stays_plain_until_memory_is_given_back():
    first, second = nn.Linear(128, 512), nn.Linear(128, 512)
    packed, x = PackedWeights(128 * 512 * 4), torch.randn(64, 128)
    products = packed.of(first), packed.of(second)
    with torch.inference_mode():
        for linear, product in zip((first, second), products, strict=True):
            torch.testing.assert_close(product(x), linear(x), rtol=0, atol=1e-5)
        assert packed_count(packed) == 1 and packed.free_bytes == 0
        packed.forget()
        assert packed_count(packed) == 0 and packed.free_bytes == 128 * 512 * 4
        products[1](x)
    assert packed.weights[id(second.weight)].packed is not None


class Adapter(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1.0


def with_hook(linear):
    linear.register_forward_hook(lambda module, inputs, output: output + 1.0)
    return linear


@pytest.mark.parametrize(
    "module",
    [Adapter(128, 512), with_hook(nn.Linear(128, 512)), nn.Linear(128, 512).double(), nn.Linear(128, 512, device="meta"), nn.Identity()],
    ids=["adapter", "hook", "float64", "device", "no linear layer"],
)
def test_anything_but_a_plain_linear_layer_is_called_itself(module):
    assert PackedWeights(ENOUGH).of(module) is module


def test_without_memory_or_operators_nothing_is_packed(monkeypatch):
    linear = nn.Linear(128, 512)
    assert PackedWeights(0).of(linear) is linear
    monkeypatch.setattr(packed_weights, "_operators", lambda: None)
    assert PackedWeights(ENOUGH).of(linear) is linear


@needs_operators
def test_layers_of_others_multiply_with_packed_weights_inside_the_context_only(monkeypatch):
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 128))
    other, packed, x = nn.Linear(128, 512), PackedWeights(ENOUGH), torch.randn(4, 65, 128)
    context = packed.within(block)
    with torch.inference_mode():
        expected = block(x)
        assert packed_count(packed) == 0
        for _ in range(2):  # it may be entered again
            with context:
                found, apart = block(x), other(x)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(apart, other(x), rtol=0, atol=0)
    assert packed_count(packed) == 2 and id(other.weight) not in packed.weights


@needs_operators
@pytest.mark.parametrize("pattern", ["M-M*-M*-", "M-*"])
def test_the_decoder_reads_and_goes_on_as_without(pattern):
    """Prefill from fresh and kept rows, the last token only, and decoding: same logits, same states."""
    torch.manual_seed(0)
    model = small_decoder(pattern).to(torch.float32)
    take_over_mixers(model)
    # Enough positions for products of so narrow a model to be worth it.
    plain, packed = ServingDecoder(model), ServingDecoder(model, ENOUGH)
    slots, texts = {}, [torch.randint(0, 60, (length,)) for length in (150, 90, 140)]
    results = {"plain": [], "packed": []}
    for name, decoder in (("plain", plain), ("packed", packed)):
        slots[name] = decoder.slots(3, 320)
        for last_only in (False, True):
            embeddings = model.get_input_embeddings()(torch.cat(texts)).detach().clone()
            hidden = decoder.prefill(embeddings, slots[name], [2, 0, 1], [len(text) for text in texts], last_only=last_only)
            results[name].append(decoder.logits(hidden))
        results[name].append(decoder.decode(torch.tensor([1, 2, 3]), slots[name], 301))
    assert packed_count(packed.packed) > 0 and packed_count(plain.packed) == 0
    for found, expected in zip(results["packed"], results["plain"], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    for layer, state in slots["plain"].ssm.items():
        torch.testing.assert_close(slots["packed"].ssm[layer], state, rtol=0, atol=1e-5 * float(state.abs().max()))


def test_linear_is_still_what_a_context_watches():
    """nn.Linear goes through F.linear with positional arguments: the context relies on it."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append((function, len(args), bool(kwargs)))
            return function(*args, **(kwargs or {}))

    with Watch():
        nn.Linear(4, 4)(torch.ones(2, 4))
    assert (F.linear, 3, False) in seen
