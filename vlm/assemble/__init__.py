"""Join a vision encoder, a fresh projector and a decoder into one model folder; or take the decoder out again.

python -m vlm.assemble --preset tiny --out DIR
python -m vlm.assemble --language-model DIR --vision-encoder internvit --vision-checkpoint DIR --out DIR
python -m vlm.assemble --model DIR --to-language-model DIR

Checkpoints are joined from file to file, in the memory of a few tensors; only decoders with random weights are built in memory.
"""

from .command import main
from .extraction import to_language_model
from .in_memory import assemble
from .streaming import assemble_folder

__all__ = ["assemble", "assemble_folder", "main", "to_language_model"]
