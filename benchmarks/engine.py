"""Questions a second of the engine beside stock transformers `generate`, and what a token costs as the context grows.

    python benchmarks/engine.py                      writes benchmarks/results/engine.{md,json}
    python benchmarks/engine.py --model hybrid --each 5 --no-context --add      one line of them measured anew

Same weights, threads, pictures (7 tiles each), questions and number of new tokens for all three ways; each in a process of its own, taking
turns. The best of the rounds counts for everyone. Preparing the pictures is part of the time, for all. Stock left padding is a baseline
of speed only: before transformers masked padding in the recurrent layers its answers were wrong there. "By operations": how many times
fewer the engine needs than one by one, counted from weights and positions; what is above it is computing better.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from engine_context import decode_times  # noqa: E402
from engine_work import MODELS, WAYS, build  # noqa: E402

from vlm.files import write_whole  # noqa: E402

# Pictures, questions about each. A set of questions keeps the engine's batch of 128 rows full; so do four pictures of thirty, and more
# pictures of fewer questions where one is so quick.
CASES = {"tiny": ((4, 30), (24, 5), (120, 1)), "hybrid": ((4, 30), (4, 5), (8, 1))}
BARS = {
    ("tiny", 30): (20, 5),
    ("tiny", 5): (5, 2),
    ("tiny", 1): (3, 1.3),
    ("hybrid", 30): (20, 5),
    ("hybrid", 5): (5, 2),
    ("hybrid", 1): (1.5, 1.1),
}
# Of VQA's answers 89 % are one word, 7 % two, 3 % three (Antol et al. 2015, arXiv 1505.00468): three tokens and the end of the turn; and a
# sentence. Tokens are decoded by everyone, so the longer an answer, the less a shared picture saves and the more the calls a token takes.
NEW_TOKENS = (4, 16)
PARTS = ("vision_encoder", "projector", "language_model")
ONE_BY_ONE = {"tiny": 10, "hybrid": 2}  # questions timed for the slow way; each costs it the same
BATCHED = {"tiny": 30, "hybrid": 10}  # and for the batched one: one batch


class Worker:
    """One way of answering in a process of its own."""

    def __init__(self, way: str, folder: Path, threads: int):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "engine_work.py"), way, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self.resident_bytes = self._read()["resident_bytes"]

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with code {self.process.wait()}; run {' '.join(self.process.args)} by hand to see why")
        return json.loads(line)

    def run(self, **order) -> dict:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(model: str, folder: Path, parameters: dict, rounds: int, threads: int, new_tokens: int, only: int | None) -> list[dict]:
    """One row for each case: seconds a question of each way, ratios, peak memory."""
    rows = []
    for pictures, each in CASES[model]:
        if only not in (None, each):
            continue
        workers = {way: Worker(way, folder, threads) for way in WAYS}  # fresh ones, so that each case has its own peak
        order = {"pictures": pictures, "each": each, "new_tokens": new_tokens}
        best: dict[str, dict] = {}
        for number in range(rounds + 1):
            for way, worker in workers.items():
                limit = {"stock one by one": ONE_BY_ONE[model], "stock batched": BATCHED[model], "engine": pictures * each}[way]
                if number == 0 and way != "engine":
                    limit = min(limit, 2)  # warm-up
                found = worker.run(**order, limit=limit)
                seconds = {name: found[name] / found["questions"] for name in ("wall_seconds", "cpu_seconds")}
                if number:
                    best[way] = {name: min(value, best.get(way, seconds)[name]) for name, value in seconds.items()}
                    best[way] |= {name: found[name] for name in ("peak_bytes", "prompt_tokens", "computed_tokens") if name in found}
        for way, worker in workers.items():
            best[way]["resident_bytes"] = worker.resident_bytes
            worker.close()
        ours = best["engine"]
        ratios = [best[way]["wall_seconds"] / ours["wall_seconds"] for way in ("stock one by one", "stock batched")]
        cpu_ratios = [best[way]["cpu_seconds"] / ours["cpu_seconds"] for way in ("stock one by one", "stock batched")]
        counted = count_ratio(parameters, ours, each, new_tokens)
        rows.append({"model": model, "pictures": pictures, "each": each, "new_tokens": new_tokens, "ways": best, "ratios": ratios,
                     "cpu_ratios": cpu_ratios,
                     "operations_ratio": counted})  # fmt: skip
        print(line(rows[-1]), flush=True)
    return rows


def count_ratio(parameters: dict, ours: dict, each: int, new_tokens: int) -> float:
    """Operations of a question one by one over those of the engine, from weights and positions alone: what sharing the picture gives if
    both computed equally well."""
    encoding = parameters["encoder_positions"] * parameters["vision_encoder"]
    body = parameters["decoder_body"]
    stock = encoding + body * (ours["prompt_tokens"] + new_tokens)
    return stock / (encoding / each + body * (ours["computed_tokens"] + new_tokens))


def line(row: dict) -> str:
    one, batched, ours = (row["ways"][way] for way in WAYS)
    bars = BARS[row["model"], row["each"]]
    holds = "yes" if all(ratio >= bar for ratio, bar in zip(row["ratios"], bars, strict=True)) else "no"
    wall, cpu = (f"{a:.1f}x / {b:.1f}x" for a, b in (row["ratios"], row["cpu_ratios"]))
    peaks = " / ".join(f"{(way['peak_bytes'] - way['resident_bytes']) / 2**20:.0f}" for way in (one, batched, ours))
    speeds = " | ".join(f"{1 / way['wall_seconds']:.1f}" for way in (one, batched, ours))
    counted = f"{row['operations_ratio']:.1f}x"
    case = f"{row['model']} | {row['each']} | {row['new_tokens']}"
    return f"| {case} | {speeds} | {counted} | {wall} | {cpu} | {bars[0]}x / {bars[1]}x | {holds} | {peaks} |"


HEAD = (
    "| model | questions a picture | tokens an answer | one by one, questions/s | batched | engine | by operations | engine over both "
    "| CPU time | bar | holds | peak MiB beyond the loaded model |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of each worker (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=NEW_TOKENS, help="tokens of every answer (default 4, and 16)")
    parser.add_argument("--each", type=int, choices=(30, 5, 1), help="only this many questions a picture")
    parser.add_argument("--no-context", action="store_true", help="leave out the growth with the context")
    parser.add_argument("--only-context", action="store_true", help="nothing but the growth with the context")
    parser.add_argument("--add", action="store_true", help="keep what stands in the result file and was not measured anew")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "engine", help="path of the results, without ending")
    options = parser.parse_args()
    rows, parameters, contexts = [], {}, {}
    torch.set_num_threads(options.threads)
    print(HEAD)
    with tempfile.TemporaryDirectory() as temporary:
        for model in options.model or MODELS:
            folder = Path(temporary) / model
            parameters[model] = build(model, folder)
            if not options.only_context:
                for new_tokens in options.new_tokens:
                    rows += compare(model, folder, parameters[model], options.rounds, options.threads, new_tokens, options.each)
            if not options.no_context:
                contexts[model] = decode_times(folder)
    command = "python benchmarks/engine.py " + " ".join(sys.argv[1:])
    facts = {
        "command": command.strip(), "threads": options.threads, "rounds": options.rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    for row in rows:
        row |= {"command": facts["command"], "rounds": options.rounds, "load": round(os.getloadavg()[1], 1)}
    if options.add and options.out.with_suffix(".json").is_file():
        old = json.loads(options.out.with_suffix(".json").read_text(encoding="utf-8"))
        measured = {(row["model"], row["each"], row["new_tokens"]) for row in rows}
        rows += [row for row in old["rows"] if (row["model"], row["each"], row["new_tokens"]) not in measured]
        rows.sort(key=lambda row: (MODELS.index(row["model"]), row["new_tokens"], -row["each"]))
        parameters, contexts = old["parameters"] | parameters, old["contexts"] | contexts
    text = report(facts, parameters, rows, contexts)
    write_whole(
        options.out.with_suffix(".json"), json.dumps({**facts, "parameters": parameters, "rows": rows, "contexts": contexts}, indent=1)
    )
    write_whole(options.out.with_suffix(".md"), text)
    print(text[text.find("## Decoding") :] if contexts else "")
    return 0


def report(facts: dict, parameters: dict, rows: list[dict], contexts: dict) -> str:
    lines = ["# The engine beside stock transformers", "", __doc__.split("\n\n")[-1].strip(), "", f"`{facts['command']}`", ""]
    lines += [", ".join(f"{name} {value}" for name, value in facts.items() if name != "command"), ""]
    for model, counts in parameters.items():
        lines.append(f"- {model}: " + ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items() if name in PARTS))
    lines += ["", HEAD, *(line(row) for row in rows), ""]
    runs = {f"- `{row['command']}`: {row['rounds']} rounds, load {row['load']}": None for row in rows}
    lines += list(runs)
    if contexts:
        lines += [
            "",
            "## Decoding, milliseconds a step",
            "",
            "CPU time of one step for all rows; the state is filled with random numbers. *The rest*: the step less the time within its",
            "attention layers. A model whose weights stay in the processor's cache (tiny's do) finds them there at short contexts and not",
            "behind the keys of long ones, so that the rest grows by a part of the cost of attention. *Without*: the same step with the",
            "attention layers left out.",
            "",
        ]
        lines += ["| model | rows | context | whole step | attention layers | the rest | without attention layers |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for model, table in contexts.items():
            for entry in table:
                whole, attention, without = entry["step_ms"], entry["attention_ms"], entry["without_ms"]
                share = f"{attention:.2f} ({attention / whole:.0%})"
                case = f"{model} | {entry['rows']} | {entry['context']}"
                lines.append(f"| {case} | {whole:.2f} | {share} | {whole - attention:.2f} | {without:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
