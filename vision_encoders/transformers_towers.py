"""Vision towers of transformers, from checkpoints in its own format: the folders most encoders are published as.

    transformers:clip                      the last but one block, class token dropped (docs: open_clip_towers.py says why)
    transformers:siglip                    the last block after the final norm; SigLIP 2 of fixed size has this format too
    transformers:dinov2, transformers:dinov2_with_registers      the last block after the final norm, patches only
    transformers:radio                     RADIO's `features`; its own normalisation is taken off and becomes mean and std

Weights are read by transformers' from_pretrained, which knows the older names of its formats; whatever it did not find is an error here.
Not served: SigLIP 2 "naflex" (model_type siglip2), which takes patches of any aspect ratio in place of pictures.
"""

import dataclasses
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from torch import Tensor, nn

from vision_encoders.checkpoint_files import find_weight_files, raise_on_key_mismatch, read_json
from vision_encoders.contract import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, VisionEncoder
from vision_encoders.position_embedding import resize_position_embedding
from vision_encoders.stored_tensors import stored_tensors

__all__ = ["TransformersTower", "build_transformers"]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Class names in transformers; model types whose folders hold this tower; tokens before the patches; name of the position embedding."""

    config: str
    model: str
    found_in: tuple[str, ...]
    prefix_tokens: int
    positions: str | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fixed: dict = dataclasses.field(default_factory=dict)


HALF = (0.5, 0.5, 0.5)
KINDS = {
    "clip": _Kind("CLIPVisionConfig", "CLIPVisionModel", ("clip", "clip_vision_model"), 1, "position_embedding.weight",
                  CLIP_MEAN, CLIP_STD),
    "siglip": _Kind("SiglipVisionConfig", "SiglipVisionModel", ("siglip", "siglip_vision_model"), 0, "position_embedding.weight",
                    HALF, HALF, {"vision_use_head": False}),
    "dinov2": _Kind("Dinov2Config", "Dinov2Model", ("dinov2",), 1, "position_embeddings", IMAGENET_MEAN, IMAGENET_STD,
                    {"use_mask_token": False}),
    "dinov2_with_registers": _Kind("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", ("dinov2_with_registers",), 1,
                                   "position_embeddings", IMAGENET_MEAN, IMAGENET_STD),
    "radio": _Kind("RadioConfig", "RadioModel", ("radio",), 0, None, CLIP_MEAN, CLIP_STD),
}  # fmt: skip
# What stands beside the tower in these folders, and weights of the tower that the features do not need.
OTHER_PARTS = ("text_model.", "visual_projection.", "text_projection.", "logit_scale", "logit_bias")
UNUSED = ("mask_token", "vision_model.head.", "head.", "summary_idxs", "video_patch_projection", "video_embedder")
NOT_SETTINGS = ("out_features", "out_indices", "stage_names", "patch_dim", "video_patch_dim")


class TransformersTower(VisionEncoder):
    """Patches of a transformers vision model."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """N 3 H W -> N P C."""
        output = self.tower(pixel_values)
        return output.features if self.kind == "radio" else output.last_hidden_state[:, self.prefix_tokens :]


def build_transformers(model: str, checkpoint: Path | None, settings: dict) -> TransformersTower:
    """Build transformers' tower of type `model`.

    `settings` are fields of its vision config, `image_size` (position embeddings of a checkpoint are interpolated), mean and std. Raises
    ValueError for an unknown type, a folder of another, and weights that do not fit.
    """
    import transformers

    if model not in KINDS:
        near = get_close_matches(model, KINDS, n=1, cutoff=0.5)
        hint = "; its naflex checkpoints take no pictures, the others have type siglip" if model == "siglip2" else ""
        hint = hint or (f"; did you mean {near[0]!r}?" if near else "")
        raise ValueError(f"no encoder 'transformers:{model}'; the types are {', '.join(KINDS)}{hint}")
    kind = KINDS[model]
    config_class, model_class = getattr(transformers, kind.config, None), getattr(transformers, kind.model, None)
    if config_class is None or model_class is None:
        raise ImportError(f"transformers {transformers.__version__} has no {kind.model}; run: pip install --upgrade transformers")
    settings = dict(settings)
    mean, std, image_size = settings.pop("mean", None), settings.pop("std", None), settings.pop("image_size", None)
    names = {field.name for field in dataclasses.fields(config_class)} | {"attn_implementation"}
    for name in settings:
        if name not in names:
            near = get_close_matches(name, names, n=1)
            raise ValueError(f"unknown setting {name!r} for 'transformers:{model}'" + (f"; did you mean {near[0]!r}?" if near else ""))
    if checkpoint is None:
        size = {} if image_size is None or kind.positions is None else {"image_size": image_size}
        config = config_class(**(settings | size | kind.fixed))
        tower = model_class(config)
    else:
        tower = _load(kind, config_class, model_class, checkpoint, settings)
        config = tower.config
        stored_mean, stored_std = _normalisation(checkpoint)
        mean, std = mean or stored_mean, std or stored_std
        if kind.positions and image_size not in (None, config.image_size):
            tower = _resized(tower, model_class, kind, image_size)
            config = tower.config

    # Parts that the features do not need.
    if model == "clip":
        if config.num_hidden_layers < 2:
            raise ValueError(
                f"'transformers:clip' has {config.num_hidden_layers} layer(s); features come from the last but one, so two are needed."
            )
        vision = getattr(tower, "vision_model", tower)
        vision.encoder.layers = vision.encoder.layers[:-1]
        vision.post_layernorm = nn.Identity()
    elif model == "dinov2_with_registers":
        tower.embeddings.mask_token = None
    elif model == "radio":
        conditioner, tower.input_conditioner = tower.input_conditioner, nn.Identity()
        if not conditioner.norm_mean.is_meta:
            mean, std = mean or conditioner.norm_mean.flatten().tolist(), std or conditioner.norm_std.flatten().tolist()
    fields = config.to_dict()
    plain = {name: fields[name] for name in config_class.__dict__.get("__annotations__", {}) if name in fields and name not in NOT_SETTINGS}
    encoder = TransformersTower(
        tower,
        image_size=image_size or config.image_size,
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        mean=mean or kind.mean,
        std=std or kind.std,
        encoder_settings={name: value for name, value in plain.items() if not name.startswith("_")} | {"name": f"transformers:{model}"},
    )
    encoder.kind, encoder.prefix_tokens = model, kind.prefix_tokens + getattr(config, "num_register_tokens", 0)
    return encoder


def _load(kind: _Kind, config_class, model_class, checkpoint: Path, settings: dict) -> nn.Module:
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is a file; transformers' format needs the folder with config.json and the weights.")
    found = read_json(checkpoint / "config.json").get("model_type")
    if found not in kind.found_in:
        raise ValueError(f"{checkpoint / 'config.json'} describes a model of type {found!r}; expected {' or '.join(kind.found_in)}.")
    for _ in stored_tensors(find_weight_files(checkpoint)):
        pass  # missing shards and truncated files are named here
    with _no_progress_bars():
        try:
            config = config_class.from_pretrained(checkpoint, **kind.fixed)
            for name, value in settings.items():
                if name != "attn_implementation" and getattr(config, name, value) != value:
                    raise ValueError(f"setting {name}={value!r} contradicts the checkpoint, which has {getattr(config, name)!r}")
            tower, report = model_class.from_pretrained(checkpoint, config=config, dtype="auto", output_loading_info=True)
        except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{checkpoint} cannot be loaded as {kind.model}: {str(error).splitlines()[0]}") from error
    ignored = tuple(getattr(model_class, "_keys_to_ignore_on_load_missing", None) or ())
    raise_on_key_mismatch(
        checkpoint,
        missing=[key for key in report["missing_keys"] if not ignored or not key.endswith("lambda1")],
        unexpected=[
            key for key in report["unexpected_keys"] if not key.startswith(OTHER_PARTS) and not any(part in key for part in UNUSED)
        ],
        mismatched=map(str, report["mismatched_keys"]),
    )
    return tower


def _resized(tower: nn.Module, model_class, kind: _Kind, image_size: int) -> nn.Module:
    """The same tower for tiles of `image_size` px."""
    config = type(tower.config).from_dict(tower.config.to_dict() | {"image_size": image_size})
    larger = model_class(config).to(tower.dtype)
    weights = tower.state_dict()
    name = next(key for key in weights if key.endswith(kind.positions))
    weights[name] = resize_position_embedding(weights[name], image_size // config.patch_size, prefix_tokens=kind.prefix_tokens)
    larger.load_state_dict(weights)
    return larger


def _normalisation(checkpoint: Path) -> tuple[list[float] | None, list[float] | None]:
    path = checkpoint / "preprocessor_config.json"
    content = read_json(path) if path.is_file() else {}
    return content.get("image_mean"), content.get("image_std")


@contextmanager
def _no_progress_bars():
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
