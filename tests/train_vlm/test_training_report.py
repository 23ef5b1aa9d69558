"""The page at the end of a run, from the files that a run leaves: also from one that had no time to log a step."""

import json

import pytest

from train_vlm.training_report import main, write_training_report


@pytest.fixture
def report(tmp_path):
    def report(lines: list[dict], summary: dict | None = None) -> str:
        folder = tmp_path / "run.log"
        folder.mkdir(exist_ok=True)
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if summary is not None:
            (folder / "summary.json").write_text(json.dumps(summary))
        return write_training_report(folder).with_suffix(".md").read_text()

    return report


def step(number: int, **more) -> dict:
    return {"step": number, "loss": 2.0, "smooth_loss": 2.5, "gradient_norm": 1.0, "lr/projector": 1e-3, "mfu_percent": 31.5,
            "waiting_percent": 1.0, "tokens_per_second": 9.0, "memory_gb": 1.0, **more}  # fmt: skip


EVENT = {"step": 1, "event": "fp8_measured", "text": "fp8 at step 1"}


@pytest.mark.parametrize("lines", [[], [EVENT, {**EVENT, "step": 2}], [{"step": 0, "heldout_loss": 2.5, "heldout_samples": 3}]])
def test_a_log_without_a_step_gives_a_page_that_says_so(report, tmp_path, lines):
    """Two lines of the FP8 guard and none of a step: curves without a point are an error, and the run ended with it."""
    assert "No step was logged" in report(lines)
    assert main([str(tmp_path / "run.log")]) == 0


def test_a_run_that_learnt_nothing_has_a_page(report):
    """Of losses and gradients that are all 0 a logarithm shows no point, and the run ended with that error, not as finished."""
    words = report([step(number, loss=0.0, smooth_loss=None, gradient_norm=0.0) for number in (1, 2)])
    assert "No step was logged" not in words and "## Rates" in words


def test_lines_of_events_hide_no_figure(report):
    """The last line may be one of the FP8 guard: steps and losses are those of the last line that has them."""
    words = report([step(1), step(2, smooth_loss=2.25), EVENT | {"step": 2}])
    assert "No step was logged" not in words and "2.25" in words and "31.5" in words


ROW = {"source": "val", "seen": 95, "broken": 3, "too long": 0, "tokens": 900, "left_out": {}}


def test_the_heldout_loss_stands_in_the_page_with_what_was_skipped(report):
    """Measured at the end only, it is in no line but perhaps the last, and what was dropped was counted nowhere."""
    account = {"sources": [ROW, {**ROW, "source": "val-2", "broken": 7}], "examples": {"1: broken": ["x: no image"]}, "stream": ""}
    found = {"heldout_loss": 1.2345, "heldout_loss/val": 1.125, "heldout_loss/val-2": 1.375, "heldout": account, "heldout_step": 2}
    words = report([step(1), step(2)], found)
    assert "1.23" in words and "Read at step 2" in words and "1.125" in words and "1.375" in words
    assert "val-2" in words and "broken" in words and "x: no image" in words


def test_the_mfu_stands_beside_the_peak_it_divides_by(report):
    """Also in the page of a run with FP8 layers that was killed, whose log alone can tell."""
    assert "989 TFLOP/s" in report([step(1), step(2)], {"peak": "989 TFLOP/s a rank (NVIDIA H200, bfloat16)"}).split("## Loss")[0]


def test_a_killed_run_in_fp8_tells_its_peak_from_the_log(report):
    assert "not that of FP8" in report([step(1, mfu_peak="989 TFLOP/s a rank (bfloat16; not that of FP8)")]).split("## Rates")[0]
