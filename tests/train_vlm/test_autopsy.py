"""The first value that is not finite is found where it was made, with its sample; what cannot be replayed is one clear line."""

import copy
import dataclasses
import json
import shlex

import pytest
import torch
from poison import Poison

import train_vlm.autopsy as autopsy
from projector import Projector
from train_vlm.adapters import put_on_adapters
from train_vlm.autopsy import examine_batches, main, write_autopsy
from train_vlm.batching import pack
from train_vlm.examination import bad_parameters, watch
from train_vlm.fp8_guard import start_fp8
from train_vlm.fp8_section import Fp8
from train_vlm.freezing import apply_parts
from train_vlm.recipe import Lora, Parts
from vlm.checkpoint import load_model
from vlm.fp8_linear import Fp8Linear

ALL = Parts(vision_encoder=1e-3, projector=1e-3, language_model=1e-3)


@pytest.fixture
def model(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.training = True
    return model


@pytest.fixture
def batch(tiny_processor):
    """Two samples without pictures; the second one's answer is longer."""
    samples = []
    for number, answer in enumerate(("red", "blue ball and a green box")):
        prepared = tiny_processor.prepare([{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}])
        samples.append({"source": 0, "id": f"sample {number}", "input_ids": prepared.rendered.input_ids, "labels": prepared.rendered.labels,
                        "pixels": prepared.pixels, "tiles_reduced": 0})  # fmt: skip
    return pack(samples, tiny_processor.renderer.end_of_turn_id, tiny_processor.image_processor.tile_size)


def spoil(model, name: str, value: float) -> None:
    with torch.no_grad():
        dict(model.named_parameters())[name].flatten()[3] = value


def test_the_first_bad_module_is_named_and_its_inputs_were_finite(model, batch, tiny_processor):
    """Modules around it report later: the innermost one is first."""
    spoil(model, "language_model.model.layers.2.mixer.up_proj.weight", float("inf"))
    (entry,) = examine_batches(model, model, [batch], tiny_processor, gradients=None)
    where = entry["first_forward"]
    assert where["module"] == "language_model.model.layers.2.mixer.up_proj" and where["kind"] == "Linear" and where["inputs_finite"]
    assert entry["loss"] in ("nan", "inf") and where["nan"] + where["infinite"] > 0
    assert [sample["id"] for sample in entry["samples"]] == ["0 sample 0", "0 sample 1"] or [
        sample["id"] for sample in entry["samples"]
    ] == ["sample 0", "sample 1"]


def test_a_healthy_batch_has_its_losses_and_the_ranges_of_the_scan(model, batch, tiny_processor):
    (entry,) = examine_batches(model, model, [batch], tiny_processor, gradients="all")
    assert entry["first_forward"] is None and entry["first_gradient"] is None and entry["weights"] == entry["gradients"] == []
    tokens = [sample["supervised_tokens"] for sample in entry["samples"]]
    mean = sum(sample["loss"] * count for sample, count in zip(entry["samples"], tokens, strict=True)) / sum(tokens)
    assert mean == pytest.approx(entry["loss"], rel=1e-4)
    assert len(entry["scan"]) == 2
    for name, ranges in entry["scan"].items():
        mixer = model.get_submodule(name)
        rates = -mixer.A_log.detach().exp()
        assert ranges["A"] == pytest.approx([rates.min().item(), rates.max().item()]) and 0 < ranges["dt"][0] <= ranges["dt"][1]


def test_a_bad_gradient_is_found_where_it_arose(model, batch, tiny_processor, monkeypatch):
    """Forwards all is well; the projector's output gets a gradient that is not a number."""
    real = Projector.forward
    monkeypatch.setattr(Projector, "forward", lambda self, features: Poison.apply(real(self, features), float("nan")))
    (entry,) = examine_batches(model, model, [batch], tiny_processor, gradients="activations")
    assert entry["first_forward"] is None and entry["first_gradient"]["module"].startswith("projector")
    assert all(p.grad is None for p in model.parameters())  # weights gathered none


def test_watching_leaves_no_hook_behind(model, batch, tiny_processor):
    before = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(RuntimeError, match="stop"), watch(model):
        raise RuntimeError("stop")
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == before


def test_bad_weights_are_named(model):
    spoil(model, "projector.linear_1.weight", float("nan"))
    assert bad_parameters(model) == {"weights": ["projector.linear_1.weight"], "gradients": []}


class Engine:
    """Stands for DeepSpeed's without ZeRO."""

    def __init__(self, module):
        self.module, self.device = module, torch.device("cpu")

    def zero_optimization_partition_weights(self):
        return False


def test_the_folder_of_an_autopsy_makes_the_failure_again(model, batch, tiny_processor, tmp_path, one_rank, capsys):
    """Weights, batch and findings, then the printed command in this process."""
    spoil(model, "language_model.model.layers.0.mixer.in_proj.weight", float("inf"))
    folder = tmp_path / "autopsy-step-00000012"
    told = write_autopsy(
        Engine(model), tiny_processor, [batch], folder, parts=ALL, step=12, why="the loss is nan", weights=model.state_dict()
    )
    assert "the loss is nan at step 12" in told and "layers.0.mixer.in_proj" in told and "--rank 0" in told
    content = json.loads((folder / "autopsy.json").read_text())
    assert content["parts"] == dataclasses.asdict(ALL) and content["ranks"][0][0]["samples"][1]["supervised_tokens"] > 3
    assert load_model(folder / "model")[0] is not None
    assert main([str(folder), "--rank", "0"]) == 0
    printed = capsys.readouterr().out
    assert "language_model.model.layers.0.mixer.in_proj (Linear)" in printed and "its inputs were finite" in printed
    assert "weights that are not finite: language_model.model.layers.0.mixer.in_proj.weight" in printed


def replayed_model(folder, monkeypatch):
    """The model that the replay runs."""
    seen, real = [], autopsy.examine_batches
    monkeypatch.setattr(
        autopsy, "examine_batches", lambda call, model, *rest, **more: (seen.append(model), real(call, model, *rest, **more))[1]
    )
    assert main([str(folder)]) == 0
    return seen[0]


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_the_replay_has_the_run_s_fp8_layers(model, batch, tiny_processor, tmp_path, one_rank, capsys, monkeypatch, lora):
    """Products overflow in FP8 alone: in a plain model all would be finite. A layer that the guard had put back is not in FP8 again."""
    fp8 = Fp8(enabled=True, skip_first=0, skip_last=0, guard_every=None)
    real = Fp8Linear.product
    monkeypatch.setattr(Fp8Linear, "product", lambda self, rows, weight: real(self, rows, weight) * float("inf"))
    apply_parts(model, ALL)
    if lora:
        put_on_adapters(model, lora)
    guard = start_fp8(model, fp8)
    first, second, *_ = guard.report.layers
    guard.restore([first])
    folder = tmp_path / "autopsy-step-00000003"
    told = write_autopsy(
        Engine(model), tiny_processor, [batch], folder, parts=ALL, step=3, why="the loss is nan", weights=model.state_dict(), lora=lora,
        fp8=fp8, put_back=guard.put_back,
    )  # fmt: skip
    assert f"language_model.{second} (Fp8Linear, output)" in told
    again = replayed_model(folder, monkeypatch)
    assert f"language_model.{second} (Fp8Linear)" in capsys.readouterr().out
    layers = {name: layer.uses_fp8 for name, layer in again.language_model.named_modules() if isinstance(layer, Fp8Linear)}
    assert layers == {name: name != first for name in guard.report.layers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_replay_has_the_run_s_adapters(model, batch, tiny_processor, tmp_path, one_rank, capsys, monkeypatch, dtype):
    """Not merged: the adapter with the bad value is named, only what trained has gradients, and all is in the dtype of the engine."""
    lora = Lora(rank=4, targets=("in_proj", "up_proj"))
    apply_parts(model, ALL)
    put_on_adapters(model, lora)
    model.to(dtype)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    dtypes = {name: p.dtype for name, p in model.named_parameters() if ".lora_" in name or "_proj" in name}
    spoil(model, "language_model.model.layers.0.mixer.in_proj.lora_B.default.weight", float("inf"))
    folder = tmp_path / "autopsy-step-00000003"
    write_autopsy(
        Engine(model), tiny_processor, [batch], folder, parts=ALL, step=3, why="the loss is nan", weights=model.state_dict(), lora=lora
    )
    assert json.loads((folder / "autopsy.json").read_text())["lora"]["rank"] == 4
    again = replayed_model(folder, monkeypatch)
    printed = capsys.readouterr().out
    assert "layers.0.mixer.in_proj.lora_B.default (Linear)" in printed
    assert "weights that are not finite: language_model.model.layers.0.mixer.in_proj.lora_B.default.weight" in printed
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    assert {name: p.dtype for name, p in again.named_parameters() if name in dtypes} == dtypes


def test_the_printed_command_stands_in_a_shell(model, batch, tiny_processor, tmp_path, one_rank, capsys):
    """A folder with a blank and a quote in its name is one word of the command."""
    spoil(model, "language_model.model.layers.2.mixer.up_proj.weight", float("inf"))
    folder = tmp_path / "bob's runs" / "autopsy-step-00000003"
    told = write_autopsy(
        Engine(model), tiny_processor, [batch], folder, parts=ALL, step=3, why="the loss is nan", weights=model.state_dict()
    )
    words = shlex.split(told.partition("replay: ")[2])
    assert words[1:] == ["-m", "train_vlm.autopsy", str(folder), "--rank", "0"]
    assert words == shlex.split(json.loads((folder / "autopsy.json").read_text())["replay"])
    assert main(words[3:]) == 0 and "layers.2.mixer.up_proj (Linear)" in capsys.readouterr().out


def test_a_folder_or_rank_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path), "--rank", "3"]) == 2
    assert capsys.readouterr().err.startswith("autopsy: no batch-rank-3.pt in")
