"""LoRA on the decoder, with an account of what it reaches.

A hybrid decoder has traps for adapters: a list of attention projections, right for a Transformer, reaches four layers of fifty-two here; a
misspelt name matches nothing; and a fused Mamba kernel reads `out_proj.weight` past the adapter, which then never learns. So: a name
that matches nothing is an error, a table says which share of each kind of layer is reached, and after the first backward pass an adapter
without a gradient is an error. Our mixers call in_proj and out_proj as modules, so adapters on them work.

The adapters are peft's (arXiv 2106.09685), put into the model in place: it stays a VisionLanguageModel, and the saved folder opens with
`peft.PeftModel.from_pretrained` too. Encoder and projector keep what trained in them. Not here: experts of a mixture, whose matrices are
one fused tensor; output head and embeddings.
"""

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from torch import Tensor, nn

from .decoder.attention import HybridAttention
from .decoder.mixer import Mamba2Mixer
from .modeling import VisionLanguageModel

__all__ = [
    "ALL_PROJECTIONS", "AdapterWatch", "Coverage", "adapted_layers", "add_lora", "coverage", "load_adapter", "merge_adapter",
    "save_adapter", "take_off_adapters",
]  # fmt: skip

ALL_PROJECTIONS = ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
LAYERS = "language_model.model.layers."


def _peft():
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'nemotron-h-vision[train]'") from error
    return peft


def _layer_type(mixer: nn.Module) -> str:
    if isinstance(mixer, Mamba2Mixer):
        return "mamba"
    if isinstance(mixer, HybridAttention):
        return "attention"
    return "moe" if hasattr(mixer, "experts") else "mlp"


def _linears(model: VisionLanguageModel) -> list[str]:
    """Names of the decoder's linear layers, as in `model.named_modules()`; an adapted layer by its own name."""
    found = []
    for name, module in model.named_modules():
        inner = ".base_layer" in name or ".lora_" in name
        if name.startswith(LAYERS) and not inner and isinstance(getattr(module, "base_layer", module), nn.Linear):
            found.append(name)
    return found


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _resolve(model: VisionLanguageModel, targets: list[str]) -> list[str]:
    """Names of the layers that the targets mean. Raises ValueError for a target that means none, with the nearest that does."""
    names = _linears(model)
    leaves = sorted({name.rpartition(".")[2] for name in names})
    if not targets:
        raise ValueError(f"no LoRA targets; expected some of {', '.join(leaves)}")
    for target in targets:
        if not any(_matches(name, target) for name in names):
            near = get_close_matches(target, [*leaves, *names], n=1, cutoff=0.0)
            raise ValueError(
                f"the LoRA target {target!r} matches no linear layer of the decoder; nearest is {near[0]!r}; there are {', '.join(leaves)}"
            )
    return [name for name in names if any(_matches(name, target) for target in targets)]


def _present(model: VisionLanguageModel) -> list[str]:
    """The projections that this decoder has; one without, say, FFN layers has fewer than all."""
    leaves = {name.rpartition(".")[2] for name in _linears(model)}
    return [name for name in ALL_PROJECTIONS if name in leaves]


def add_lora(model: VisionLanguageModel, targets=None, *, rank: int = 16, alpha: float = 32.0, dropout: float = 0.0) -> VisionLanguageModel:
    """Put adapters on the decoder's linear layers, in place; the decoder's own weights are frozen, encoder and projector left as they are.

    targets: last parts of layer names ("in_proj"), or longer ones ("layers.3.mixer.in_proj"); None: every projection. Returns the model.
    Raises ImportError without peft; ValueError for a target that matches nothing, or a model that already has adapters.
    """
    peft = _peft()
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(f"found {rank = }, {alpha = }, {dropout = }; expected rank >= 1, alpha > 0, 0 <= dropout < 1")
    if adapted_layers(model):
        raise ValueError("the model already has adapters; merge or reload it first")
    targets = _present(model) if targets is None else [targets] if isinstance(targets, str) else list(targets)
    chosen = _resolve(model, targets)
    # A pattern instead of a name for each layer: short in the saved file, and encoders that happen to have a q_proj stay out.
    whole = all(target in ALL_PROJECTIONS for target in targets)
    pattern = "|".join(
        sorted({re.sub(r"layers\\\.\d+", r"layers\\.\\d+", re.escape(name)) if whole else re.escape(name) for name in chosen})
    )
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern, bias="none")
    _inject(model, config)
    found = sorted(adapted_layers(model))
    assert found == sorted(chosen), f"peft adapted {len(found)} layers, {len(chosen)} were meant"
    return model


def _inject(model: VisionLanguageModel, config) -> None:
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    _peft().inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():  # peft freezes everything but its adapters
        if not name.startswith("language_model."):
            parameter.requires_grad_(trained[name])
    model.lora_config = config


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: peft layer} of the layers that carry adapters."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")}


@dataclass(frozen=True)
class Coverage:
    """Of one kind of layer: how many there are and how many carry adapters, their mixers' parameters and how many stand under an adapter,
    and the adapters' own parameters."""

    layer_type: str
    layers: int
    layers_reached: int
    parameters: int
    parameters_reached: int
    adapter_parameters: int

    def line(self) -> str:
        share = self.parameters_reached / max(self.parameters, 1)
        return (
            f"{self.layer_type:>9}  {self.layers_reached:>3} of {self.layers:>3} layers  {share:>7.1%} of {self.parameters:>14,} parameters"
            f"  {self.adapter_parameters:>12,} in adapters"
        )


def coverage(model: VisionLanguageModel) -> list[Coverage]:
    """What the adapters reach, per kind of layer, the kinds in the order in which they first come; print each one's `line()`."""
    rows: dict[str, list[int]] = {}
    for block in model.language_model.model.layers:
        row = rows.setdefault(_layer_type(block.mixer), [0, 0, 0, 0, 0])
        adapted = adapted_layers(block.mixer)
        own = [(name, p.numel()) for name, p in block.mixer.named_parameters() if ".lora_" not in name]
        under = sum(count for name, count in own if any(name.startswith(f"{layer}.base_layer.") for layer in adapted))
        added = sum(p.numel() for name, p in block.mixer.named_parameters() if ".lora_" in name)
        for place, value in enumerate((1, int(bool(adapted)), sum(count for _, count in own), under, added)):
            row[place] += value
    return [Coverage(kind, *row) for kind, row in rows.items()]


class AdapterWatch:
    """Sees which adapters get a gradient in the first backward pass, also where an engine takes gradients away at once (ZeRO).

    The second matrix of an adapter starts at zero, so the first has a gradient of zero in the first step: only the second is watched.
    """

    def __init__(self, model: VisionLanguageModel):
        self._silent = {
            f"{name} ({adapter})": weights.weight
            for name, layer in adapted_layers(model).items()
            for adapter, weights in layer.lora_B.items()
        }
        if not self._silent:
            raise ValueError("the model has no adapters to watch; call add_lora first")
        self._hooks = [weight.register_hook(self._seen(name)) for name, weight in self._silent.items()]

    def _seen(self, name: str):
        def hook(gradient: Tensor) -> None:
            if name in self._silent and gradient.any():
                del self._silent[name]

        return hook

    @property
    def silent(self) -> list[str]:
        """The adapters without a gradient so far."""
        return sorted(self._silent)

    def check(self, silent: list[str] | None = None) -> None:
        """After the first backward pass; ends the watch. `silent`: those without a gradient on any rank (None: on this one).

        Raises ValueError that lists them.
        """
        for hook in self._hooks:
            hook.remove()
        names = self.silent if silent is None else silent
        if names:
            raise ValueError(
                f"{len(names)} adapters had no gradient in the first step: {', '.join(names[:6])}{' ...' if len(names) > 6 else ''}; "
                "their layers do not run, or a fused kernel reads the weight past the adapter"
            )


def save_adapter(model: VisionLanguageModel, folder: str | Path, *, state_dict: Mapping[str, Tensor] | None = None) -> Path:
    """Write adapter_model.safetensors and adapter_config.json (peft's format) whole; an older folder is replaced.

    `state_dict`: weights to take in place of the model's own (ZeRO-3 gathers them apart). Only the adapters: a projector that trained
    beside them belongs to the model folder. Raises ValueError when there are none.
    """
    from safetensors.torch import save_file

    if not adapted_layers(model):
        raise ValueError("the model has no adapters to save")
    weights = {f"base_model.model.{key}": value.contiguous() for key, value in _peft().get_peft_model_state_dict(model, state_dict).items()}
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
    try:
        save_file(weights, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        model.lora_config.save_pretrained(temporary)
        temporary.chmod(0o755)
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def load_adapter(model: VisionLanguageModel, folder: str | Path) -> VisionLanguageModel:
    """Put the adapters of a saved folder onto a model, in place; returns it.

    Raises FileNotFoundError when there is no adapter, ValueError when it does not fit the model.
    """
    from safetensors.torch import load_file

    peft = _peft()
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"no adapter in {folder}; expected adapter_config.json and adapter_model.safetensors")
    if adapted_layers(model):
        raise ValueError("the model already has adapters; merge or reload it first")
    config = peft.LoraConfig.from_pretrained(str(folder))
    weights = {key.removeprefix("base_model.model."): value for key, value in load_file(folder / "adapter_model.safetensors").items()}
    wanted = [name for name in _linears(model) if any(key.startswith(f"{name}.lora_") for key in weights)]
    meant = {key.partition(".lora_")[0] for key in weights}
    if strangers := sorted(meant - set(wanted)):
        raise ValueError(f"{folder} has adapters for {len(strangers)} layers that this model has not: {', '.join(strangers[:6])}")
    _inject(model, config)
    try:
        report = peft.set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit this model: {str(error).splitlines()[-1].strip()}") from error
    missing = [key for key in report.missing_keys if ".lora_" in key]
    if missing or report.unexpected_keys:
        raise ValueError(f"{folder} does not fit this model: missing {missing[:4]}, unexpected {report.unexpected_keys[:4]}")
    return model


def merge_adapter(model: VisionLanguageModel) -> VisionLanguageModel:
    """Add the adapters into the decoder's weights and take them off: a plain model again, to save and serve; returns it.

    Raises ValueError when there are none.
    """
    adapted = adapted_layers(model)
    if not adapted:
        raise ValueError("the model has no adapters to merge")
    for layer in adapted.values():
        layer.merge()
    return take_off_adapters(model)


def take_off_adapters(model: VisionLanguageModel) -> VisionLanguageModel:
    """Put each adapted layer's own layer back in its place, with nothing added; returns the model, again without adapters."""
    for name, layer in adapted_layers(model).items():
        model.set_submodule(name, layer.get_base_layer())
    for leftover in ("lora_config", "peft_config"):
        if hasattr(model, leftover):
            delattr(model, leftover)
    return model
