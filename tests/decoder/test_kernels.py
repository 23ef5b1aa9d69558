"""The choice of a scan kernel: a right one passes its probe, every wrong one we know of fails it, and what fails is not used."""

import sys
import types

import pytest
import torch

from vlm.decoder import kernels, ssd

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked_anew():
    """What is installed is asked once a process."""
    yield
    kernels._import_error.cache_clear()


def failed(scan, dtype=torch.float32):
    return {name for name, _, ok in kernels.findings(scan, CPU, dtype) if not ok}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_right_scan_passes(dtype):
    assert failed(ssd.plain_scan, dtype) == set()


def test_it_passes_where_gradients_are_off():
    """The first scan of a process may be that of `generate`: a probe that cannot go backwards there would turn the kernel off for good."""
    with torch.inference_mode():
        assert failed(ssd.plain_scan) == set()


def test_it_passes_inside_a_checkpointed_block():
    """The first scan of a training run with activation checkpointing stands there: torch's hooks would run the block again from within the
    probe's backward pass, the probe would fail, and the step with it."""
    found = []

    def block(x):
        if not found:
            found.append(failed(ssd.plain_scan, torch.bfloat16))
        return (x * 2).sin()

    x = torch.ones(3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    assert found == [set()] and torch.allclose(x.grad, 2 * torch.cos(torch.tensor(2.0)))


def test_it_leaves_the_precision_of_products_as_it_was():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        seen = []
        kernels.findings(lambda *rest, **settings: seen.append(torch.get_float32_matmul_precision()), CPU, torch.float32)
        assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def without_borders(*args, seq_idx=None, **settings):
    return ssd.plain_scan(*args, **settings)


def without_start(*args, initial_states=None, **settings):
    return ssd.plain_scan(*args, **settings, initial_states=initial_states * 0 if initial_states is not None else None)


def start_in_every_segment_but_the_first(*args, seq_idx=None, initial_states=None, **settings):
    """What comes out when the kernel's numbering of segments is not ours."""
    if seq_idx is not None and initial_states is not None:
        initial_states = initial_states * 0
    return ssd.plain_scan(*args, **settings, seq_idx=seq_idx, initial_states=initial_states)


def gradient_over_borders(x, *args, seq_idx=None, **settings):
    y, state = ssd.plain_scan(x, *args, **settings, seq_idx=seq_idx)
    leak, final = ssd.plain_scan(x, *args, **settings)
    return y + leak - leak.detach(), state + final - final.detach()


def only_whole_chunks(x, *args, **settings):
    if x.shape[1] % 64:
        raise RuntimeError("length is not a multiple of the chunk")
    return ssd.plain_scan(x, *args, **settings)


def not_a_number(*args, **settings):
    y, state = ssd.plain_scan(*args, **settings)
    return y * float("nan"), state


WRONG = [
    (without_borders, {"seq_idx", "seq_idx, gradients"}),
    (without_start, {"initial state", "initial state, gradients"}),
    (start_in_every_segment_but_the_first, {"seq_idx and initial state"}),
    (gradient_over_borders, {"seq_idx, gradients"}),
    (only_whole_chunks, {"odd length"}),
    (not_a_number, {"forward", "seq_idx"}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scan", "expected"), WRONG)
def test_a_wrong_kernel_is_seen(scan, expected, dtype):
    """Each is a fault that trains and answers without an error message."""
    found = failed(lambda x, dt, A, B, C, chunk_size, **settings: scan(x, dt, A, B, C, chunk_size, **settings), dtype)
    assert expected <= found
    if scan is not not_a_number:
        assert "forward" not in found


def install(monkeypatch, kernel):
    """A mamba-ssm whose kernel this is, on a device that calls itself CUDA."""
    modules = {
        name: types.ModuleType(name) for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined")
    }
    modules["mamba_ssm.ops.triton.ssd_combined"].mamba_chunk_scan_combined = kernel
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(kernels, "_triton_findings", lambda device, dtype: tuple(kernels.findings(kernels._triton, CPU, dtype)))
    kernels._import_error.cache_clear()


def test_an_installed_kernel_is_used_after_its_probe(monkeypatch):
    """Its segments are counted from 0, its chunks are powers of two: the adapter has to see to both."""
    asked = []

    def kernel(x, dt, A, B, C, chunk_size, seq_idx=None, **settings):
        asked.append((chunk_size, seq_idx))
        assert chunk_size & (chunk_size - 1) == 0 and (seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx[0, 0] == 0))
        return ssd.plain_scan(x, dt, A, B, C, chunk_size, seq_idx=seq_idx, **settings)

    install(monkeypatch, kernel)
    cuda = torch.device("cuda")
    assert kernels.choice(cuda) == "triton" and "Triton" in kernels.describe(cuda)
    assert kernels.fast_scan(cuda, torch.float32) is None
    assert kernels.fast_scan(cuda, torch.float16) is kernels._triton
    scan = kernels.fast_scan(cuda, torch.bfloat16)
    inputs = kernels._inputs(70, CPU, torch.bfloat16, borders=(3, 40))
    expected = ssd.plain_scan(**inputs, chunk_size=48)
    asked.clear()
    torch.testing.assert_close(scan(**(inputs | {"seq_idx": inputs["seq_idx"] + 7}), chunk_size=48), expected)
    assert asked[0][0] == 64


def test_a_kernel_that_fails_its_probe_is_not_used(monkeypatch):
    install(monkeypatch, without_borders)
    cuda = torch.device("cuda")
    assert kernels.choice(cuda) == "torch" and kernels.fast_scan(cuda, torch.bfloat16) is None
    assert "fails its probe (bfloat16: seq_idx" in kernels.describe(cuda)


def test_a_kernel_that_fails_in_one_dtype_is_used_in_the_other(monkeypatch):
    def kernel(x, *args, seq_idx=None, **settings):
        return ssd.plain_scan(x, *args, seq_idx=None if x.dtype == torch.float16 else seq_idx, **settings)

    install(monkeypatch, kernel)
    cuda = torch.device("cuda")
    assert kernels.fast_scan(cuda, torch.float16) is None and kernels.fast_scan(cuda, torch.bfloat16) is kernels._triton
    said = kernels.describe(cuda)
    assert said.startswith("mamba-ssm's Triton kernels for bfloat16, plain") and "fails its probe (float16: seq_idx" in said
    assert len([name for name, _, ok in kernels.probe(cuda) if not ok and name.startswith("mamba-ssm")]) > 0


def test_a_missing_kernel_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    kernels._import_error.cache_clear()
    assert "pip install 'nemotron-h-vision[cuda]'" in kernels.describe("cuda")
    assert kernels.choice("cuda") == "torch"


def test_the_processor_reports_plain_pytorch():
    assert kernels.choice("cpu") == "torch" and "plain PyTorch" in kernels.describe("cpu")
    assert all(ok and name.startswith("plain PyTorch") for name, _, ok in kernels.probe("cpu"))


@pytest.mark.gpu
def test_the_path_of_this_gpu_holds():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    failed = [finding for finding in kernels.probe("cuda") if not finding[2]]
    assert failed == [], kernels.describe("cuda")
