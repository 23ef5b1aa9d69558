"""Any timm model as an encoder: the output of `forward_features`, whatever its shape.

ViTs give tokens (after the model's final norm, where it has one): the prefix tokens (class, registers) are dropped. Convolutional and
hybrid towers give a map, N C h w or N h w C. The heads are taken off, so that the encoder holds only weights that it uses.

Weights go through the family's own `checkpoint_filter_fn`, which knows its old key names and resizes position embeddings; then every
key has to fit. timm's own loader skips that check as soon as the number of classes differs.
"""

import sys
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from vision_encoders.checkpoint_files import assign_weights, find_weight_files, iterate_tensors, read_json
from vision_encoders.contract import VisionEncoder, as_square

__all__ = ["TimmTower", "build_timm", "build_timm_tower"]

# Parts behind `forward_features` in timm's models. Their weights are legitimately unused, here and in a checkpoint.
UNUSED_PARTS = ("head", "head_dist", "fc", "classifier", "last_linear", "fc_norm", "head_norm", "head_drop", "attn_pool", "global_pool")
CONFIG_KEYS = ("mean", "std")


class TimmTower(VisionEncoder):
    """Features of `forward_features`; ViTs without their prefix tokens."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """N 3 H W -> N P C."""
        # Convolutions on a processor want channels innermost; in this order they need not turn their inputs around (34 -> 20 ms for
        # 18 tiles of a small residual network). Transformers do not mind.
        return _tower_features(self.tower, pixel_values.contiguous(memory_format=torch.channels_last))


def build_timm(model: str, checkpoint: Path | None, settings: dict) -> TimmTower:
    """Build timm's `model`. A checkpoint folder's config.json (timm's hub format) decides architecture and arguments."""
    settings = dict(settings)
    if checkpoint is None:
        return build_timm_tower(model, settings)
    path = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.json"
    config = read_json(path) if checkpoint.is_dir() or path.is_file() else {}
    architecture = config.get("architecture", model)
    if architecture.partition(".")[0] != model.partition(".")[0]:
        raise ValueError(f"{path} describes {architecture!r}, not {model!r}; ask for 'timm:{architecture}'.")
    stored = config.get("pretrained_cfg") or {}
    defaults = {key: stored[key] for key in CONFIG_KEYS if stored.get(key)}
    if stored.get("input_size"):
        defaults["image_size"] = stored["input_size"][-1]
    state = dict(iterate_tensors(find_weight_files(checkpoint)))
    settings = defaults | (config.get("model_args") or {}) | settings
    return build_timm_tower(model, settings, state=state, source=checkpoint)


def build_timm_tower(model: str, settings: dict, *, state: dict[str, Tensor] | None = None, source: Path | None = None) -> TimmTower:
    """Build timm's `model` with arguments `settings` (image_size, mean and std taken out) and, if given, the weights in `state`."""
    timm = _import_timm()
    if not timm.is_model(model):
        near = get_close_matches(model, timm.list_models(), n=3, cutoff=0.4)
        raise ValueError(f"timm {timm.__version__} has no model {model!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    arguments = {key: value for key, value in settings.items() if key not in (*CONFIG_KEYS, "image_size")}
    tower = _create(timm, model, arguments, settings.get("image_size"))
    image_size = settings.get("image_size") or _default_image_size(tower)

    # A family's filter may look at the head, so the heads go afterwards.
    if state is not None:
        family = sys.modules[type(tower).__module__]
        if hasattr(family, "checkpoint_filter_fn"):
            state = family.checkpoint_filter_fn(state, tower)
    for part in UNUSED_PARTS:
        if isinstance(getattr(tower, part, None), nn.Module):
            setattr(tower, part, nn.Identity())
    if state is not None:
        used = ((key, tensor) for key, tensor in state.items() if key.partition(".")[0] not in UNUSED_PARTS)
        assign_weights(tower, used, source=source or model)
    tower.eval()

    patches, hidden_size = _probe(tower, image_size)
    side = round(patches**0.5)
    if image_size % side:
        raise ValueError(
            f"timm model {model!r} cuts {image_size} px into {side} x {side} patches, which does not divide; choose an image_size that "
            f"is a multiple of the stride (for example {side * max(1, round(image_size / side))})."
        )
    defaults = tower.pretrained_cfg
    return TimmTower(
        tower,
        image_size=image_size,
        patch_size=image_size // side,
        hidden_size=hidden_size,
        mean=settings.get("mean") or defaults["mean"],
        std=settings.get("std") or defaults["std"],
        encoder_settings={"name": f"timm:{model}", **arguments},
    )


def _create(timm, model: str, arguments: dict, image_size: int | None) -> nn.Module:
    """Create the model without downloading; `image_size` is passed to those that take it."""
    options = {"pretrained": False, "num_classes": 0} | arguments
    if image_size is not None and "img_size" not in options:
        try:
            return timm.create_model(model, img_size=image_size, **options)
        except TypeError as error:  # convolutional towers take any size, and have no such argument
            if "img_size" not in str(error):
                raise ValueError(f"timm model {model!r} does not take these settings: {error}.") from error
    try:
        return timm.create_model(model, **options)
    except TypeError as error:
        raise ValueError(f"timm model {model!r} does not take these settings: {error}.") from error


def _default_image_size(tower: nn.Module) -> int:
    size = getattr(getattr(tower, "patch_embed", None), "img_size", None)
    return int(size[-1]) if size else int(tower.pretrained_cfg["input_size"][-1])


def _tower_features(tower: nn.Module, pixel_values: Tensor) -> Tensor:
    prefix_tokens = getattr(tower, "num_prefix_tokens", None)
    if prefix_tokens is None:
        prefix_tokens = 1 if isinstance(getattr(tower, "cls_token", None), Tensor) else 0
    return as_square(
        tower.forward_features(pixel_values),
        prefix_tokens=prefix_tokens,
        channels=tower.num_features,
        channels_last=str(getattr(tower, "output_fmt", "NCHW")).endswith("NHWC"),
    )


def _probe(tower: nn.Module, image_size: int) -> tuple[int, int]:
    """(P, C) of the output, by shapes alone: no arithmetic is done, on the meta device or any other."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = next(parameter for parameter in tower.parameters() if parameter.ndim >= 2)
    shape = (1, 3, image_size, image_size)
    with torch.no_grad():
        if weight.is_meta:
            features = _tower_features(tower, torch.empty(shape, dtype=weight.dtype, device="meta"))
        else:
            with FakeTensorMode(allow_non_fake_inputs=True):
                features = _tower_features(tower, torch.empty(shape, dtype=weight.dtype, device=weight.device))
    return features.shape[1], features.shape[2]


def _import_timm():
    try:
        import timm
    except ImportError as error:
        raise ImportError("timm is not installed; run: pip install 'nemotron-h-vision[vision]'") from error
    return timm
