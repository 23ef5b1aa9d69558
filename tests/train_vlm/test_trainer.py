"""Training with DeepSpeed on two CPU ranks equals a plain loop; the two programs end to end, and their errors as one line.

All DeepSpeed runs on two ranks share one pair of processes: see deepspeed_scenarios.py.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from planted_faults import plant

from train_vlm.autopsy import main as main_autopsy
from train_vlm.launching import run_program
from train_vlm.perplexity import measure_perplexity, text_windows
from train_vlm.progress import learning_rate_share
from train_vlm.shards import convert
from vlm.assemble import assemble
from vlm.checkpoint import load_model, save_model
from vlm.lora import load_adapter, merge_adapter

ROOT = Path(__file__).resolve().parents[2]
SMALL_ENCODER = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
QUIET = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def environment() -> dict:
    own = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    return own | QUIET | {"MASTER_PORT": free_port()}


def launch(*command: str, timeout: int = 240) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout)


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
    shards, longest = plant(folder / "faulty", processor, samples=240, each=12)
    (folder / "faulty" / "longest.txt").write_text(str(longest))
    (folder / "words.txt").write_text("a red ball and a blue box near the green table\n" * 30)
    return folder


STEPS = 40
pytestmark = pytest.mark.timeout(600)  # the first test waits for all runs


@pytest.fixture(scope="module")
def killed(inputs, tmp_path_factory):
    """A run as a user starts it, reading in a worker process; and the same one, killed without warning and started again.

    Returns its folder, with the models `whole` and `killed`, `killed.yaml`, and in `killed.left` the checkpoints at the kill.
    """
    folder = tmp_path_factory.mktemp("killed")
    content = {
        "stage": "sft", "model": str(inputs / "model"), "out": str(folder / "killed"),
        "data": {"sources": [{"shards": str(inputs / "shards")}], "batch_samples": 4, "max_skipped_percent": 50, "workers": 1},
        "parts": {"vision_encoder": None, "projector": {"rate": 1e-3, "warmup": 0.25}, "language_model": 1e-3},
        "run": {"steps": STEPS, "log_every": 1, "save_every_steps": 3, "save_every_minutes": None, "threads_per_rank": 1},
    }  # fmt: skip
    (folder / "killed.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "train_vlm/sft.py", "--recipe", str(folder / "killed.yaml"), "--local_rank=0"]
    log = folder / "killed.log" / "log.jsonl"
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not log.is_file() or log.read_bytes().count(b"\n") < 8):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    shutil.copytree(folder / "killed.checkpoints", folder / "killed.left")
    runs = {"killed": launch(*command[1:]), "whole": launch(*command[1:], f"out={folder / 'whole'}")}
    for run in runs.values():
        assert run.returncode == 0, run.stderr[-4000:]
    return folder, runs


@pytest.fixture(scope="module")
def seen(inputs, killed, tmp_path_factory):
    """Results of all scenarios, and the folder in which they were written."""
    out = tmp_path_factory.mktemp("scenarios")
    script = str(Path(__file__).with_name("deepspeed_scenarios.py"))
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), script]
    process = launch(*command, str(inputs / "shards"), str(inputs / "model"), str(out), str(killed[0] / "killed"), timeout=560)
    if process.returncode != 0:
        pytest.fail("\n".join(line for line in process.stderr.splitlines() if "rank0" in line)[-3000:], pytrace=False)
    return json.loads((out / "results.json").read_text()), out


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "micro2", "micro4_zero3", "chunks_zero3", "checkpointing_zero3"])
def test_every_way_to_train_equals_the_plain_loop(seen, name):
    """Losses and weights after three steps, with a rank that has no picture in each of two of them.

    A mean of means instead of a sum over tokens, a gradient divided twice, or a part left out of the collectives moves them by far more.
    """
    results, _ = seen
    assert results[name]["losses"] == pytest.approx(results["plain"], abs=2e-4)
    assert results["plain"][0] - results["plain"][-1] > 0.1  # it learns, so the comparison means something
    assert results[name]["distance"] < 5e-4 and results[name]["names"]
    assert results[name]["tokens"] == results["zero0"]["tokens"]


@pytest.mark.parametrize("name", ["zero0_micro1", "zero1_micro1", "zero2_micro1", "zero3_micro1", "zero0_micro2", "zero2_micro2"])
def test_an_encoder_that_normalises_by_its_batch_trains_as_in_the_plain_loop(seen, name):
    """BatchNorm over the tiles of one rank is another model on two; so it is over two micro-batches, which the plain loop then has, too.
    In step three losses of the two loops differ by 3e-4: what must be equal is not equal anyway."""
    results = seen[0]["batch_norm"]
    plain, other = (results[f"plain{micro}"] for micro in (name[-1], {"1": "2", "2": "1"}[name[-1]]))
    assert results[name]["losses"] == pytest.approx(plain, abs=1e-5) and results[name]["losses"] != pytest.approx(other, abs=1e-4)
    assert results[name]["distance"] < 5e-4 and results[name]["names"]
    assert results[name]["norms"] == pytest.approx(results[f"zero0_micro{name[-1]}"]["norms"], rel=1e-4)


def test_a_recipe_s_ranks_share_their_statistics(seen):
    """Ranks that normalise by tiles of their own hold running statistics of their own."""
    first, second = seen[0]["batch_norm"]["running"]
    assert len(first) > 20 and first == second


def test_a_recipe_s_micro_batches_have_the_same_samples_whatever_the_ranks(seen):
    """BatchNorm normalises by a micro-batch of all ranks: samples are dealt to ranks by cost, to micro-batches as they come."""
    held, in_order = seen[0]["batch_norm"]["held"], seen[0]["batch_norm"]["in_order"]
    together = [sorted(first + second) for first, second in zip(*held, strict=True)]
    assert together == [sorted(in_order[start : start + 4]) for start in range(0, 16, 4)]
    assert held[0] != [in_order[start : start + 2] for start in range(0, 16, 4)]  # by cost: two by two as they come would be another way


def test_under_zero_3_no_rank_and_no_device_holds_the_whole_model(seen):
    """DeepSpeed's engine would move it there before it is shared out: 94 GB of 47 billion parameters. Nor does a rank copy it from its
    files, whose pages all ranks of a machine share."""
    (moved_2, mapped_2), (moved_3, mapped_3) = (seen[0]["moved_whole"][stage] for stage in "23")
    assert moved_3 == 0 < moved_2 and mapped_3 and not mapped_2


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


def test_the_norm_of_the_gradient_is_the_same_on_every_stage(seen):
    """Without ZeRO it is ours, with it DeepSpeed's; clipped norms, or norms of one rank's part, would differ."""
    results, _ = seen
    for name in ("zero1", "zero2", "zero3", "micro4_zero3"):
        assert results[name]["norms"] == pytest.approx(results["zero0"]["norms"], rel=1e-3)
    assert results["zero0"]["norms"][0] > 1.0  # above the clip


@pytest.mark.parametrize("name", ["resumed_muon_zero0", "resumed_zero3", "resumed_bfloat16_zero1", "resumed_bfloat16_zero3"])
def test_a_run_stopped_in_a_step_goes_on_to_the_last_bit(seen, name):
    """Two ranks, two sources, two epochs. Momentum left out, a random state, a position off by one: each changes a loss."""
    results, _ = seen
    result = results[name]
    whole, cut = result["logs"]
    assert result["left"] == ["step-00000002", "step-00000004"] and result["weights_equal"]
    for key in ("step", "loss", "smooth_loss", "gradient_norm", "supervised_tokens", "lr/projector", "stream"):
        assert [line[key] for line in whole] == [line[key] for line in cut]
    assert "heldout_loss" in whole[2] and whole[2]["heldout_loss"] > 1 and "heldout_loss" not in cut[2]
    assert {"loss/shards", "loss/shards-2"} <= {key for line in whole for key in line}


@pytest.mark.parametrize("name", ["offload_zero2", "offload_zero3"])
def test_offloading_changes_where_things_lie_and_nothing_else(seen, name):
    """One key of the recipe; text-only ranks in two of three steps."""
    results, _ = seen
    assert results[name]["losses"] == pytest.approx(results["plain"], abs=2e-4)
    assert results[name]["distance"] < 5e-4 and results[name]["names"] and results[name]["moved_share"] > 0.95


@pytest.mark.parametrize("name", ["lora_zero1", "lora_zero3"])
def test_adapters_train_as_in_the_plain_loop(seen, name):
    """With ranks that have no picture; the decoder's own weights stay as they were, to the bit."""
    results, _ = seen
    assert results["lora_frozen"] and results["lora_plain"][0] - results["lora_plain"][-1] > 0.05
    assert results[name]["losses"] == pytest.approx(results["lora_plain"], abs=2e-4)
    assert results[name]["distance"] < 5e-4 and results[name]["moved"] == ["language_model", "projector", "vision_encoder"]


def test_a_lora_run_leaves_a_plain_model_and_its_adapters(seen, inputs):
    """Stopped and gone on with to the last bit; base and adapters merged by peft's own arithmetic are the model that was saved."""
    results, _ = seen
    result = results["resumed_lora"]
    whole, cut = result["logs"]
    assert result["weights_equal"] and [line["loss"] for line in whole] == [line["loss"] for line in cut]
    out = Path(result["out"])
    saved, _ = load_model(out)
    base, _ = load_model(inputs / "model")
    merged = merge_adapter(load_adapter(base, out.with_name("cut.adapter")))
    untouched = load_model(inputs / "model")[0].language_model.state_dict()
    differences = []
    for name, tensor in saved.language_model.state_dict().items():
        torch.testing.assert_close(tensor, merged.language_model.state_dict()[name], rtol=1e-5, atol=1e-6)
        differences.append(not torch.equal(tensor, untouched[name]))
    assert 0 < sum(differences) < len(differences)  # matrices moved, norms and the scan's own parameters did not
    assert not torch.equal(saved.projector.linear_1.weight, load_model(inputs / "model")[0].projector.linear_1.weight)
    parts = json.loads((out.with_name("cut.log") / "summary.json").read_text())["parts"]
    assert "LoRA of rank 4 reaches" in parts and "100.0%" in parts


def test_too_many_faults_stop_the_run_with_their_reasons(seen):
    """A twentieth of every kind planted, a twentieth of all accepted: stopped after 200 samples, each kind with an example."""
    results, out = seen
    words = results["stopped_by_the_ledger"]
    assert "of 200 samples are unusable, at most 5.0 % are accepted" in words
    for reason in ("broken", "image missing", "too long", "nothing supervised"):
        assert f"of shards {reason}, e.g. " in words
    assert not (out / "faulty").exists()


def test_ranks_are_told_how_even_their_work_is(seen):
    """Predicted before the first step, counted and timed in every step; under ZeRO-3, where ranks wait inside a pass, not timed."""
    results, _ = seen
    line = results["resumed_muon_zero0"]["logs"][0][2]
    assert 0 <= line["imbalance_work_percent"] <= 100 and 0 < line["imbalance_seconds_percent"] <= 100
    assert "imbalance_seconds_percent" not in results["resumed_zero3"]["logs"][0][2]
    folder = Path(results["resumed_muon_zero0"]["out"]).with_name("cut.log")
    dealt = json.loads((folder / "summary.json").read_text())["dealt"]
    assert dealt["predicted_percent"] <= dealt["in_order_percent"] and dealt["longest_pack_tokens"] > 0
    assert "predicted, dealt by cost" in (folder / "report.md").read_text()


def test_a_run_in_minutes_has_its_clock_back_after_a_stop(seen):
    """Six seconds in steps of half a second, stopped in step 4 and gone on with from step 2: the day between counts for nothing, and every
    rate is that of the run's own time."""
    results, _ = seen
    log, summary = results["timed"]["log"], results["timed"]["summary"]
    assert (summary["starts"], summary["steps"], summary["seconds"]) == (2, 12, 6.0)
    assert [line["step"] for line in log] == [*range(1, 13)]
    expected = [1e-3 * learning_rate_share(0.5 * step, 6.0, 0.03, 0.1) for step in range(12)]
    assert [line["lr/projector"] for line in log] == pytest.approx(expected)


def test_the_last_step_of_a_run_in_minutes_is_logged(seen):
    """Nobody knows its number beforehand: with a line every 4 steps the last two of six were in no log."""
    results, _ = seen
    log = results["timed"]["rare_log"]
    assert results["timed"]["rare_summary"]["steps"] == 6 and [line["step"] for line in log if "gradient_norm" in line] == [4, 6]
    assert len(log) == 2  # the held-out loss stands in the same line


def test_the_heldout_loss_at_the_end_is_told_wherever_other_losses_are(seen):
    """With `heldout_every: null` it stood in summary.json alone. Five of eight samples, read once; the broken one is counted if met."""
    results, _ = seen
    line, summary = results["timed"]["rare_log"][-1], results["timed"]["rare_summary"]
    assert "heldout_loss" not in results["timed"]["rare_log"][0] and summary["heldout_step"] == 6
    assert line["heldout_loss"] == summary["heldout_loss"] > 1 and line["heldout_loss/shards"] == line["heldout_loss"]
    assert line["heldout_samples"] + line["heldout_skipped"] == summary["heldout"]["sources"][0]["seen"] == 5
    assert {"heldout_loss", "heldout_loss/shards", "heldout_skipped"} <= set(results["timed"]["rare_scalars"])
    report = results["timed"]["rare_report"]
    assert "held-out loss" in report and f"{line['heldout_loss']:.2f}" in report and "Held-out samples" in report


def test_a_run_without_time_for_a_step_ends_with_a_report_that_says_so(seen):
    results, _ = seen
    found = results["timed"]
    assert found["none_summary"]["steps"] == 0 and not any("loss" in line for line in found["none_log"])
    assert "No step was logged" in found["none_report"] and "No step was logged" not in found["rare_report"]


def test_the_decay_of_the_state_and_norms_stay_in_float32_while_all_else_trains_in_bfloat16(seen, inputs):
    """DeepSpeed casts whatever it is given: a D of 1.003 would be 1.0 again after every step. Here they move by less than one bfloat16, and
    alike with float32 parameters (ZeRO-1) and with float32 rests beside bfloat16 ones (ZeRO-3)."""
    results, _ = seen
    folders = [results["resumed_bfloat16_zero1"]["out"], results["resumed_bfloat16_zero3"]["out"], inputs / "model"]
    first, third, before = (dict(load_model(folder)[0].named_parameters()) for folder in folders)
    mixer = "language_model.model.layers.0.mixer."
    norms = ("language_model.model.layers.0.norm.weight", f"{mixer}norm.weight", "language_model.model.norm_f.weight")
    for full in (*(f"{mixer}{name}" for name in ("A_log", "D", "dt_bias")), *norms):
        for after in (first, third):
            assert after[full].dtype == torch.float32
            moved = (after[full] - before[full]).abs().max().item()
            assert 0 < moved and not torch.equal(after[full], after[full].bfloat16().float())
        # Over the whole tensor: AdamW divides a gradient by its own size, so a channel whose first ones are rounding may go either way.
        assert (first[full] - third[full]).norm() < 0.1 * (first[full] - before[full]).norm()
    for after in (first, third):
        assert after["language_model.model.layers.0.mixer.in_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["resumed_muon_zero0", "resumed_zero3"])
def test_perplexity_before_and_after_is_that_of_the_two_models(seen, inputs, name):
    """Sharded over two ranks or not, and kept through a stop: measured again on the folders the run started from and left."""
    results, _ = seen
    out = Path(results[name]["out"])
    summaries = [json.loads((out.with_name(f"{which}.log") / "summary.json").read_text()) for which in ("whole", "cut")]
    assert summaries[0]["text_perplexity"] == pytest.approx(summaries[1]["text_perplexity"], rel=1e-6)
    for key, folder in (("text_perplexity_before", inputs / "model"), ("text_perplexity", out)):
        model, processor = load_model(folder)
        found = measure_perplexity(model, text_windows(inputs / "words.txt", processor), processor)
        assert found["tokens"] > 300 and summaries[1][key] == pytest.approx(found["perplexity"], rel=1e-4)
    assert summaries[1]["text_perplexity"] != summaries[1]["text_perplexity_before"]
    assert "before" in (out.with_name("cut.log") / "report.md").read_text()


def test_a_run_leaves_a_whole_model_and_the_account_of_all_ranks(seen, inputs):
    """Sharded weights saved by one rank would be empty tensors; and half of the skipped samples would be missing from the account."""
    results, _ = seen
    out = Path(results["resumed_zero3"]["out"])
    model, _ = load_model(out)
    before, _ = load_model(inputs / "model")
    assert all(a.shape == b.shape for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True))
    assert not torch.equal(model.projector.linear_1.weight, before.projector.linear_1.weight)
    summary = json.loads((out.with_name("cut.log") / "summary.json").read_text())
    rows = summary["ledger"]["sources"]
    assert (summary["steps"], summary["starts"]) == (6, 2) and [row["seen"] for row in rows] == [16, 8]
    assert [row["broken"] for row in rows] == [2, 1] and summary["heldout_loss"] > 0
    assert (out.with_name("cut.log") / "report.html").is_file()


def test_a_killed_run_goes_on_to_the_last_bit(killed):
    """kill -9 while it trains and reads in another process; the same command again ends with the same bytes."""
    folder, runs = killed
    whole, again = ([json.loads(line) for line in (folder / f"{name}.log" / "log.jsonl").read_text().splitlines()] for name in runs)
    for key in ("step", "loss", "gradient_norm", "lr/projector", "stream"):
        assert [line[key] for line in whole] == [line[key] for line in again]
    assert len(whole) == STEPS and "going on from" in runs["killed"].stdout and "going on from" not in runs["whole"].stdout
    assert (folder / "whole" / "model.safetensors").read_bytes() == (folder / "killed" / "model.safetensors").read_bytes()
    ledgers = [json.loads((folder / name / "training.json").read_text())["ledger"] for name in runs]
    assert ledgers[0] == ledgers[1] and ledgers[0]["sources"][0]["seen"] == 4 * STEPS and ledgers[0]["sources"][0]["broken"] == STEPS // 2


def test_another_number_of_ranks_reads_the_same_samples(seen, killed):
    """One process was killed, two go on: the hash over all steps' samples is that of the whole run, the losses are its to float32's noise.

    DeepSpeed has to lay out the optimizer anew for it, and loses weight decay and step counters on the way (checkpointing.py).
    """
    _, out = seen
    lines, whole = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (out / "on_two.log" / "log.jsonl", killed[0] / "whole.log" / "log.jsonl")
    )
    first = lines[0]["step"]
    assert lines[-1]["stream"] == whole[-1]["stream"] and 3 < first < STEPS and len(lines) == STEPS - first + 1
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in whole[first - 1 :]], rel=1e-3)


def test_a_bad_loss_stops_the_run_with_its_cause(seen):
    """One infinite weight in the second Mamba layer, ZeRO-3: the layer is named on both ranks, and every sample that was read (of the
    step's four, two are the broken one, which both sources have)."""
    results, out = seen
    found = results["bad_loss"]
    assert "the loss is nan" in found["message"] and "at step 1" in found["message"]
    assert "language_model.model.layers.3.mixer.in_proj" in found["message"] and "-m train_vlm.autopsy" in found["message"]
    ranks = found["autopsy"]["ranks"]
    samples = [sample for entries in ranks for entry in entries for sample in entry["samples"]]
    assert len(ranks) == 2 and len(samples) == 2 and all(sample["tiles"] > 0 and sample["loss"] == "nan" for sample in samples)
    assert {entry["first_forward"]["module"] for entries in ranks for entry in entries} == {"language_model.model.layers.3.mixer.in_proj"}
    assert all(len(ranges["dt"]) == 2 and ranges["A"][1] < 0 for ranges in ranks[0][0]["scan"].values())
    assert not (out / "bad_loss").exists()


@pytest.mark.parametrize("stage", [0, 2])
def test_a_bad_gradient_stops_the_run_before_it_reaches_the_weights(seen, stage, capsys):
    """The projector's gradient turns infinite in step 3. The weights in the autopsy are those after step 2, and the replay is finite
    where nothing is wrong with the model itself."""
    results, _ = seen
    found = results[f"bad_gradient{stage}"]
    assert "at step 3" in found["message"] and "the norm of the gradient" in found["message"]
    assert "projector.linear_2" in found["autopsy"]["first_bad"] and "gradient of its output" in found["autopsy"]["first_bad"]
    model, _ = load_model(Path(found["folder"]) / "model")
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert main_autopsy([found["folder"], "--rank", "1"]) == 0
    assert "everything is finite here" in capsys.readouterr().out


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


def test_the_program_trains_logs_and_saves(killed):
    """As a user starts it."""
    folder, runs = killed
    process = runs["whole"]
    assert "Traceback" not in process.stderr and "Warning" not in process.stderr, process.stderr
    assert "frozen" in process.stdout and f"{STEPS} steps in" in process.stdout and "broken: " in process.stdout
    log = [json.loads(line) for line in (folder / "whole.log" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [*range(1, STEPS + 1)] and log[2]["loss"] < log[0]["loss"]
    expected = {"loss", "loss/shards", "lr/projector", "lr/language_model", "seconds", "supervised_tokens", "gradient_norm",
                "tokens_per_second", "tiles_per_second", "mfu_percent", "waiting_percent", "memory_gb"}  # fmt: skip
    assert expected <= log[0].keys() and all(0 < line["mfu_percent"] < 100 for line in log)
    assert list((folder / "whole.log" / "tensorboard").glob("events*"))
    assert json.loads((folder / "whole.log" / "summary.json").read_text())["steps"] == STEPS
    model, _ = load_model(folder / "whole")
    assert not model.training


def test_each_group_follows_its_own_warm_up_in_one_calendar(killed):
    """A rate is logged as the optimizer had it: the projector's rises over a quarter of the steps, the decoder's in the
    optimizer's 3 %; both also when the run went on after a kill."""
    for name in ("whole", "killed"):
        log = [json.loads(line) for line in (killed[0] / f"{name}.log" / "log.jsonl").read_text().splitlines()]
        for part, warmup in (("projector", 0.25), ("language_model", 0.03)):
            expected = [1e-3 * learning_rate_share(step, STEPS, warmup, 0.1) for step in range(STEPS)]
            assert [line[f"lr/{part}"] for line in log] == pytest.approx(expected)
        rates = [line["lr/projector"] for line in log]
        assert rates[0] == pytest.approx(1e-4) and rates.index(max(rates)) in (9, 10)


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


def test_a_port_in_use_ends_the_program_with_one_line(recipe, monkeypatch):
    """Two runs on one machine meet at the same port; DeepSpeed's own page of a traceback says so in its last line."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        monkeypatch.setattr(sys.modules[__name__], "free_port", lambda: os.environ["MASTER_PORT"])
        process = launch("train_vlm/sft.py", "--recipe", recipe())
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "sft: the ranks cannot meet: " in process.stderr and "--master_port N gives another" in process.stderr


def test_a_missing_recipe_is_named(capsys):
    assert run_program("sft", "", ["--recipe", "nowhere.yaml"]) == 2
    assert "no recipe at nowhere.yaml" in capsys.readouterr().err


def test_a_dry_run_prints_the_resolved_recipe_and_writes_nothing(recipe, tmp_path, capsys):
    """Overrides may stand on both sides of the flag."""
    assert run_program("sft", "", ["run.steps=7", "--recipe", recipe(), "--dry-run", "optimizer.clip=2"]) == 0
    printed, _, plan = capsys.readouterr().out.partition("\n\n")
    resolved = yaml.safe_load(printed)
    assert resolved["run"]["steps"] == 7 and resolved["optimizer"]["clip"] == 2.0
    assert "8 samples" in plan and "ZeRO 3, all offloaded" in plan
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_the_rate_rises_then_falls_to_its_share():
    shares = [learning_rate_share(step, 100, 0.1, 0.2) for step in range(100)]
    assert shares[0] == pytest.approx(0.1) and shares[9] == pytest.approx(1.0)
    assert shares[:10] == sorted(shares[:10]) and shares[9:] == sorted(shares[9:], reverse=True)
    assert shares[-1] == pytest.approx(0.2, abs=1e-3) and learning_rate_share(500, 100, 0.1, 0.2) == pytest.approx(0.2)
