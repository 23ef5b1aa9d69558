"""kill -9 at random moments of a training run: are the final weights those of the run that was never killed, to the last bit?

    python benchmarks/kill_training.py                     writes benchmarks/results/kill_training.{md,json}
    python benchmarks/kill_training.py --seconds 200       stops after 200 s; the same command goes on with the next kill

The quickstart's recipe on a few scenes, one rank and its reading process. The run is started again and again and killed: one time in five
in its start-up, one in five while a checkpoint is being written, else a random time after a random number of new steps; each time all of
its processes. One time in five it is not killed but asked to end (SIGTERM), and must do so with exit code 4 and a checkpoint of its last
step. Then it is left alone. Beside the weights, the account of what was read, the hash over the stream of samples and the loss of
every step are compared. At last, what one of the kills left behind goes on with two ranks: the hash must be the same, the losses near.
"""

import argparse
import atexit
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
import yaml  # noqa: E402
from result_files import write_results  # noqa: E402

from train_vlm.quickstart import ENCODER, RECIPES  # noqa: E402
from vlm.files import write_whole  # noqa: E402

LONGEST_SECONDS = 1200  # for any start
LONGEST_DELAY_SECONDS = 0.4
PICTURES, BATCH = 60, 4
QUIET = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def environment() -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return os.environ | QUIET | {"MASTER_PORT": str(probe.getsockname()[1])}


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LONGEST_SECONDS)
    if done.returncode:
        raise SystemExit(f"kill_training: {' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-600:]}")


def make_inputs(work: Path, steps: int, save_every: int) -> None:
    """Scenes, a model, shards, and the quickstart's last recipe in steps instead of minutes."""
    scenes, model = work / "scenes", work / "model"
    texts = {name: str(scenes / "train" / f"{name}.json") for name in ("captions", "questions", "late_questions")}
    run("-m", "train_vlm.scenes", "--out", str(scenes), "--train", str(PICTURES), "--heldout", "4")
    corpora = [part for text in texts.values() for part in ("--tokenizer-corpus", text)]
    run("-m", "vlm.assemble", "--preset", "tiny", *ENCODER, *corpora, "--out", str(model))
    for name, text in texts.items():
        run("-m", "train_vlm.shards", "convert", "--llava", text, "--images", str(scenes / "train"), "--model", str(model),
            "--out", str(work / "shards" / name))  # fmt: skip
    recipe = yaml.safe_load((RECIPES / "quickstart_sft.yaml").read_text(encoding="utf-8"))
    for source in recipe["data"]["sources"]:
        source["shards"] = str(work / "shards" / Path(source["shards"]).name)
    recipe |= {"model": str(model), "out": "set by the command"}
    recipe["data"]["batch_samples"] = BATCH
    recipe["run"] |= {"minutes": None, "steps": steps, "save_every_steps": save_every, "save_every_minutes": None, "log_every": 1,
                      "threads_per_rank": 1}  # fmt: skip
    write_whole(work / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False))


def command(work: Path, name: str, ranks: int) -> list[str]:
    program = [str(ROOT / "train_vlm" / "sft.py"), "--recipe", str(work / "recipe.yaml"), f"out={work / name}"]
    if ranks == 1:
        return [sys.executable, *program]
    port = environment()["MASTER_PORT"]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", port, *program]


def start(work: Path, name: str, ranks: int = 1) -> subprocess.Popen:
    """A run in a process group of its own, so that all of it can be killed at once."""
    return subprocess.Popen(command(work, name, ranks), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL,
                            stderr=open(work / f"{name}.stderr", "w"), start_new_session=True)  # fmt: skip


def finish(work: Path, name: str, ranks: int = 1) -> float:
    """Run to the end; seconds."""
    began, process = time.monotonic(), start(work, name, ranks)
    try:
        code = process.wait(LONGEST_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if code:
        raise SystemExit(f"kill_training: the run {name} failed: {(work / f'{name}.stderr').read_text()[-600:]}")
    return time.monotonic() - began


def lines(work: Path, name: str) -> list[dict]:
    path = work / f"{name}.log" / "log.jsonl"
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # a torn last line
    return found


def steps_of(work: Path, name: str) -> int:
    found = lines(work, name)
    return found[-1]["step"] if found else 0


def is_saving(work: Path, name: str) -> bool:
    return any((work / f"{name}.checkpoints").glob(".step-*.partial"))


def _stop(process: subprocess.Popen) -> None:
    """Nothing goes on when this program is stopped."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def kill_once(work: Path, number: int, most_new_steps: float, start_up_seconds: float, generator: random.Random) -> dict:
    """Start the run and kill it; what was seen."""
    moment = generator.choices(("start-up", "saving", "training", "asked"), (1, 1, 2, 1))[0]
    before, began = steps_of(work, "killed"), time.monotonic()
    target, delay = before + generator.uniform(1, most_new_steps), generator.uniform(0, LONGEST_DELAY_SECONDS)
    process = start(work, "killed")
    atexit.register(_stop, process)
    if moment == "start-up":
        time.sleep(generator.uniform(0, start_up_seconds))
    else:
        fresh = False  # the log is cut to the checkpoint's step first: only then do its lines count
        while process.poll() is None:
            now = steps_of(work, "killed")
            fresh = fresh or now < before or now > before or number == 0
            if fresh and now >= target and (moment != "saving" or is_saving(work, "killed")):
                break
            time.sleep(0.004)
        time.sleep(delay / 20 if moment == "saving" else delay)
    if process.poll() is not None:
        raise SystemExit(f"kill_training: the run ended by itself, with {process.returncode}; take more steps or fewer kills")
    caught_saving = moment != "start-up" and is_saving(work, "killed")  # what an earlier kill left is cleared away in the start-up
    os.killpg(process.pid, signal.SIGTERM if moment == "asked" else signal.SIGKILL)
    code = process.wait(LONGEST_SECONDS)
    folders = sorted(path.name for path in (work / "killed.checkpoints").glob("step-*")) if (work / "killed.checkpoints").is_dir() else []
    if moment == "asked" and (code != 4 or folders[-1:] != [f"step-{steps_of(work, 'killed'):08d}"]):
        raise SystemExit(f"kill_training: asked to end at step {steps_of(work, 'killed')}, it ended with {code} and saved {folders}")
    return {"moment": moment, "after_seconds": round(time.monotonic() - began, 2), "step": steps_of(work, "killed"),
            "newest_checkpoint": folders[-1] if folders else None, "while_saving": caught_saving}  # fmt: skip


def verdict(work: Path) -> dict:
    files = [(work / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    markers = [json.loads((work / name / "training.json").read_text()) for name in ("whole", "killed")]
    whole, killed, two = (lines(work, name) for name in ("whole", "killed", "on_two"))
    losses = {line["step"]: line["loss"] for line in whole}
    return {
        "weights_equal_to_the_last_bit": files[0] == files[1],
        "steps": len(whole),
        "losses_that_differ": sum(losses[line["step"]] != line["loss"] for line in killed),
        "steps_missing_in_the_log": len(set(losses) - {line["step"] for line in killed}),
        "accounts_equal": markers[0]["ledger"] == markers[1]["ledger"],
        "stream_hash": whole[-1]["stream"],
        "stream_hash_after_the_kills": killed[-1]["stream"],
        "starts": markers[1]["standing"]["starts"],
        "stream_hash_after_1_to_2_ranks": two[-1]["stream"],
        "two_ranks_from_step": two[0]["step"],
        "largest_difference_of_a_loss_on_two_ranks": max(abs(line["loss"] - losses[line["step"]]) for line in two),
    }


def page(record: dict) -> str:
    found = record["verdict"]
    out = ["# kill -9 at random moments of a training run", "", f"    {record['command']}", ""]
    out += [f"{record['machine']}; {', '.join(f'{name} {value}' for name, value in record['versions'].items())}. {record['recipe']}", ""]
    out += ["| what | found |", "|---|---:|", *(f"| {name.replace('_', ' ')} | {value} |" for name, value in found.items()), ""]
    out += [f"The undisturbed run took {record['undisturbed_seconds']:.0f} s.", ""]
    out += ["| kill | at | after s | step in the log | newest checkpoint | a checkpoint half written |", "|---:|---|---:|---:|---|---|"]
    for number, kill in enumerate(record["kills"], 1):
        out.append(f"| {number} | {kill['moment']} | {kill['after_seconds']} | {kill['step']} | {kill['newest_checkpoint'] or '-'} | "
                   f"{'yes' if kill['while_saving'] else 'no'} |")  # fmt: skip
    return "\n".join(out) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save-every", type=int, default=4, help="steps between two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop after this time; the same command goes on")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "kill_training", help="where the runs are; remove it to begin anew")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kill_training")
    options = parser.parse_args()
    began, work = time.monotonic(), options.work
    settings = {name: getattr(options, name) for name in ("kills", "steps", "save_every", "seed")}
    state_file = work / "state.json"
    state = json.loads(state_file.read_text()) if state_file.is_file() else {"settings": settings, "kills": []}
    if state["settings"] != settings:
        raise SystemExit(f"kill_training: {work} holds a run with {state['settings']}; remove it, or give another --work")

    def keep() -> None:
        write_whole(state_file, json.dumps(state, indent=1))

    def is_late() -> bool:
        late = options.seconds is not None and time.monotonic() - began > options.seconds
        if late:
            print(f"{len(state['kills'])} of {options.kills} kills done; the same command goes on")
        return late

    if not (work / "recipe.yaml").is_file():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        make_inputs(work, options.steps, options.save_every)
    if "undisturbed_seconds" not in state:
        shutil.rmtree(work / "whole", ignore_errors=True)
        state["undisturbed_seconds"] = finish(work, "whole")
        state["start_up_seconds"] = max(1.0, state["undisturbed_seconds"] - lines(work, "whole")[-1]["seconds"])
        keep()
    most_new_steps = 0.85 * (options.steps - options.save_every) / options.kills * 2
    while len(state["kills"]) < options.kills:
        if is_late():
            return 0
        number = len(state["kills"])
        left = options.steps - options.save_every - steps_of(work, "killed")
        most = min(most_new_steps, 0.9 * left / max(1, options.kills - number) * 2)
        generator = random.Random(f"{options.seed} {number}")
        state["kills"].append(kill_once(work, number, max(1.0, most), state["start_up_seconds"], generator))
        if state["kills"][-1]["newest_checkpoint"] and 2 * number >= options.kills and not (work / "on_two.checkpoints").is_dir():
            shutil.copytree(work / "killed.checkpoints", work / "on_two.checkpoints")
        keep()
        print(state["kills"][-1], flush=True)
    if is_late():
        return 0
    finish(work, "killed")
    finish(work, "on_two", ranks=2)
    given = [f"--{key.replace('_', '-')} {value}" for key, value in settings.items()]
    record = {
        "command": " ".join(["python benchmarks/kill_training.py", *given]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "recipe": f"The quickstart's recipe on {PICTURES} scenes: tiny model, Muon, {options.steps} steps of {BATCH} samples, a checkpoint "
        f"every {options.save_every} steps, one rank with a reading process.",
        "undisturbed_seconds": state["undisturbed_seconds"],
        "kills": state["kills"],
        "verdict": verdict(work),
    }  # fmt: skip
    write_results(options.out, record, page(record))
    found = record["verdict"]
    hashes = {found[key] for key in found if key.startswith("stream_hash")}
    good = found["weights_equal_to_the_last_bit"] and found["accounts_equal"] and not found["losses_that_differ"] and len(hashes) == 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
