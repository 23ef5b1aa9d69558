"""Pictures that come with a request to the server: as data URLs, and in no other way.

An address on the web would make the server fetch what a stranger names, a path would let him read its disk; both are refused.
"""

import base64
import binascii
import io
from urllib.parse import unquote_to_bytes

from PIL import Image

from vlm.tiling import open_image

__all__ = ["open_sent_picture"]


def open_sent_picture(url) -> Image.Image:
    """The upright RGB picture of a data URL. Raises ValueError for any other URL, and for what is no picture."""
    if not isinstance(url, str) or not url[:5].lower() == "data:":
        shown = f"{url[:60]!r}" if isinstance(url, str) else type(url).__name__
        raise ValueError(f"found an image URL {shown}; this server fetches nothing: send the picture itself, data:image/png;base64,...")
    head, comma, content = url.partition(",")
    if not comma:
        raise ValueError(f"found the data URL {url[:60]!r} without a comma; expected data:image/png;base64,...")
    try:
        if head.lower().endswith(";base64"):
            letters = "".join(content.split()).rstrip("=")
            data = base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
        else:
            data = unquote_to_bytes(content)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the data URL {head[:60]!r} holds no valid base64 ({error})") from None
    file = io.BytesIO(data)
    file.name = f"the picture of {head[:60]!r}"  # what an error calls it
    return open_image(file)
