"""Which pictures are the same: by the bytes of their file, or by their pixels, so that a copy in another format is found too.

A picture that was saved with loss once more, or cut, is another one here.
"""

import hashlib
import io
import zipfile
from pathlib import Path

import torch

from train_vlm.reading_processes import reader_settings
from vlm.tiling import open_image

__all__ = ["EvaluationImages", "hashes_of", "read_hashes"]

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def hashes_of(content: bytes) -> tuple[str, str | None]:
    """(hash of the bytes, hash of size and upright RGB pixels, or None when they cannot be decoded)."""
    try:
        image = open_image(io.BytesIO(content))
        pixels = hashlib.sha256(f"{image.width}x{image.height}".encode() + image.tobytes()).hexdigest()
    except ValueError:
        pixels = None
    return hashlib.sha256(content).hexdigest(), pixels


class EvaluationImages(torch.utils.data.Dataset):
    """The pictures of a folder, with all folders in it, or of a .zip: number -> (name, hash of bytes, hash of pixels or None).

    Raises FileNotFoundError / ValueError when there is no such place, or no picture in it.
    """

    def __init__(self, place: str | Path):
        self.place, self.archive = Path(place), None
        if self.place.is_dir():
            self.names = sorted(str(path) for path in self.place.rglob("*") if path.suffix.lower() in SUFFIXES)
        elif zipfile.is_zipfile(self.place):
            with zipfile.ZipFile(self.place) as archive:
                self.names = sorted(name for name in archive.namelist() if Path(name).suffix.lower() in SUFFIXES)
        else:
            raise FileNotFoundError(f"no images at {place}; expected the folder or .zip of an evaluation set's images")
        if not self.names:
            raise ValueError(f"{place} holds no images ({', '.join(sorted(SUFFIXES))}); expected those of an evaluation set")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: int) -> tuple[str, str, str | None]:
        name = self.names[number]
        if self.place.is_dir():
            content = Path(name).read_bytes()
        else:
            if self.archive is None:  # opened where it is read: in a worker, once
                self.archive = zipfile.ZipFile(self.place)
            content = self.archive.read(name)
        return name, *hashes_of(content)


def read_hashes(places: list[str | Path], *, workers: int = 0) -> dict[str, str]:
    """{hash of bytes or of pixels: name} over all pictures of all places."""
    known: dict[str, str] = {}
    for place in places:
        for name, content, pixels in torch.utils.data.DataLoader(EvaluationImages(place), batch_size=None, **reader_settings(workers)):
            known.setdefault(content, name)
            if pixels is not None:
                known.setdefault(pixels, name)
    return known
