"""The guard finds layers that lose too much in FP8, puts them back, and touches nothing else; whole runs under ZeRO, with a kill."""

import copy
import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.models.nemotron_h import NemotronHForCausalLM

import train_vlm.fp8_guard as guards
from train_vlm.fp8_guard import Fp8Guard, noise_shares, start_fp8
from train_vlm.fp8_section import Fp8
from train_vlm.recipe import RecipeError, load_recipe
from train_vlm.shards import convert
from vlm.assemble import assemble
from vlm.checkpoint import load_model, save_model
from vlm.decoder import Layout, preset_config, run_layers, take_over_mixers
from vlm.fp8 import convert_to_fp8

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(600)  # one test waits for all runs
BAD, BEFORE_IT = "model.layers.2.mixer.down_proj", "model.layers.2.mixer.up_proj"


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """No process group in this process; the runs below have two ranks."""
    monkeypatch.setattr(guards, "sum_over_ranks", lambda tensor, device: tensor)


def make_decoder(spoil=None) -> NemotronHForCausalLM:
    torch.manual_seed(0)
    decoder = NemotronHForCausalLM(preset_config("tiny", mamba_num_heads=16, mamba_head_dim=16))
    take_over_mixers(decoder)
    if spoil is not None:
        with torch.no_grad():
            spoil(dict(decoder.named_parameters()))
    return decoder


def one_step(decoder, scale=1.0):
    """Forward and backward passes of two packed samples of 33 positions in all; the loss."""
    torch.manual_seed(1)
    embeddings = (torch.randn(1, 33, decoder.config.hidden_size) * scale).requires_grad_()
    loss = run_layers(decoder, embeddings, Layout.packed((20, 13))).square().mean()
    loss.backward()
    return loss.item()


def guarded(decoder, **settings) -> Fp8Guard:
    settings = Fp8(enabled=True, skip_first=0, skip_last=0, **settings)
    return Fp8Guard(convert_to_fp8(decoder, skip_first=settings.skip_first, skip_last=settings.skip_last), settings)


def measure(guard, decoder, step=1) -> list[dict]:
    guard.begin(step)
    one_step(decoder)
    return guard.end(step, torch.device("cpu"))


def test_shares_count_lost_rows_and_not_how_large_the_others_are():
    """Nine of ten rows are rounded to zero, the tenth is large and nearly right: the norm of the error says 40 dB."""
    reference = torch.ones(10, 4)
    reference[0] = 1000.0
    found = torch.zeros(10, 4)
    found[0] = 1010.0
    share, count = noise_shares(reference, found, 1)
    assert float(share / count) == pytest.approx((9 + 1e-4) / 10) and count == 10
    assert 20 * math.log10(reference.norm() / (reference - found).norm()) > 38


def test_shares_leave_out_what_has_no_signal_and_count_what_is_not_finite():
    reference, found = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[5.0, float("nan"), 2.0]])
    assert [float(value) for value in noise_shares(reference, found, 0)] == [1.0, 2.0]


def test_sound_layers_stay_and_their_figures_are_those_of_fp8():
    """E4M3 has 3 bits of mantissa, E5M2 2: about 29 and 25 dB for two rounded factors; every product of every layer is measured."""
    decoder = make_decoder()
    guard = guarded(decoder)
    (event,) = measure(guard, decoder)
    assert event["event"] == "fp8_measured" and len(event["db"]) == 16 and guard.put_back == []
    for figures in event["db"].values():
        assert 24 < figures["output"] < 33 and all(18 < value < 30 for value in list(figures.values())[1:])
    assert event["worst_db"] == min(value for figures in event["db"].values() for value in figures.values())
    json.dumps(event)


def spoil_weight(parameters):
    parameters[f"{BAD}.weight"][3, 4] = 1e5


def spoil_column(parameters):
    """The weights behind a neuron that is never active are a million times as large: to no effect, but for the scale, at which all others
    are rounded to zero."""
    parameters[f"{BEFORE_IT}.weight"][5] = 0.0
    parameters[f"{BAD}.weight"][:, 5] *= 1e6


@pytest.mark.parametrize("spoil", [spoil_weight, spoil_column])
def test_a_planted_bad_layer_is_put_back(spoil):
    """Afterwards it computes what the plain layer computes, and the next measurement no longer knows it."""
    decoder = make_decoder(spoil)
    plain = copy.deepcopy(decoder).model.layers[2].mixer.down_proj
    guard = guarded(decoder)
    events = measure(guard, decoder)
    told = {event["layer"]: event for event in events if event["event"] == "fp8_put_back"}
    assert BAD in told and told[BAD]["db"] < 10 and f"{BAD} goes back to float32" in told[BAD]["text"]
    assert guard.put_back == list(told) and "model.layers.0.mixer.in_proj" not in told
    assert spoil is not spoil_column or list(told) == [BAD]
    rows = torch.randn(7, 384)
    assert torch.equal(decoder.model.layers[2].mixer.down_proj(rows), plain(rows))
    second = measure(guard, decoder, step=guard.settings.guard_every)
    assert BAD not in second[0]["db"] and [row[3] for row in guard.rows() if row[1] == BAD][0].startswith("put back by the guard")


def test_without_a_threshold_it_only_tells():
    decoder = make_decoder(spoil_weight)
    guard = guarded(decoder, guard_min_db=None)
    (event,) = measure(guard, decoder)
    assert event["worst_db"] < 10 and guard.put_back == []


def test_measuring_changes_no_loss_and_no_gradient():
    plain, watched = make_decoder(), make_decoder()
    guarded(plain)
    guard = guarded(watched)
    expected = one_step(plain)
    guard.begin(1)
    assert one_step(watched) == expected and guard.end(1, torch.device("cpu"))
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad) if a.grad is not None else b.grad is None


def test_measuring_keeps_no_activation_that_checkpointing_drops():
    """Of a model of 8 billion parameters they would be tens of gigabytes, at the first step of all. The figures are the same."""
    decoder, figures, kept = make_decoder().train(), [], []
    guard = guarded(decoder)
    for layer in guard.report.layers.values():
        layer.register_forward_pre_hook(lambda _, inputs: kept.append(StorageWeakRef(inputs[0].untyped_storage())))
    for is_lean in (False, True):
        torch.manual_seed(1)
        embeddings = torch.randn(1, 33, decoder.config.hidden_size).requires_grad_()
        kept.clear()
        guard.begin(1)
        loss = run_layers(decoder, embeddings, Layout.packed((20, 13)), activation_checkpointing=is_lean).square().mean()
        alive = sum(not storage.expired() for storage in kept)
        assert alive == 0 if is_lean else alive > len(kept) // 2
        loss.backward()
        figures.append(guard.end(1, torch.device("cpu"))[0]["db"])
    assert figures[0] == {name: pytest.approx(each) for name, each in figures[1].items()} and len(figures[0]) == len(guard.report.layers)


def test_frozen_weights_have_no_figure_for_a_gradient_that_is_not_made():
    decoder = make_decoder().requires_grad_(False)
    (event,) = measure(guarded(decoder), decoder)
    figures = event["db"][BAD]
    assert figures["gradient of its weights"] is None and figures["gradient of its input"] > 18


def test_it_measures_at_the_first_step_and_every_so_many():
    guard = guarded(make_decoder(), guard_every=50)
    assert [step for step in range(1, 151) if guard.is_due(step)] == [1, 50, 100, 150]
    assert not any(guarded(make_decoder(), guard_every=None).is_due(step) for step in (1, 100))
    assert guard.end(7, torch.device("cpu")) == []


def test_a_converted_layer_that_does_not_run_is_an_error(monkeypatch):
    """What a fused kernel does that reads a weight past its layer."""
    decoder = make_decoder()
    guard = guarded(decoder)
    layer = decoder.model.layers[0].mixer.out_proj
    monkeypatch.setattr(layer, "forward", lambda rows: torch.nn.functional.linear(rows, layer.weight))
    guard.begin(1)
    one_step(decoder)
    with pytest.raises(ValueError, match=r"1 layers were converted to FP8 and did not run in step 1: model.layers.0.mixer.out_proj"):
        guard.end(1, torch.device("cpu"))


def test_a_run_that_goes_on_has_the_same_layers_in_fp8():
    guard = guarded(make_decoder())
    guard.restore([BAD])
    assert BAD not in guard.active and len(guard.active) == 15 and guard.put_back == [BAD]


def test_the_section_is_off_unless_asked_for(tiny_model, tmp_path):
    assert start_fp8(tiny_model, Fp8()) is None
    path = tmp_path / "recipe.yaml"
    path.write_text("{stage: align, model: m, out: o, data: {sources: [{shards: s}]}, parts: {projector: 1e-3}, run: {steps: 1}}")
    assert load_recipe(path).fp8 == Fp8() and not load_recipe(path).fp8.enabled
    changed = load_recipe(path, ["fp8.enabled=true", "fp8.guard_every=null", "fp8.guard_min_db=12", "fp8.skip_last=2"]).fp8
    assert changed == Fp8(enabled=True, guard_every=None, guard_min_db=12.0, skip_last=2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fp8.skip_first=-1", "expected 0 or more products"),
        ("fp8.guard_every=0", "expected at least 1 step"),
        ("fp8.guard_min_db=0", "expected more than 0 dB"),
        ("fp8.enable=true", "did you mean fp8.enabled"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, override, message):
    path = tmp_path / "recipe.yaml"
    path.write_text("{stage: align, model: m, out: o, data: {sources: [{shards: s}]}, parts: {projector: 1e-3}, run: {steps: 1}}")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, [override])


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on two ranks in one pair of processes, see fp8_scenarios.py: what they saw, and their folder."""
    folder = tmp_path_factory.mktemp("fp8")
    model, processor = assemble("tiny", vision_settings={"image_size": 32, "hidden_size": 32, "num_hidden_layers": 1,
                                                         "intermediate_size": 64, "num_attention_heads": 2}, seed=0)  # fmt: skip
    save_model(model, processor, folder / "sound")
    with torch.no_grad():
        spoil_column(dict(model.language_model.named_parameters()))
    save_model(model, processor, folder / "model")
    (folder / "images").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 60, 3), dtype=np.uint8)).save(folder / "images" / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a red ball"}]
    convert([{"id": str(n), "image": "a.png", "conversations": turns} for n in range(8)], folder / "images", processor, folder / "shards")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(),
               str(Path(__file__).with_name("fp8_scenarios.py")), str(folder)]  # fmt: skip
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560)
    if process.returncode != 0:
        pytest.fail(process.stderr[-3000:], pytrace=False)
    return json.loads((folder / "results.json").read_text()), folder


def read_log(folder: Path, name: str) -> tuple[list[dict], list[dict]]:
    """(lines of steps, events) of a run."""
    lines = [json.loads(line) for line in (folder / f"{name}.log" / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line], [line for line in lines if "event" in line]


@pytest.mark.parametrize("name", ["zero3", "bfloat16"])
def test_under_zero_the_bad_layer_goes_back_and_parameters_stay(runs, name):
    """Two ranks, which must decide alike; weights are gathered only while their layer runs; a new Parameter would no longer be trained."""
    results, folder = runs
    found = results[name]
    assert found["same_parameters"] and found["put_back"] == [BAD] and found["put_back_everywhere"]
    steps, events = read_log(folder, name)
    assert [(event["event"], event["step"]) for event in events] == [("fp8_measured", 1), ("fp8_put_back", 1), ("fp8_measured", 2),
                                                                     ("fp8_measured", 4)]  # fmt: skip
    assert BAD in events[0]["db"] and BAD not in events[2]["db"] and len(steps) == 4
    others = {layer: figures for layer, figures in events[0]["db"].items() if layer != BAD}
    assert len(others) == 6 and all(figures["output"] > 20 for figures in others.values())
    after, before = (load_model(folder / which)[0].language_model for which in (name, "model"))
    for layer in (BAD, "model.layers.1.mixer.v_proj"):  # one that went back, one that did not
        assert not torch.equal(after.get_parameter(f"{layer}.weight"), before.get_parameter(f"{layer}.weight"))


def test_adapters_train_beside_frozen_layers_in_fp8(runs):
    """LoRA with FP8: layers under adapters multiply in FP8 and do not move, the adapters do, and the guard measures what there is."""
    results, folder = runs
    found = results["lora"]
    assert found["same_parameters"] and not found["put_back"]
    steps, events = read_log(folder, "lora")
    assert len(steps) == 4 and len({line["loss"] for line in steps}) > 1
    figures = events[0]["db"]["model.layers.1.mixer.v_proj.base_layer"]
    assert figures["output"] > 20 and figures["gradient of its weights"] is None  # frozen: none is made
    after, before = (load_model(folder / which)[0].language_model.state_dict() for which in ("lora", "sound"))
    assert all(
        torch.equal(after[name].float(), before[name].to(torch.bfloat16).float()) for name in before if name.endswith("_proj.weight")
    )
    adapters = load_file(folder / "lora.adapter" / "adapter_model.safetensors")
    moved = [name for name, tensor in adapters.items() if "lora_B" in name and tensor.abs().max() > 0]  # they begin at zero
    assert len(moved) == sum("lora_B" in name for name in adapters) > 0


def test_stages_and_precisions_measure_and_train_alike(runs):
    """ZeRO-3 in float32; ZeRO-1 in bfloat16, whose forward passes are made twice (activation checkpointing): no row may count twice."""
    _, folder = runs
    (one, told), (three, told_too) = (read_log(folder, name) for name in ("bfloat16", "zero3"))
    assert [line["loss"] for line in three] == pytest.approx([line["loss"] for line in one], abs=0.05)
    for layer, figures in told_too[0]["db"].items():
        assert told[0]["db"][layer]["output"] == pytest.approx(figures["output"], abs=1.0)


def test_a_run_stopped_in_a_step_goes_on_with_the_same_layers_to_the_last_bit(runs):
    """Without the list in the checkpoint the layer would be in FP8 again from there on."""
    _, folder = runs
    whole, _ = read_log(folder, "zero3")
    cut, events = read_log(folder, "cut")
    assert [line["loss"] for line in cut] == [line["loss"] for line in whole] and len(cut) == 4
    assert (folder / "cut" / "model.safetensors").read_bytes() == (folder / "zero3" / "model.safetensors").read_bytes()
    assert [event["layer"] for event in events if event["event"] == "fp8_put_back"] == [BAD]


def test_every_mfu_of_a_run_in_fp8_says_which_peak_it_divides_by(runs):
    """In the lines of the log, in the summary and on the page; the log of one without FP8 needs no such words."""
    _, folder = runs
    steps, _ = read_log(folder, "bfloat16")
    (peak,) = {line["mfu_peak"] for line in steps}
    assert "bfloat16, measured; not that of FP8" in peak
    assert json.loads((folder / "bfloat16.log" / "summary.json").read_text())["peak"] == peak
    assert (folder / "bfloat16.log" / "report.md").read_text().count("not that of FP8") >= 2


def test_the_report_of_a_run_names_every_layer(runs):
    _, folder = runs
    summary = json.loads((folder / "zero3.log" / "summary.json").read_text())
    states = {row[1]: row[3] for row in summary["fp8"]}
    assert states[BAD].startswith("put back by the guard") and states["model.layers.1.mixer.v_proj"].startswith("FP8 (")
    assert states["model.layers.0.mixer.in_proj"] == "not converted: among the first 4"
    page = (folder / "zero3.log" / "report.html").read_text()
    assert all(name in page for name in states)
