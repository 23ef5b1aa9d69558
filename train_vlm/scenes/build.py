"""Pictures and their questions in numbers: drawn by several processes, the same whatever their number.

Pictures come in chunks of fixed size; a chunk is a pure function of (seed, set, chunk), because the running counts that balance
answers start anew in each. Processes only draw; the caller writes, so a process needs no more than Pillow. Every picture's seed is a
hash of the run's seed, the set's name and its index, so the held-out sets do not change with the size of the training set. A picture
whose file equals one that came before, in any set, is drawn again with another seed.
"""

import hashlib
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count

from train_vlm.ending_together import tied_to_parent
from train_vlm.scenes.balance import GQA_SHARES, LATE_TRAIN_SHARES, SHARES, TRAIN_SHARES, VIZWIZ_SHARES, Balance, as_vizwiz
from train_vlm.scenes.drawing import draw, encode
from train_vlm.scenes.layout import plan_size, size_group
from train_vlm.scenes.questions import Question, questions
from train_vlm.scenes.scene import Scene, make_scene

__all__ = ["SETS", "Chunk", "Picture", "PictureSet", "build_chunk", "build_sets", "picture_seed", "without_repeats"]

GOLDEN_RATIO = 0.6180339887498949  # its multiples, modulo 1, fill the unit interval evenly


@dataclass(frozen=True)
class PictureSet:
    """One set of pictures: where its images go under the run's folder, how many questions each has, and of what kinds."""

    name: str
    image_path: str  # printf pattern of the picture's number
    first_number: int
    questions_per_picture: int
    shares: dict[str, float]
    vizwiz_share: float  # of pictures whose questions follow `as_vizwiz` of the shares and have VizWiz' prompt
    chunk_pictures: int
    late_shares: dict[str, float] = field(default_factory=dict)  # where given: of every other picture, for the second half of a training


SETS = {
    "heldout/vqav2": PictureSet("heldout/vqav2", "heldout/vqav2/val2014/COCO_val2014_%012d.jpg", 900_001, 5, SHARES, 0.0, 1024),
    "heldout/gqa": PictureSet("heldout/gqa", "heldout/gqa/images/%d.jpg", 2_400_001, 5, GQA_SHARES, 0.0, 1024),
    "heldout/vizwiz": PictureSet("heldout/vizwiz", "heldout/vizwiz/val/VizWiz_val_%08d.jpg", 0, 1, VIZWIZ_SHARES, 0.0, 1024),
    "train": PictureSet("train", "train/images/%012d.jpg", 1, 10, TRAIN_SHARES, 1 / 3, 256, LATE_TRAIN_SHARES),
}


@dataclass(frozen=True)
class Picture:
    """One picture of a set: `number` and `path` name its file, `seed` is its scene's, `sha256` the file's."""

    number: int
    path: str
    seed: int
    sha256: str
    is_vizwiz: bool
    is_late: bool
    questions: tuple[Question, ...]
    scene: Scene


@dataclass(frozen=True)
class Chunk:
    """Work for one process: pictures `start` to `stop` of a set; `attempts` {index: how often it was drawn in vain}."""

    set_name: str
    seed: int
    start: int
    stop: int
    attempts: dict[int, int] = field(default_factory=dict)


def build_chunk(chunk: Chunk) -> tuple[list[tuple[Picture, bytes]], float]:
    """Draw the pictures of a chunk and ask about them: each with its JPEG file, and the processor seconds of it all."""
    began = time.process_time()
    plan = SETS[chunk.set_name]
    balances = {(False, False): Balance(plan.shares), (False, True): Balance(as_vizwiz(plan.shares))}
    if plan.late_shares:
        late = {False: plan.late_shares, True: as_vizwiz(plan.late_shares)}
        balances |= {(True, is_vizwiz): Balance(shares, balances[False, is_vizwiz]) for is_vizwiz, shares in late.items()}
    pictures = []
    for index in range(chunk.start, chunk.stop):
        seed = picture_seed(chunk.seed, chunk.set_name, index, chunk.attempts.get(index, 0))
        rng = random.Random(seed + 1)
        scene = make_scene(seed)
        data = encode(draw(scene))
        is_vizwiz = rng.random() < plan.vizwiz_share
        is_late = bool(plan.late_shares) and index % 2 == 1
        asked = questions(scene, rng, plan.questions_per_picture, balances[is_late, is_vizwiz])
        number = plan.first_number + index
        path = plan.image_path % number
        pictures.append((Picture(number, path, seed, hashlib.sha256(data).hexdigest(), is_vizwiz, is_late, tuple(asked), scene), data))
    return pictures, time.process_time() - began


def build_sets(
    sizes: dict[str, int], seed: int, workers: int, write: Callable[[str, bytes], object]
) -> Iterator[tuple[str, list[Picture], float]]:
    """Draw `sizes` {set name: pictures}; yields (set name, its pictures, processor seconds), in the order of `sizes`.

    `write(path, data)` is called once for every picture file, in order. No two pictures of all sets are the same file.
    """
    chunks = [
        Chunk(name, seed, start, min(start + SETS[name].chunk_pictures, size))
        for name, size in sizes.items()
        for start in range(0, size, SETS[name].chunk_pictures)
    ]
    seen: set[str] = set()
    pictures: dict[str, list[Picture]] = {name: [] for name in sizes}
    seconds = dict.fromkeys(sizes, 0.0)
    for chunk, (made, spent) in zip(chunks, _run(chunks, workers), strict=True):
        made, more = without_repeats(chunk, made, seen)
        seen.update(picture.sha256 for picture, _ in made)
        for picture, data in made:
            write(picture.path, data)
            pictures[chunk.set_name].append(picture)
        seconds[chunk.set_name] += spent + more
        if chunk.stop == sizes[chunk.set_name]:
            yield chunk.set_name, pictures.pop(chunk.set_name), seconds[chunk.set_name]


def picture_seed(seed: int, set_name: str, index: int, attempt: int = 0) -> int:
    """The scene's seed of a picture, such that any run of indexes of a set has the planned shares of tiles."""
    wanted = size_group(index * GOLDEN_RATIO % 1)
    for k in count():
        digest = hashlib.sha256(f"{seed}/{set_name}/{index}/{attempt}/{k}".encode()).digest()
        found = int.from_bytes(digest[:6], "big")
        columns, rows, *_ = plan_size(random.Random(found))
        if (columns, rows) in wanted:
            return found
    raise AssertionError("count() does not end")


def without_repeats(chunk: Chunk, made: list[tuple[Picture, bytes]], seen: set[str]) -> tuple[list[tuple[Picture, bytes]], float]:
    """The chunk, made again with other seeds for as long as a file of it is in `seen` (sha256) or twice in itself; and the seconds."""
    seconds = 0.0
    while True:
        here: set[str] = set()
        attempts = dict(chunk.attempts)
        for index, (picture, _) in enumerate(made, chunk.start):
            if picture.sha256 in seen or picture.sha256 in here:
                attempts[index] = attempts.get(index, 0) + 1
            here.add(picture.sha256)
        if attempts == chunk.attempts:
            return made, seconds
        chunk = replace(chunk, attempts=attempts)
        made, more = build_chunk(chunk)
        seconds += more


def _run(chunks: list[Chunk], workers: int) -> Iterator[tuple[list[tuple[Picture, bytes]], float]]:
    if workers == 1 or len(chunks) == 1:
        yield from map(build_chunk, chunks)
        return
    # Spawned, not forked: the parent may hold threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(chunks)), context, tied_to_parent, (os.getpid(),)) as pool:
        yield from pool.map(build_chunk, chunks)
