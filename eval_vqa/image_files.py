"""Pictures as the model is asked about them: decoded, or replaced by grey ones, each with the hash of its file.

The hash stands with every answer, so that two runs can be compared picture by picture. What an image becomes on its way into the model
(mode, rotation, tiles) is the processor's affair, not this file's.
"""

import io
from hashlib import sha256
from pathlib import Path

from eval_vqa.archives import read_bytes

__all__ = ["grey_like", "load_image"]

GREY = (127, 127, 127)


def load_image(path: Path):
    """(decoded PIL image, SHA-256 of the file as hex) of an image on disk or in an archive.

    Raises FileNotFoundError or ValueError with the path and what is wrong.
    """
    from PIL import Image

    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"image {path} not found") from None
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever strange bytes lead them to: SyntaxError, RuntimeError, struct.error ...
        reason = "it is no image that Pillow knows" if type(error).__name__ == "UnidentifiedImageError" else error
        raise ValueError(f"image {path} cannot be read: {reason}") from None
    return image, sha256(content).hexdigest()


def grey_like(image):
    """A grey picture of the same upright size: what a question alone gives away."""
    from PIL import Image

    from vlm.tiling import upright

    return Image.new("RGB", upright(image).size, GREY)
