"""The Nemotron-H decoder: transformers' parameters and configuration, our operations, presets and loading."""

from .layers import run_layers, take_over_mixers
from .layout import Layout
from .loading import load_language_model
from .parameters import param_count
from .pattern import build_pattern, default_config, small_config
from .presets import preset_config
from .ssd import chunk_scan
from .state import DecoderState

__all__ = [
    "DecoderState",
    "Layout",
    "build_pattern",
    "chunk_scan",
    "default_config",
    "load_language_model",
    "param_count",
    "preset_config",
    "run_layers",
    "small_config",
    "take_over_mixers",
]
