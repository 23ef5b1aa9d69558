"""A short name for the content of a checkpoint folder, so that a run is not continued with another model and a score says what it is of."""

from hashlib import sha256
from pathlib import Path

__all__ = ["model_fingerprint"]

WHOLE_BYTES = 8 << 20  # files up to here are hashed whole; of larger ones the size and both ends
END_BYTES = 1 << 20


def model_fingerprint(folder: str | Path) -> str:
    """SHA-256 (hex) over names, sizes and contents of the folder's files (optimizer folders aside); weights are sampled at both ends.

    Raises FileNotFoundError for what is no folder and ValueError for a folder without config.json.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"the model folder {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no config.json; give a folder made by vlm.assemble or by training")
    digest = sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            if size <= WHOLE_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(END_BYTES))
                file.seek(-END_BYTES, 2)
                digest.update(file.read())
    return digest.hexdigest()
