"""Weight-only int8 for the decoder, by torchao: a quarter of the memory for weights, at some cost in speed or score that is to be measured.

The encoder, the projector, the embeddings and the output head stay as they are.
"""

from torch import nn

__all__ = ["quantize_decoder"]


def quantize_decoder(language_model: nn.Module, kind: str) -> int:
    """Quantise the projections of every block in place; returns how many. kind: "int8".

    Raises ValueError for another kind and ImportError, with the pip command, when torchao is missing.
    """
    if kind != "int8":
        raise ValueError(f"quantize is {kind!r}; expected None or 'int8'")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError(f"int8 needs torchao ({error}); pip install 'nemotron-h-vision[train]'") from error
    chosen = {id(module) for module in language_model.model.layers.modules() if isinstance(module, nn.Linear)}
    quantize_(language_model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: id(module) in chosen)
    return len(chosen)
