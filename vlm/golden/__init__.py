"""The golden pack of a model folder: twelve drawn pictures with what the model made of them when it was saved.

Preprocessing drifts in silence. Another Pillow, a normalisation typed in anew, a tokenizer saved by another version: every answer changes a
little, no error is raised, and scores of half a year are no longer comparable. So a saved model carries its own proof, and whoever loads it
asks for it: grid, tiles, ids and first logits again, with a name for what moved.

    python -m vlm.golden DIR            check everything; exit 1 when something drifted
    python -m vlm.golden DIR --write    make the pack anew, after a change that was wanted
"""

from .drift import ON_DRIFT, check, guard
from .pack import FOLDER, write

__all__ = ["FOLDER", "ON_DRIFT", "check", "guard", "write"]
