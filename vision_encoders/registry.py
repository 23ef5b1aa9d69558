"""The encoders that can be named in a config or on a command line: one dict, one function.

A name is a family, or "family:MODEL" where the family is a library of models. timm and open_clip are imported only when asked for.
"""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from vision_encoders.contract import VisionEncoder
from vision_encoders.internvit import build_internvit, open_internvit
from vision_encoders.open_clip_towers import build_open_clip
from vision_encoders.stored_tensors import StoredTensor
from vision_encoders.timm_towers import build_timm
from vision_encoders.transformers_towers import build_transformers

__all__ = ["VISION_ENCODERS", "build_vision_encoder", "open_vision_encoder"]

# What may be asked for -> build(MODEL or "", checkpoint or None, settings)
VISION_ENCODERS: dict[str, Callable[[str, Path | None, dict], VisionEncoder]] = {
    "internvit": build_internvit,
    "open_clip:MODEL": build_open_clip,
    "timm:MODEL": build_timm,
    "transformers:MODEL": build_transformers,
}


def build_vision_encoder(name: str, *, checkpoint: str | Path | None = None, **settings) -> VisionEncoder:
    """Build the encoder `name` ("internvit", "open_clip:MODEL", "timm:MODEL", "transformers:MODEL"), in eval mode.

    With `checkpoint` (a folder or a weight file) its config decides the shape and its weights the dtype; without one the weights are
    random and float32, and nothing is downloaded. `settings` are the family's own (internvit: fields of transformers'
    InternVLVisionConfig; open_clip: fields of vision_cfg; timm: arguments of create_model; transformers: fields of
    the vision config), and for all of them `image_size` (pixels; position embeddings of a checkpoint are interpolated), `mean` and `std`.

    The result has image_size and patch_size (pixels), hidden_size, mean, std, and `encoder_settings`: a dict of plain values for
    which `build_vision_encoder(**encoder_settings)` builds the same architecture with random weights.
    `forward(pixel_values: N 3 H W) -> N P C`: patches only, row by row, P a square.

    Raises ValueError for an unknown name or setting or weights that do not fit, FileNotFoundError for a missing checkpoint, and
    ImportError with the pip command when timm or open_clip is not installed.
    """
    family, model, path = _find(name, checkpoint)
    return VISION_ENCODERS[family](model, path, settings)


def open_vision_encoder(name: str, *, checkpoint: str | Path | None = None, **settings) -> tuple[VisionEncoder, dict[str, StoredTensor]]:
    """As `build_vision_encoder`, for programs that move weights from file to file: (encoder, its weights by name in its state dict).

    InternViT from a checkpoint stays on disk: the encoder is on the meta device and no weight is read. The other libraries convert
    weights in memory; their towers are built whole.
    """
    family, model, path = _find(name, checkpoint)
    if family == "internvit":
        encoder, tensors = open_internvit(model, path, settings)
        if tensors is not None:
            return encoder, tensors
    else:
        encoder = VISION_ENCODERS[family](model, path, settings)
    return encoder, {key: StoredTensor.of(tensor) for key, tensor in encoder.state_dict().items()}


def _find(name: str, checkpoint: str | Path | None) -> tuple[str, str, Path | None]:
    """(key of VISION_ENCODERS, MODEL or "", path)"""
    family, separator, model = name.partition(":")
    key = f"{family}:MODEL" if separator else family
    if key not in VISION_ENCODERS or (separator and not model):
        near = get_close_matches(family, [known.partition(":")[0] for known in VISION_ENCODERS], n=1, cutoff=0.4)
        usual = {known.partition(":")[0]: known for known in VISION_ENCODERS}
        hint = f"; did you mean {usual[near[0]]!r}?" if near else ""
        raise ValueError(f"unknown vision encoder {name!r}; valid names: {', '.join(VISION_ENCODERS)}{hint}")
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a checkpoint folder or weight file for {name!r} on this machine.")
    return key, model, path
