"""What fine-tuning on pictures takes from the language, and what a blend of text keeps: perplexity before and after, with and without.

    python benchmarks/keep_language.py                  writes benchmarks/results/keep_language.{md,json,svg}; a quarter of an hour
    python benchmarks/keep_language.py --steps 20 --language-steps 20 --pictures 60 --out language-result

The text is there on every machine: the documentation in Python's own library (docstrings of its modules), one module in twelve held out.
The tiny preset first learns this text and dense captions; from that one model, fine-tuning on questions about drawn pictures is then run
several times: on questions alone, and with text beside the same questions. Every run reads as many questions; a blend adds its
samples to them. All runs are the trainer's own (train_vlm/trainer.py); perplexity is train_vlm/perplexity.py's. The loss on held-out
questions tells what the text costs there. Ends with 1 when no blend keeps the perplexity nearer to the start than questions alone.
"""

import argparse
import ast
import json
import os
import platform
import socket
import sys
import sysconfig
import tempfile
import zlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from shown_command import shown_command  # noqa: E402

from train_vlm.conversations import read_llava  # noqa: E402
from train_vlm.perplexity import measure_perplexity, text_windows  # noqa: E402
from train_vlm.plain_text import text_records  # noqa: E402
from train_vlm.recipe import Data, Optimizer, Parts, Recipe, Run, Source  # noqa: E402
from train_vlm.scenes.__main__ import write_scenes  # noqa: E402
from train_vlm.shards import convert  # noqa: E402
from train_vlm.trainer import train  # noqa: E402
from vlm.assemble import assemble  # noqa: E402
from vlm.checkpoint import load_model, save_model  # noqa: E402
from vlm.files import write_whole  # noqa: E402
from vlm.report.curves import curves_svg  # noqa: E402

QUESTIONS = 8  # samples of a step, in every run
TEXTS = {"questions alone": 0, "1 text to 8": 1, "2 texts to 8": 2, "4 texts to 8": 4}  # pieces of text beside them
HELDOUT_ONE_IN = 12
TEXT_TOKENS = 192  # longest piece
SHORTEST_TEXT = 400  # characters; below it a docstring is a line or two


def documents() -> tuple[list[str], list[str]]:
    """The docstrings of each module of the standard library as one document: those to learn from, and those held out."""
    learnt, held_out = [], []
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # examples of what does not parse
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(text for text in texts if text)
        if len(text) >= SHORTEST_TEXT:
            name = str(path.relative_to(library))
            (held_out if zlib.crc32(name.encode()) % HELDOUT_ONE_IN == 0 else learnt).append(text)
    return learnt, held_out


def make_inputs(folder: Path, pictures: int) -> None:
    """FOLDER/model and FOLDER/shards/{captions,questions,heldout,text} and FOLDER/heldout.jsonl, unless they are there."""
    if (folder / "shards" / "text" / "summary.json").is_file():
        return
    for name, texts in zip(("text", "heldout"), documents(), strict=True):
        write_whole(folder / f"{name}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_scenes(folder / "scenes", train=pictures, heldout=1, seed=0, workers=1, is_quiet=True)
    train_files = folder / "scenes" / "train"
    write_whole(folder / "text.txt", "\n".join(json.loads(line)["text"] for line in (folder / "text.jsonl").open(encoding="utf-8")))
    corpora = [str(train_files / "captions.json"), str(train_files / "questions.json"), str(folder / "text.txt")]
    model, processor = assemble("tiny", tokenizer_corpus=corpora, seed=0)
    save_model(model, processor, folder / "model")
    asked = read_llava(train_files / "questions.json")
    kept_back = len(asked) // 10
    parts = {"captions": read_llava(train_files / "captions.json"), "questions": asked[kept_back:], "heldout": asked[:kept_back],
             "text": text_records(folder / "text.jsonl", processor, TEXT_TOKENS)}  # fmt: skip
    for name, samples in parts.items():
        convert(samples, train_files, processor, folder / "shards" / name)


def run(folder: Path, name: str, start: str, weights: dict[str, int], steps: int, rate: float, threads: int) -> dict:
    """Train once; the run's summary and its course of the loss."""
    shards = folder / "shards"
    sources = tuple(Source(str(shards / source), weight=float(weight), at_most_tiles=2) for source, weight in weights.items() if weight)
    recipe = Recipe(
        stage="sft", model=str(folder / start), out=str(folder / name), parts=Parts(rate, None, rate, rate),
        data=Data(sources=sources, heldout=(Source(str(shards / "heldout"), at_most_tiles=2),), heldout_samples=100,
                  heldout_text=str(folder / "heldout.jsonl"), batch_samples=sum(weights.values()), workers=0),
        optimizer=Optimizer(warmup=0.05),
        run=Run(steps=steps, log_every=5, save_every_minutes=0.5, threads_per_rank=threads),
    )  # fmt: skip
    train(recipe)
    log = folder / f"{name}.log"
    lines = [json.loads(line) for line in (log / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((log / "summary.json").read_text(encoding="utf-8"))
    return {
        "before": summary["text_perplexity_before"], "after": summary["text_perplexity"], "heldout_loss": summary["heldout_loss"],
        "seconds": summary["seconds"], "curve": [(line["step"], line["smooth_loss"]) for line in lines if "smooth_loss" in line],
    }  # fmt: skip


def page(result: dict) -> str:
    first, runs = result["language"], result["runs"]
    lines = [
        "# Keeping the language", "",
        f"{result['machine']}, {result['threads']} threads, torch {result['torch']}, Python {result['python']}. The tiny preset from "
        f"random weights: {result['language_steps']} steps on {result['text_tokens']:,} tokens of documentation and on captions, then "
        f"{result['steps']} steps of {QUESTIONS} conversations about pictures. Perplexity: {result['heldout_tokens']:,} tokens of "
        "modules that no run has read.", "",
        f"Before anything was learnt {first['before']:.1f}, after the text {first['after']:.1f}.", "",
        "| fine-tuning on | perplexity before | after | times | loss on held-out questions | seconds |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, found in runs.items():
        lines.append(f"| {name} | {found['before']:.1f} | {found['after']:.1f} | {found['after'] / found['before']:.2f} | "
                     f"{found['heldout_loss']:.4f} | {found['seconds']:.0f} |")  # fmt: skip
    lines += ["", f"![training loss]({result['picture']})", "", f"    {result['command']}", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-steps", type=int, default=900, help="steps on text and captions")
    parser.add_argument("--steps", type=int, default=300, help="steps of each fine-tuning")
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder to keep data and runs in: started again, it goes on (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "keep_language", help="path of the results, without ending")
    options = parser.parse_args()
    if min(options.steps, options.language_steps) < 1 or options.pictures < 40:
        parser.error(f"found {options.language_steps} and {options.steps} steps, {options.pictures} pictures; expected 1 and 40 or more")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        os.environ.setdefault("MASTER_PORT", str(server.getsockname()[1]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_inputs(folder, options.pictures)
        first = run(folder, "language", "model", {"text": 12, "captions": 4}, options.language_steps, 2e-3, options.threads)
        runs = {}
        for name, texts in TEXTS.items():
            weights = {"questions": QUESTIONS, "text": texts}
            runs[name] = run(folder, name.replace(" ", "-"), "language", weights, options.steps, 1e-3, options.threads)
        model, processor = load_model(folder / "language")
        heldout = measure_perplexity(model, text_windows(folder / "heldout.jsonl", processor), processor)
        text_tokens = json.loads((folder / "shards" / "text" / "summary.json").read_text(encoding="utf-8"))["tokens"]
    torch.distributed.destroy_process_group()
    result = {
        "command": shown_command("keep_language.py"), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(), "torch": torch.__version__, "threads": options.threads, "steps": options.steps,
        "language_steps": options.language_steps, "text_tokens": text_tokens, "heldout_tokens": heldout["tokens"], "language": first,
        "runs": runs, "picture": options.out.with_suffix(".svg").name,
    }  # fmt: skip
    curves = {name: found["curve"] for name, found in runs.items()}
    write_whole(options.out.with_suffix(".svg"), curves_svg(curves, "step", "loss, smoothed", log_y=True))
    write_whole(options.out.with_suffix(".json"), json.dumps(result) + "\n")
    write_whole(options.out.with_suffix(".md"), page(result))
    print(page(result))
    alone = runs["questions alone"]["after"]
    return 0 if any(found["after"] < alone for name, found in runs.items() if name != "questions alone") else 1


if __name__ == "__main__":
    sys.exit(main())
