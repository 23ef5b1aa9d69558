"""Training with DeepSpeed on two CPU ranks equals a plain loop; the two programs end to end, and their errors as one line.

All DeepSpeed runs on two ranks share one pair of processes: see deepspeed_scenarios.py.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from train_vlm.launching import run_program
from train_vlm.progress import learning_rate_share
from train_vlm.shards import convert
from vlm.assemble import assemble
from vlm.checkpoint import load_model, save_model

ROOT = Path(__file__).resolve().parents[2]
SMALL_ENCODER = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2}
QUIET = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def launch(*command: str, timeout: int = 240) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    return subprocess.run(
        [sys.executable, *command],
        env=environment | QUIET | {"MASTER_PORT": free_port()},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model folder and a folder of eight samples, one of them broken on purpose after writing."""
    folder = tmp_path_factory.mktemp("trainer")
    model, processor = assemble("tiny", vision_settings=SMALL_ENCODER, seed=0)
    save_model(model, processor, folder / "model")
    (folder / "images").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 60, 3), dtype=np.uint8)).save(folder / "images" / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a red ball"}]
    samples = [{"id": str(number), "image": "a.png", "conversations": turns} for number in range(8)]
    convert(samples, folder / "images", processor, folder / "shards")
    (shard,) = (folder / "shards").glob("*.tar")
    entry = json.loads(shard.with_suffix(".index.jsonl").read_text().splitlines()[3])
    offset, size = entry["members"]["0.png"]
    content = bytearray(shard.read_bytes())
    content[offset : offset + size] = b"\x00" * size
    shard.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def seen(inputs, tmp_path_factory):
    """Results of all scenarios, and the folder in which they were written."""
    out = tmp_path_factory.mktemp("scenarios")
    script = str(Path(__file__).with_name("deepspeed_scenarios.py"))
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), script]
    process = launch(*command, str(inputs / "shards"), str(inputs / "model"), str(out))
    if process.returncode != 0:
        pytest.fail("\n".join(line for line in process.stderr.splitlines() if "rank0" in line)[-3000:], pytrace=False)
    return json.loads((out / "results.json").read_text()), out


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "micro2", "micro4_zero3", "checkpointing_zero3"])
def test_every_way_to_train_equals_the_plain_loop(seen, name):
    """Losses and weights after three steps, with a rank that has no picture in each of two of them.

    A mean of means instead of a sum over tokens, a gradient divided twice, or a part left out of the collectives moves them by far more.
    """
    results, _ = seen
    assert results[name]["losses"] == pytest.approx(results["plain"], abs=2e-4)
    assert results["plain"][0] - results["plain"][-1] > 0.1  # it learns, so the comparison means something
    assert results[name]["distance"] < 5e-4 and results[name]["names"]
    assert results[name]["tokens"] == results["zero0"]["tokens"]


@pytest.mark.parametrize("name", ["align_zero1", "align_zero3"])
def test_frozen_parts_stay_to_the_bit(seen, name):
    """Weight decay or a stray gradient on a frozen encoder would change a model that nobody meant to train."""
    results, _ = seen
    assert results[name]["moved"] == ["projector"]
    assert results[name]["losses"] == pytest.approx(results["plain_align"], abs=2e-4)
    assert results[name]["distance"] < 5e-4


def test_all_parts_move_when_all_train(seen):
    results, _ = seen
    assert results["zero3"]["moved"] == ["language_model", "projector", "vision_encoder"] and results["zero3"]["moved_share"] > 0.95


def test_bfloat16_is_near_float32(seen):
    results, _ = seen
    assert results["bfloat16"]["losses"] == pytest.approx(results["plain"], abs=0.05)


def test_a_rank_without_a_usable_sample_does_not_stop_the_others(seen):
    """Each rank must run the same collectives; elsewhere this hangs for half an hour."""
    results, _ = seen
    assert all(np.isfinite(results["nothing_on_rank_1"]["losses"])) and results["nothing_on_rank_1"]["losses"][0] > 1
    assert results["nothing_at_all"]["losses"] == [0.0] * 3 and results["nothing_at_all"]["tokens"] == [0] * 3


def test_a_run_under_zero3_leaves_a_whole_model_and_the_account_of_all_ranks(seen, inputs):
    """Sharded weights saved by one rank would be empty tensors; and half of the skipped samples would be missing from the summary."""
    _, out = seen
    model, _ = load_model(out / "model")
    before, _ = load_model(inputs / "model")
    assert all(a.shape == b.shape for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True))
    assert not torch.equal(model.projector.linear_1.weight, before.projector.linear_1.weight)
    summary = json.loads((out / "model.log" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["ledger"]["seen"] == {"0": 8} and summary["ledger"]["skipped"] == {"0: broken": 1}


@pytest.fixture
def recipe(inputs, tmp_path):
    def recipe(**changes):
        content = {
            "stage": "sft", "model": str(inputs / "model"), "out": str(tmp_path / "out"),
            "data": {"sources": [{"shards": str(inputs / "shards")}], "batch_samples": 4, "max_skipped_percent": 50},
            "parts": {"vision_encoder": None, "projector": 1e-3, "language_model": 1e-3}, "run": {"steps": 99, "log_every": 1},
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content | changes))
        return str(path)

    return recipe


def test_the_program_trains_logs_and_saves(recipe, tmp_path):
    """As a user starts it, reading in a worker process."""
    process = launch("train_vlm/sft.py", "--recipe", recipe(), "run.steps=3", "--local_rank=0", "data.workers=1")
    assert process.returncode == 0, process.stderr[-4000:]
    assert "Traceback" not in process.stderr and "Warning" not in process.stderr, process.stderr
    assert "frozen" in process.stdout and "3 steps in" in process.stdout
    log = [json.loads(line) for line in (tmp_path / "out.log" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3] and log[2]["loss"] < log[0]["loss"]
    assert {"loss", "lr/projector", "lr/language_model", "seconds", "supervised_tokens", "gradient_norm"} <= log[0].keys()
    assert list((tmp_path / "out.log" / "tensorboard").glob("events*"))
    assert json.loads((tmp_path / "out.log" / "summary.json").read_text())["steps"] == 3
    model, _ = load_model(tmp_path / "out")
    assert not model.training


def test_missing_shards_end_the_program_with_one_line(recipe, tmp_path):
    """Exit code 2, the folder's name, and no traceback."""
    process = launch("train_vlm/sft.py", "--recipe", recipe(), f"data.sources.0.shards={tmp_path / 'nowhere'}")
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert f"sft: no shards in {tmp_path / 'nowhere'}" in process.stderr


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("sft", ["run.stepz=3"], "sft: unknown key run.stepz; did you mean run.steps?"),
        ("align", [], "this program runs stage align (use train_vlm/sft.py)"),
        ("sft", ["run.zero_stage=7"], "expected 0, 1, 2 or 3"),
    ],
)
def test_a_wrong_recipe_ends_before_anything_is_loaded(recipe, capsys, stage, arguments, message):
    assert run_program(stage, "", ["--recipe", recipe(), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_recipe_is_named(capsys):
    assert run_program("sft", "", ["--recipe", "nowhere.yaml"]) == 2
    assert "no recipe at nowhere.yaml" in capsys.readouterr().err


def test_a_dry_run_prints_the_resolved_recipe_and_writes_nothing(recipe, tmp_path, capsys):
    """Overrides may stand on both sides of the flag."""
    assert run_program("sft", "", ["run.steps=7", "--recipe", recipe(), "--dry-run", "optimizer.clip=2"]) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["run"]["steps"] == 7 and resolved["optimizer"]["clip"] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_the_rate_rises_then_falls_to_its_share():
    shares = [learning_rate_share(step, 100, 0.1, 0.2) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == pytest.approx(1.0)
    assert shares[:10] == sorted(shares[:10]) and shares[9:] == sorted(shares[9:], reverse=True)
    assert shares[-1] == pytest.approx(0.2, abs=1e-3) and learning_rate_share(500, 100, 0.1, 0.2) == pytest.approx(0.2)
