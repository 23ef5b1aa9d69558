"""The doctor: sound models pass, each kind of damage is one failed line, and the exit code says so."""

import copy
import json
import sys
import types
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlm.decoder
from vlm.assemble import assemble
from vlm.doctor import Check, answers, examine, operations, parts
from vlm.doctor.__main__ import main
from vlm.doctor.check import measured, worst_position
from vlm.doctor.examination import small_model
from vlm.doctor.samples import draw_samples
from vlm.engine import Engine


@pytest.fixture(scope="module")
def patient():
    model, processor = small_model()
    return model.eval(), processor, draw_samples(processor, torch.device("cpu"))


def failed(checks):
    return [check.name for check in checks if not check.ok]


def test_a_sound_model_passes_every_check(tiny_folder, capsys):
    """From the command line, with a folder; JSON holds the same lines."""
    assert main(["--model", str(tiny_folder), "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["failed"] == 0 and all(check["ok"] for check in found["checks"])
    names = {check["name"] for check in found["checks"]}
    assert {"checkpoint loaded exactly", "scan path", "engine = generate, greedy", "packed = separate, gradients at the inputs"} <= names
    assert len(found["checks"]) > 25 and found["model"] == str(tiny_folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_tiny_model_made_on_the_spot_passes_in_other_dtypes(dtype):
    """The bounds must hold rounding, and a forgotten border must stand far outside them."""
    model, processor = small_model()
    checks = list(examine(model.to(dtype), processor))
    assert failed(checks) == []
    packed = next(check for check in checks if check.name.startswith("packed = separate, logits"))
    assert float(packed.figure.split("border: ")[1]) > 5 * float(packed.figure.split("bound ")[1].partition(")")[0])


def test_a_model_is_left_as_it_was(patient):
    model, processor, _ = patient
    model.vision_encoder.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    list(examine(model, processor))
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.vision_encoder.requires_grad_(True)


def test_one_failed_check_exits_1_and_the_others_still_run(monkeypatch, capsys, tiny_folder):
    """A check that breaks down is its own finding."""
    monkeypatch.setattr(operations, "scan", lambda *_: (_ for _ in ()).throw(RuntimeError("no kernel image\nfor this device")))
    assert main(["--model", str(tiny_folder), "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=2) for line in lines if line.startswith("FAIL")] == [
        ["FAIL", "chunk_scan", "RuntimeError: no kernel image"]
    ]
    assert lines[-1].endswith("checks, 1 failed") and any("engine = generate" in line for line in lines)


def test_a_folder_that_is_no_model_exits_2_with_one_line(tmp_path, capsys):
    assert main(["--model", str(tmp_path / "nowhere")]) == 2
    assert main(["--model", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 2 and "no folder at" in captured.err


@pytest.mark.parametrize("slip", ["no reset", "no start", "gradient"])
def test_a_wrong_scan_is_seen(patient, monkeypatch, slip):
    right = operations.chunk_scan

    def wrong(x, dt, A, B, C, chunk_size, **settings):
        if slip == "no reset":
            settings["seq_idx"] = None
        if slip == "no start":
            settings["initial_states"] = None
        if slip == "gradient":
            dt = dt.detach() * 0.5 + dt * 0.5
        return right(x, dt, A, B, C, chunk_size, **settings)

    monkeypatch.setattr(operations, "chunk_scan", wrong)
    found = failed(operations.scan(patient[0].config.text_config, torch.device("cpu"), torch.float32))
    expected = {
        "no reset": "chunk_scan = recurrence, packed",
        "no start": "chunk_scan = recurrence",
        "gradient": "chunk_scan = recurrence, gradients",
    }
    assert expected[slip] in found and "one decoding step = recurrence" not in found


def test_a_convolution_over_a_border_is_seen(patient, monkeypatch):
    from vlm.decoder.layout import Layout

    right = operations.causal_convolution
    monkeypatch.setattr(operations, "causal_convolution", lambda x, w, b, layout: right(x, w, b, Layout(lengths=(x.shape[1],))))
    assert failed(operations.convolution(patient[0].config.text_config, torch.device("cpu"), torch.float32))


def test_kernels_report_through_the_doctor(monkeypatch):
    """A Triton kernel that is installed but wrong must fail here, and the path in use must be named."""
    module = types.ModuleType("vlm.decoder.kernels")
    module.probe = lambda device: [("forward", "3e-06", True), ("seq_idx", "0.7", False)]
    module.describe = lambda device: "plain PyTorch: the installed kernel ignores seq_idx"
    monkeypatch.setitem(sys.modules, "vlm.decoder.kernels", module)
    monkeypatch.setattr(vlm.decoder, "kernels", module, raising=False)
    checks = list(operations.kernels(torch.device("cpu")))
    assert [check.ok for check in checks[:3]] == [True, True, False] and "ignores seq_idx" in checks[0].figure
    assert len(checks) == 5 and all(check.ok and "a step" in check.name for check in checks[3:])  # and the step of decoding


def test_ssm_parameters_in_half_precision_are_seen(patient, monkeypatch):
    """Stored narrow is fine, used narrow is not: exp(dt A) over thousands of positions needs the digits."""
    import vlm.decoder.mixer as mixer

    model = copy.deepcopy(patient[0]).bfloat16()
    assert failed(parts.float32_parameters(model, patient[2])) == []
    forward = mixer.Mamba2Mixer.forward

    def narrow(self, hidden_states, *args, **kwargs):
        torch.exp(self.A_log)
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(mixer.Mamba2Mixer, "forward", narrow)
    (check,) = parts.float32_parameters(model, patient[2])
    assert not check.ok and "A_log" in check.figure


@pytest.mark.parametrize("damage", ["a number", "left out", "too many"])
def test_a_checkpoint_that_was_not_loaded_exactly_is_seen(tiny_folder, tiny_model, tmp_path, damage):
    """The files are read again, without the loader."""
    weights = load_file(tiny_folder / "model.safetensors")
    key = next(key for key in weights if key.endswith("A_log"))
    if damage == "a number":
        weights[key][0] += 1e-3
    elif damage == "left out":
        del weights[key]
    else:
        weights["projector.extra.weight"] = torch.ones(2)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (sound,) = parts.loaded_exactly(tiny_model, tiny_folder)
    (check,) = parts.loaded_exactly(tiny_model, tmp_path)
    assert sound.ok and "6 of them A_log, D or dt_bias" in sound.figure and not check.ok
    assert {"a number": "A_log", "left out": "A_log (in no file)", "too many": "projector.extra.weight (in the files only)"}[
        damage
    ] in check.figure


def test_a_phrase_that_is_one_token_is_text_and_no_fault():
    """The quickstart's tokenizer knows its instructions as one plain token each."""
    model, processor = assemble("tiny", tokenizer_phrases=["\nAnswer with one word."])
    assert "text that looks like a tag stays text" not in failed(parts.tokenizer(model, processor))


def test_text_that_becomes_a_tag_is_seen(patient, monkeypatch):
    model, processor, _ = patient
    monkeypatch.setattr(
        processor.renderer, "encode_plain", lambda text: processor.tokenizer.encode(text, add_special_tokens=False)
    )  # fmt: skip
    assert "text that looks like a tag stays text" in failed(parts.tokenizer(model, processor))


@pytest.mark.parametrize("slip", ["image_token_id", "visual_tokens_per_tile", "eos"])
def test_a_model_and_a_processor_that_do_not_fit_are_seen(patient, slip):
    model, processor, _ = patient
    model = copy.deepcopy(model)
    if slip == "eos":
        model.generation_config.eos_token_id = 1
    else:
        setattr(model.config, slip, getattr(model.config, slip) + 1)
    assert failed(parts.tokenizer(model, processor)) == ["model and processor agree"]


def test_tags_of_different_length_are_seen(patient):
    """A tokenizer that lost one of its tags writes it in letters."""
    model, processor, _ = patient

    class Forgetful:
        def __getattr__(self, name):
            return getattr(processor.tokenizer, name)

        def encode(self, text, **settings):
            ids = processor.tokenizer.encode(text, **settings)
            return ids * 3 if text == "<tile_12>" else ids

    forgetful = copy.copy(processor)
    forgetful.tokenizer = Forgetful()
    first = next(iter(parts.tokenizer(model, forgetful)))
    assert not first.ok and "1 or 3 tokens" in first.figure


def test_an_engine_that_answers_otherwise_is_seen(patient, monkeypatch):
    """Both texts stand in the line."""

    class Wrong(Engine):
        def generate(self, requests, on_answer=None):
            found = super().generate(requests, on_answer)
            return [*found[:-1], replace(found[-1], text="something else")]

    monkeypatch.setattr(answers, "Engine", Wrong)
    monkeypatch.setattr(answers, "BOUNDS", {torch.float32: -1.0})  # no tie is near enough
    checks = list(answers.engine(*patient))
    assert failed(checks) == ["engine = generate, greedy"]
    assert "3 of 4 texts equal" in checks[0].figure and "'something else'" in checks[0].figure


def test_an_engine_that_refuses_is_seen(patient, monkeypatch):
    model, processor, samples = patient
    asked = [replace(samples[0], question={"role": "user", "content": [{"type": "image", "image": "nowhere.png"}]}), *samples[1:]]
    (check,) = answers.engine(model, processor, asked)
    assert not check.ok and "no image at nowhere.png" in check.figure


def test_the_worst_position_counts():
    """One wrong position among a thousand is a leak, not a small mean error."""
    expected = torch.ones(1000, 4)
    found = expected.clone()
    found[17] = 2.0
    assert worst_position(found, expected) == pytest.approx(1.0)
    assert worst_position(expected[:0], expected[:0]) == 0.0
    found[3, 0] = float("nan")
    assert worst_position(found, expected) == float("inf")
    assert not measured("x", float("nan"), 1.0).ok and measured("x", 0.0, 0.0).ok
    with pytest.raises(ValueError, match="found shape"):
        worst_position(found, expected[:1])


def test_a_line_holds_what_figure_and_verdict():
    assert Check("what", "1.0e-07", True).line().split() == ["ok", "what", "1.0e-07"]
    assert Check("what", "0.7", False).line().startswith("FAIL")


def test_an_unknown_dtype_is_refused(patient):
    with pytest.raises(ValueError, match="the doctor knows"):
        list(examine(copy.deepcopy(patient[0]).to(torch.float8_e4m3fn), patient[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_that_is_not_there_passes_every_check(dtype, pretend_gpu):
    """Whole model, both directions, every way of packing and keeping: nothing is made or left on the wrong device."""
    model, processor = small_model()
    checks = list(examine(pretend_gpu.put(model.to(dtype)), processor))
    assert failed(checks) == [] and len(checks) > 20


@pytest.mark.gpu
def test_a_cuda_device_passes_with_its_kernels():
    """Triton kernels where they are installed, other sums than the CPU's: the same checks hold in bfloat16."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, processor = small_model()
    assert failed(examine(model.to("cuda", torch.bfloat16), processor)) == []
