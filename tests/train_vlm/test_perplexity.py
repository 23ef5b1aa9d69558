"""Perplexity of plain text against the definition, computed one window at a time from full logits."""

import copy
import json
import math

import pytest
import torch

from train_vlm.perplexity import main, measure_perplexity, text_windows
from train_vlm.training_report import write_training_report

PROSE = "The boat is red. A dog sits near the table, and nobody sees it. " * 30


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (PROSE, "two words", "x", PROSE[:70])))
    return path


def reference(model, processor, documents: list[str], window: int) -> tuple[float, int]:
    """(sum of negative log-likelihoods, tokens): every token but a document's first, from at most window - 1 tokens before it."""
    total, count = 0.0, 0
    for document in documents:
        ids = processor.renderer.render_text(document).input_ids
        for start in range(0, len(ids) - 1, window - 1):
            row = torch.tensor(ids[start : start + window])[None]
            with torch.no_grad():
                logs = model(input_ids=row).logits.double().log_softmax(-1)
            total -= logs[0, :-1].gather(-1, row[0, 1:, None]).sum().item()
            count += row.shape[1] - 1
    return total, count


@pytest.mark.parametrize("window", [16, 50, 4096])
def test_packed_windows_give_the_perplexity_of_windows_one_by_one(exact_model, tiny_processor, text, window):
    """A token predicted twice at a border, a state that goes on into the next window, a mean of means: each moves the number."""
    total, count = reference(exact_model, tiny_processor, [PROSE, "two words", "x", PROSE[:70]], window)
    found = measure_perplexity(exact_model, text_windows(text, tiny_processor, window), tiny_processor, pack_tokens=200)
    assert (
        found["tokens"]
        == count
        == sum(len(tiny_processor.renderer.render_text(t).input_ids) - 1 for t in (PROSE, "two words", "x", PROSE[:70]))
    )
    assert found["loss"] == pytest.approx(total / count, rel=1e-6) and found["perplexity"] == pytest.approx(
        math.exp(total / count), rel=1e-5
    )


def test_looking_leaves_mode_weights_and_random_states_alone(tiny_model, tiny_processor, text):
    model = copy.deepcopy(tiny_model)
    model.train()
    model.vision_encoder.eval()
    state = torch.get_rng_state()
    measure_perplexity(model, text_windows(text, tiny_processor), tiny_processor)
    assert model.training and model.language_model.training and not model.vision_encoder.training
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())


def test_the_program_prints_the_number_and_names_what_is_wrong(tiny_folder, text, tmp_path, capsys):
    assert main(["--model", str(tiny_folder), "--text", str(text), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"])) and found["tokens"] > 100
    assert main(["--model", str(tiny_folder), "--text", str(tmp_path / "nowhere")]) == 2
    assert main(["--model", str(tmp_path / "nothing"), "--text", str(text)]) == 2
    assert main(["--model", str(tiny_folder), "--text", str(text), "--max-tokens", "1"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("perplexity: ") for line in errors)


def test_one_token_alone_has_no_perplexity(tiny_model, tiny_processor, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    windows = text_windows(tmp_path / "a.txt", tiny_processor)
    assert len(windows[0]["input_ids"]) == 1
    with pytest.raises(ValueError, match="single token"):
        measure_perplexity(tiny_model, windows, tiny_processor)


def write_run(folder, name: str, *, text_tokens: int, after: float):
    log = folder / f"{name}.log"
    log.mkdir()
    (log / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, "smooth_loss": 1.0}) + "\n")
    row = {"seen": 1, "tiles": 4, "left_out": {}}
    sources = [{"source": "scenes", "tokens": 900, **row}, {"source": "text", "tokens": text_tokens, **row, "tiles": 0}]
    summary = {"text_perplexity_before": 20.0, "text_perplexity": after, "ledger": {"sources": sources, "examples": {}, "stream": ""}}
    (log / "summary.json").write_text(json.dumps(summary))
    return log


def test_the_report_sets_runs_with_and_without_text_side_by_side(tmp_path):
    logs = [write_run(tmp_path, "with", text_tokens=100, after=21.5), write_run(tmp_path, "without", text_tokens=0, after=64.25)]
    page = write_training_report(logs[0], logs[1:])
    words = page.with_suffix(".md").read_text()
    assert "21.5" in words and "64.25" in words and "10.000" in words and "without" in words
