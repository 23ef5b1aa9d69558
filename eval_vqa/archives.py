"""Official downloads are read where they lie: a path may lead into a zip file as if that were a folder.

`val2014.zip/val2014/COCO_val2014_000000000042.jpg` is the member of that archive, so that a split of 80,000 pictures need not be
unpacked to be measured on. Only reading; plain files and folders go through the same functions.
"""

import zipfile
from functools import lru_cache
from pathlib import Path

__all__ = ["exists", "is_archive", "is_file", "members", "read_bytes"]

MOST_OPEN = 16  # archives kept open per process; each holds its table of contents in memory


def is_archive(path: Path) -> bool:
    """Whether `path` is a zip file on disk."""
    return path.suffix == ".zip" and path.is_file()


def is_file(path: Path) -> bool:
    """Whether `path` is a file, on disk or in an archive. An archive that cannot be read holds nothing."""
    return path.is_file() or _member(path) is not None


def exists(path: Path) -> bool:
    """Whether `path` is a file or a folder, on disk or in an archive."""
    if path.exists() or _member(path) is not None:
        return True
    archive, name = _split(path)
    return archive is not None and any(other.startswith(f"{name}/") for other in members(archive))


def read_bytes(path: Path) -> bytes:
    """The content of a file, on disk or in an archive.

    Raises FileNotFoundError when there is none, ValueError for an archive that is broken.
    """
    archive, name = _split(path)
    if archive is None or path.is_file():
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found")
        return path.read_bytes()
    try:
        return _opened(archive, _stamp(archive)).read(name)
    except KeyError:
        raise FileNotFoundError(f"{path} not found: {archive.name} has no member {name!r}") from None
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{path} cannot be read from its archive ({error}); download {archive.name} again") from None


def members(archive: Path) -> list[str]:
    """Names of the files in a zip file. Raises ValueError when it is broken."""
    return list(_names(archive, _stamp(archive)))


def _member(path: Path) -> str | None:
    archive, name = _split(path)
    try:
        return name if archive is not None and name in _names(archive, _stamp(archive)) else None
    except ValueError:
        return None


def _split(path: Path) -> tuple[Path | None, str]:
    """(archive, name inside it) of a path that leads into a zip file, (None, "") of any other."""
    for parent in path.parents:
        if is_archive(parent):
            return parent, path.relative_to(parent).as_posix()
    return None, ""


def _stamp(archive: Path) -> tuple[int, int]:
    """What tells a file from another one put in its place."""
    found = archive.stat()
    return found.st_size, found.st_mtime_ns


@lru_cache(maxsize=MOST_OPEN)
def _opened(archive: Path, stamp: tuple[int, int]) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is no readable zip file ({error}); download it again") from None


@lru_cache(maxsize=MOST_OPEN)
def _names(archive: Path, stamp: tuple[int, int]) -> dict[str, None]:
    return {info.filename: None for info in _opened(archive, stamp).infolist() if not info.is_dir()}
