"""`python -m train_vlm.scenes --out DIR`: training and held-out scenes in LLaVA's, VQAv2's, GQA's and VizWiz' file formats.

summary.json is written last: where it stands, the folder is complete.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from train_vlm.scenes.build import SETS, Picture, build_sets
from train_vlm.scenes.dissent import best_constant
from train_vlm.scenes.gqa_files import gqa_files
from train_vlm.scenes.llava_files import llava_files
from train_vlm.scenes.summary import Blind, describe_set, table
from train_vlm.scenes.vizwiz_files import vizwiz_files
from train_vlm.scenes.vqav2_files import vqav2_files

__all__ = ["main", "write_scenes"]


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 2 with one line on stderr for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m train_vlm.scenes", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; files of an earlier run there are replaced")
    parser.add_argument("--train", type=int, default=4000, help="training pictures, ten questions each (default %(default)s)")
    parser.add_argument("--heldout", type=int, default=1000, help="questions at least in each held-out set (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures (default %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw (default %(default)s)")
    options = parser.parse_args(arguments)
    for name, least in (("train", 1), ("heldout", 1), ("workers", 1), ("seed", 0)):
        if (value := getattr(options, name)) < least:
            print(f"scenes: --{name} is {value}, expected {least} or more", file=sys.stderr)
            return 2
    try:
        summary = write_scenes(options.out, options.train, options.heldout, options.seed, options.workers)
    except OSError as error:
        print(f"scenes: cannot write to {options.out}: {error.strerror or error}; choose another --out", file=sys.stderr)
        return 2
    print(table(summary))
    print(f"{summary['seconds']:.1f} s; wrote {options.out}/summary.json")
    return 0


def write_scenes(out: Path, train: int, heldout: int, seed: int, workers: int, is_quiet: bool = False) -> dict:
    """Write `train` training pictures and held-out sets of at least `heldout` questions under `out`; returns the summary.

    Raises OSError when the folder cannot be written.
    """
    from tqdm import tqdm  # here, not above: drawing processes import this module, and need neither

    from vlm.files import write_whole

    began = time.perf_counter()
    sizes = {name: -(-heldout // plan.questions_per_picture) for name, plan in SETS.items() if name != "train"} | {"train": train}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").unlink(missing_ok=True)
    _clear_pictures(out)

    made: dict[str, tuple[list[Picture], float]] = {}
    with tqdm(total=sum(sizes.values()), unit="picture", disable=is_quiet, desc="scenes") as bar:

        def write(path: str, data: bytes) -> None:
            write_whole(out / path, data)
            bar.update()

        for name, pictures, seconds in build_sets(sizes, seed, workers, write):
            made[name] = (pictures, seconds)
    files = {
        "train": llava_files(made["train"][0]),
        "train/vqav2": vqav2_files(made["train"][0], "train2014"),
        "heldout/vqav2": vqav2_files(made["heldout/vqav2"][0], "val2014"),
        "heldout/gqa": gqa_files(made["heldout/gqa"][0]),
        "heldout/vizwiz": vizwiz_files(made["heldout/vizwiz"][0]),
    }
    for folder, contents in files.items():
        for name, content in contents.items():
            write_whole(out / folder / name, content)

    blind = Blind([question for picture in made["train"][0] for question in picture.questions])
    rows = json.loads(files["heldout/vizwiz"]["val.json"])
    ceilings = [best_constant([answer["answer"] for answer in row["answers"]]) for row in rows]
    summary = {
        "seed": seed,
        "sets": {name: describe_set(pictures, blind, spent) for name, (pictures, spent) in made.items()},
        "vizwiz_ceiling_percent": round(100 * sum(ceilings) / len(ceilings), 2),
        "seconds": round(time.perf_counter() - began, 2),
    }
    write_whole(out / "summary.json", json.dumps(summary, indent=1))
    return summary


def _clear_pictures(out: Path) -> None:
    """Remove the pictures of an earlier run (the names we give, nothing else), so that a smaller run leaves no strangers."""
    for plan in SETS.values():
        pattern = Path(plan.image_path.replace("%012d", "[0-9]" * 12).replace("%08d", "[0-9]" * 8).replace("%d", "[0-9]*"))
        for path in (out / pattern.parent).glob(pattern.name):
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
