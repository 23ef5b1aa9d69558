"""One page about a run: tables, curves and pictures, as a single HTML file and as Markdown.

Training, evaluation, compression and the quickstart all write their results here, so that a number looks the same everywhere. The HTML
holds everything inside itself - no script, no font, no network - because such a page is mailed, archived and opened years later. What it
does not do: interaction, and any knowledge of what the numbers mean.

    report = Report("Quickstart", "python train_vlm/quickstart.py, 15 minutes")
    report.heading("Scores").table(["set", "score", "baseline"], [["VQAv2", Marked(78.4, "best"), 41.2]])
    report.curves({"align": [(1, 5.2), (2, 4.1)]}, "step", "loss")
    report.pictures([(image, ["How many cubes?", Marked("two", "good")])], scale=3)
    report.write("runs/quickstart")
"""

from .builder import Report
from .marks import MARKS, Marked

__all__ = ["MARKS", "Marked", "Report"]
