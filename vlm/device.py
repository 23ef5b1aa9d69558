"""Where a model runs when nobody has said: on the GPU, where torch finds one that it can use."""

import torch

__all__ = ["default_device"]


def default_device() -> str:
    """The process's current GPU as "cuda", or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"
