"""Which products of the decoder train in FP8: all but the first and the last few in the order in which they run, and a report on each.

The recipe of the Nemotron-H paper (arXiv 2504.03624): per-tensor current scaling, E4M3 for weights and activations, E5M2 for gradients,
the first four and last four products of the model in BF16. Embeddings, output head, norms, convolution and scan stay as they are. torchao
(Float8Linear) does the arithmetic; without a GPU that has FP8 units it is emulated: the same roundings, multiplied in float32, no speed.

How layers count, in the order in which they run: a Mamba-2 layer two products (in, out), attention four (q, k, v, o), an FFN two (up,
down); a mixture of experts two for its routed experts (up, down, all experts as one), two for the shared expert, which runs after them,
and one for each latent projection it has. The router, a small product in float32, does not count. Routed experts stay in BF16: their
weights are one tensor for all experts, for which torchao's float8 linear has no form.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHAttention, NemotronHForCausalLM, NemotronHMamba2Mixer

__all__ = ["Fp8Product", "Fp8Report", "convert_to_fp8", "decoder_products", "has_fp8_units"]

ORDER = {
    "mamba": ("in_proj", "out_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("up_proj", "down_proj"),
    "moe": ("fc1_latent_proj", "experts.up_proj", "experts.down_proj", "fc2_latent_proj", "shared_experts.up_proj",
            "shared_experts.down_proj"),
}  # fmt: skip
UNCOUNTED = {
    "embeddings": "looked up, not multiplied",
    "lm_head": "the output head",
    "conv1d": "a depthwise convolution",
    "gate": "the router, computed in float32",
    "lora_": "an adapter",
}
"""Why a weight is no product of the order, by a piece of its name."""


@dataclass(frozen=True)
class Fp8Product:
    """A product of the decoder: its place in the order of execution from 1 (None: it does not count), its name in the language model, the
    shape of its weight, and why it is not in FP8 (None: it is)."""

    place: int | None
    name: str
    shape: tuple[int, ...]
    reason: str | None = None


@dataclass(frozen=True)
class Fp8Report:
    """Every weight of the decoder of two or more dimensions, in order; `layers`: {name: Fp8Linear} of the converted ones."""

    products: tuple[Fp8Product, ...]
    is_emulated: bool
    layers: dict[str, nn.Module] = field(repr=False)

    def summary(self) -> str:
        """A few lines: how much is converted, and what is left by reason."""
        counted = [product for product in self.products if product.place is not None]
        left = defaultdict(list)
        for product in counted:
            if product.reason is not None:
                left[product.reason].append(product.name.removeprefix("model."))
        weights = sum(torch.Size(product.shape).numel() for product in counted)
        share = sum(layer.weight.numel() for layer in self.layers.values()) / weights
        how = "emulated in float32: no FP8 units here" if self.is_emulated else "on the FP8 units"
        lines = [f"FP8: {len(self.layers)} of the decoder's {len(counted)} products, {share:.0%} of their weights, {how}"]
        lines += [f"    not {', '.join(names)}: {reason}" for reason, names in left.items()]
        return "\n".join(lines)

    def rows(self) -> list[list[str]]:
        """A row a weight: place, name, shape, what became of it."""
        return [
            ["" if product.place is None else str(product.place), product.name, " x ".join(map(str, product.shape)),
             "FP8" if product.reason is None else f"not converted: {product.reason}"]
            for product in self.products
        ]  # fmt: skip


def has_fp8_units() -> bool:
    """Whether this process has a GPU that multiplies in FP8 (compute capability 8.9 or higher)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def _kind(mixer: nn.Module) -> str:
    if isinstance(mixer, NemotronHMamba2Mixer):
        return "mamba"
    if isinstance(mixer, NemotronHAttention):
        return "attention"
    return "moe" if hasattr(mixer, "experts") else "mlp"


def decoder_products(language_model: NemotronHForCausalLM) -> list[tuple[str, nn.Linear | nn.Parameter]]:
    """The decoder's products in the order in which they run: names in the language model, and the layer (or the experts' tensor). Of a
    layer with an adapter it is the layer under it."""
    found = []
    for number, block in enumerate(language_model.model.layers):
        for path in ORDER[_kind(block.mixer)]:
            owner, _, leaf = path.rpartition(".")
            item, name = getattr(block.mixer.get_submodule(owner), leaf, None), f"model.layers.{number}.mixer.{path}"
            if hasattr(item, "base_layer"):
                item, name = item.base_layer, f"{name}.base_layer"
            if isinstance(item, nn.Linear | nn.Parameter):  # a mixture without latent projections has an Identity there
                found.append((name, item))
    return found


def _unfit(item: nn.Linear | nn.Parameter, multiple: int) -> str | None:
    """Why a product cannot be in FP8, wherever it stands."""
    if not isinstance(item, nn.Linear):
        return "routed experts, one tensor for all"
    for size, side in ((item.out_features, "outputs"), (item.in_features, "inputs")):
        if size % multiple:
            return f"{size} {side}, no multiple of {multiple}"
    return None


def convert_to_fp8(
    language_model: NemotronHForCausalLM, *, skip_first: int = 4, skip_last: int = 4, emulate: bool | None = None, compiled: bool = False
) -> Fp8Report:
    """Let the decoder's linear layers multiply in FP8, in place; parameters stay the same objects. Call it before an engine is started.

    skip_first, skip_last: products at either end, in the order of execution, that stay. emulate: None decides by `has_fp8_units`. compiled:
    whether casts are fused by torch.compile. Raises ImportError without torchao, ValueError when nothing can be converted.
    """
    if skip_first < 0 or skip_last < 0:
        raise ValueError(f"found {skip_first = } and {skip_last = }; expected 0 or more products")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        from .fp8_linear import MULTIPLE, Fp8Linear
    except ImportError as error:
        raise ImportError(f"FP8 needs torchao ({error}): pip install 'nemotron-h-vision[train]'") from error
    emulate = not has_fp8_units() if emulate is None else emulate

    # 1. Decide.
    ordered, products = decoder_products(language_model), []
    for place, (name, item) in enumerate(ordered, 1):
        reason = _unfit(item, MULTIPLE)
        if place <= skip_first:
            reason = f"among the first {skip_first}"
        elif place > len(ordered) - skip_last:
            reason = f"among the last {skip_last}"
        weight = item.weight if isinstance(item, nn.Linear) else item
        products.append(Fp8Product(place, name, tuple(weight.shape), reason))
    chosen = {product.name for product in products if product.reason is None}
    if not chosen:
        reasons = sorted({product.reason for product in products})
        raise ValueError(f"none of the decoder's {len(products)} products can be in FP8: {'; '.join(reasons)}")

    # 2. Convert: torchao puts its layers in place, which then become ours.
    convert_to_float8_training(
        language_model, config=Float8LinearConfig(emulate=emulate), module_filter_fn=lambda module, name: name in chosen
    )
    layers = {name: language_model.get_submodule(name) for name in (product.name for product in products) if name in chosen}
    for layer in layers.values():
        Fp8Linear.take_over(layer, compiled=compiled)
    return Fp8Report(tuple(products + _uncounted(language_model, {product.name for product in products})), emulate, layers)


def _uncounted(language_model: nn.Module, counted: set[str]) -> list[Fp8Product]:
    """The other weights of two or more dimensions, and why they are no products of the order."""
    others = []
    for name, parameter in language_model.named_parameters():
        name = name.removesuffix(".weight")
        if parameter.ndim >= 2 and name not in counted:
            why = next((why for piece, why in UNCOUNTED.items() if piece in name), "its place in the order of execution is not known")
            others.append(Fp8Product(None, name, tuple(parameter.shape), why))
    return others
