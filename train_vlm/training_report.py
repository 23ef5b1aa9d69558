"""The page at the end of a training run: what it learnt, what it read, what it cost. Written from the run's own files, so that it can be
made again for a run that was killed:    python -m train_vlm.training_report OUT.log
"""

import json
import sys
from pathlib import Path

from vlm.report import Report

__all__ = ["main", "write_training_report"]


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _curves(lines: list[dict], keys: list[str]) -> dict[str, list[tuple[float, float]]]:
    curves = {key: [(line["step"], line[key]) for line in lines if line.get(key) is not None] for key in keys}
    return {key: points for key, points in curves.items() if points}


def _keys(lines: list[dict], prefix: str) -> list[str]:
    return sorted({key for line in lines for key in line if key.startswith(prefix)})


def write_training_report(folder: Path) -> Path:
    """`folder`: OUT.log, with log.jsonl and summary.json. Returns the path of report.html.

    Raises FileNotFoundError when the log is missing.
    """
    lines = _read_lines(folder / "log.jsonl")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8")) if (folder / "summary.json").is_file() else {}
    name = folder.name.removesuffix(".log")
    page = Report(f"Training of {name}", summary.get("command"))
    last = lines[-1] if lines else {}
    figures = [("steps", last.get("step")), ("loss, smoothed", last.get("smooth_loss")), ("held-out loss", last.get("heldout_loss")),
               ("minutes", summary["seconds"] / 60 if "seconds" in summary else None), ("MFU %", last.get("mfu_percent")),
               ("waiting for data %", summary.get("waiting_for_data_percent")), ("GB of memory", last.get("memory_gb"))]  # fmt: skip
    page.figures([(label, value) for label, value in figures if value is not None], decimals=2)
    if len(lines) > 1:
        page.heading("Loss").text("Per supervised token; by source, the mean since the line before.")
        page.curves(_curves(lines, ["loss", "heldout_loss"]), "step", "loss", smooth=9, log_y=True)
        by_source = _curves(lines, _keys(lines, "loss/") + _keys(lines, "heldout_loss/"))
        if len(by_source) > 1:
            page.curves(by_source, "step", "loss", smooth=9, log_y=True)
        page.heading("Rates and gradient")
        page.curves(_curves(lines, _keys(lines, "lr/")), "step", "rate")
        page.curves(_curves(lines, ["gradient_norm"]), "step", "norm of the gradient", log_y=True, smooth=9)
        page.heading("Speed").text(f"Real work, without padding. The MFU divides by {summary.get('peak', 'the peak of the device')}.")
        page.curves(_curves(lines, ["mfu_percent", "waiting_percent"]), "step", "%", smooth=9)
        page.curves(_curves(lines, ["tokens_per_second"]), "step", "tokens/s", smooth=9)
    if "parts" in summary:
        page.heading("What trained").code(summary["parts"])
    if "ledger" in summary:
        _ledger(page, summary["ledger"])
    if "recipe" in summary:
        page.heading("Recipe").code(summary["recipe"])
    return page.write(folder)


def _ledger(page: Report, ledger: dict) -> None:
    page.heading("What was read")
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
    if len(folders) != 1:
        print("usage: python -m train_vlm.training_report OUT.log", file=sys.stderr)
        return 2
    try:
        print(write_training_report(Path(folders[0])))
        return 0
    except (OSError, ValueError, KeyError) as error:
        print(f"training_report: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
