"""Features to visual tokens: pixel shuffle and a two-layer MLP."""

from projector.mlp import Projector, load_internvl_projector
from projector.pixel_shuffle import pixel_shuffle

__all__ = ["Projector", "load_internvl_projector", "pixel_shuffle"]
