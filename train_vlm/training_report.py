"""The page at the end of a training run: what it learnt, what it read, what it cost. Written from the run's own files, so that it can be
made again for a run that was killed:    python -m train_vlm.training_report OUT.log [OTHER.log ...]
Other runs, such as one with a blend of text and one without, stand beside it in the table of perplexities.
"""

import json
import sys
from pathlib import Path

from vlm.report import Report

__all__ = ["main", "write_training_report"]


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _curves(lines: list[dict], keys: list[str], *, above_zero: bool = False) -> dict[str, list[tuple[float, float]]]:
    """The points of each key that has some. above_zero: what a logarithm can show; a step in which no sample was usable has a loss of 0."""
    curves = {key: [(line["step"], line[key]) for line in lines if line.get(key) is not None and (line[key] > 0 or not above_zero)]
              for key in keys}  # fmt: skip
    return {key: points for key, points in curves.items() if points}


def _keys(lines: list[dict], prefix: str) -> list[str]:
    return sorted({key for line in lines for key in line if key.startswith(prefix)})


def write_training_report(folder: Path, others: list[Path] = ()) -> Path:
    """`folder`: OUT.log, with log.jsonl and summary.json; `others`: of runs to compare with. Returns the path of report.html.

    Raises FileNotFoundError when the log is missing.
    """
    lines = _read_lines(folder / "log.jsonl")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8")) if (folder / "summary.json").is_file() else {}
    name = folder.name.removesuffix(".log")
    page = Report(f"Training of {name}", summary.get("command"))
    steps = [line for line in lines if "loss" in line]  # beside lines of events, and of a look at the held-out loss alone
    last = {key: value for line in lines for key, value in line.items()}
    peak = summary.get("peak", last.get("mfu_peak"))
    heldout = summary.get("heldout_loss", last.get("heldout_loss"))
    figures = [("steps", last.get("step")), ("loss, smoothed", last.get("smooth_loss")), ("held-out loss", heldout),
               ("minutes", summary["seconds"] / 60 if "seconds" in summary else None),
               ("MFU %", last.get("mfu_percent"), f"of {peak}" if peak else None),
               ("waiting for data %", summary.get("waiting_for_data_percent")), ("GB of memory", last.get("memory_gb")),
               ("packs over their limit", summary.get("long_packs") or None)]  # fmt: skip
    page.figures([figure for figure in figures if figure[1] is not None], decimals=2)
    if not steps:
        page.text("No step was logged: the run ended before its first line (run.log_every), so that there are no curves.")
    if len(steps) > 1:
        page.heading("Loss").text("Per supervised token; by source, the mean since the line before.")
        if losses := _curves(lines, ["loss", "heldout_loss"], above_zero=True):
            page.curves(losses, "step", "loss", smooth=9, log_y=True)
        by_source = _curves(lines, _keys(lines, "loss/") + _keys(lines, "heldout_loss/"), above_zero=True)
        if len(by_source) > 1:
            page.curves(by_source, "step", "loss", smooth=9, log_y=True)
        page.heading("Rates and gradient")
        page.curves(_curves(lines, _keys(lines, "lr/")), "step", "rate")
        if norms := _curves(lines, ["gradient_norm"], above_zero=True):
            page.curves(norms, "step", "norm of the gradient", log_y=True, smooth=9)
        page.heading("Speed").text(f"Real work, without padding. The MFU divides by {peak or 'the peak of the device'}.")
        page.curves(_curves(lines, ["mfu_percent", "waiting_percent"]), "step", "%", smooth=9)
        page.curves(_curves(lines, ["tokens_per_second"]), "step", "tokens/s", smooth=9)
    _ranks(page, lines, summary.get("dealt"))
    _language(page, [folder, *others])
    if "parts" in summary:
        page.heading("What trained").code(summary["parts"])
    if summary.get("fp8"):
        page.heading("FP8").table(["place", "weight", "shape", "state, with the guard's last figure"], summary["fp8"])
    if "ledger" in summary:
        _ledger(page.heading("What was read"), summary["ledger"])
    if "heldout" in summary:
        page.heading("Held-out samples").text(f"Read at step {summary['heldout_step']}, each once at most; not trained on.")
        _ledger(page, summary["heldout"])
        losses = {key.partition("/")[2]: value for key, value in summary.items() if key.startswith("heldout_loss/")}
        if losses:
            page.table(["source", "held-out loss"], [[name, loss] for name, loss in losses.items()], decimals=3)
    if "recipe" in summary:
        page.heading("Recipe").code(summary["recipe"])
    return page.write(folder)


def _ranks(page: Report, lines: list[dict], dealt: dict | None) -> None:
    """How evenly the work of a step was shared: as the indexes promised, as the packs turned out, and by the clock."""
    work, clock = ([line[key] for line in lines if key in line] for key in ("imbalance_work_percent", "imbalance_seconds_percent"))
    if not work or not dealt:
        return
    page.heading("Ranks").text(
        "How much more than the mean the slowest rank had to do in a step: the share of the others' time that is waiting. Predicted from "
        "the indexes before the first step; measured by operations counted in the packs, and by the seconds of forward passes."
    )
    rows = [["predicted, samples dealt in order", dealt["in_order_percent"]], ["predicted, dealt by cost", dealt["predicted_percent"]],
            ["measured, operations", sum(work) / len(work)], ["measured, seconds", sum(clock) / len(clock) if clock else None]]  # fmt: skip
    page.table(["imbalance", "%"], rows, caption=f"Longest pack expected: {dealt['longest_pack_tokens']:,} tokens.", decimals=2)


def _language(page: Report, folders: list[Path]) -> None:
    """Perplexity of plain text before and after, for each run that measured it, with the share of text in what it read."""
    rows = []
    for folder in folders:
        path = folder / "summary.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if found.get("text_perplexity") is not None:
            tokens = found["ledger"]["sources"]
            share = 100 * sum(row["tokens"] for row in tokens if not row["tiles"]) / max(1, sum(row["tokens"] for row in tokens))
            rows.append([folder.name.removesuffix(".log"), share, found["text_perplexity_before"], found["text_perplexity"]])
    if rows:
        page.heading("Language").text("Perplexity per token of a plain text, each token predicted once.")
        page.table(["run", "tokens from sources without pictures, %", "before", "after"], rows, decimals=3)


def _ledger(page: Report, ledger: dict) -> None:
    sources = ledger["sources"]
    columns = [key for key in sources[0] if key not in ("source", "left_out") and any(row[key] for row in sources)]
    page.table(
        ["source", *(key.replace("_", " ") for key in columns)], [[row["source"], *(row[key] for key in columns)] for row in sources]
    )
    rows = [[sources[int(key.partition(": ")[0])]["source"], key.partition(": ")[2], text]
            for key, texts in ledger["examples"].items() for text in texts]  # fmt: skip
    rows += [[row["source"], reason, f"{count:,} never read"] for row in sources for reason, count in row["left_out"].items()]
    if rows:
        page.table(["source", "skipped", "example"], rows)


def main(arguments: list[str] | None = None) -> int:
    folders = sys.argv[1:] if arguments is None else arguments
    if not folders:
        print("usage: python -m train_vlm.training_report OUT.log [OTHER.log ...]", file=sys.stderr)
        return 2
    try:
        print(write_training_report(Path(folders[0]), [Path(other) for other in folders[1:]]))
        return 0
    except (OSError, ValueError, KeyError) as error:
        print(f"training_report: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
