"""The choice of a kernel for one step of the recurrence: a right one passes its probe, wrong ones fail it and are not used."""

import sys
import types

import pytest
import torch

from vlm.decoder import step_kernel
from vlm.decoder.short_scan import scan_step

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def plain_kernel(state, x, dt, A, B, C, D=None, dt_bias=None):
    """mamba-ssm's signature: everything as wide as the state (R, H, P, N), which goes on in place. It looks at the strides of the bias
    without asking whether there is one."""
    assert dt.shape == x.shape and A.shape == state.shape[1:] and D.shape == dt_bias.shape == x.shape[1:]
    shared = dt.stride(-1) == dt_bias.stride(-1) == 0 and A.stride(-1) == A.stride(-2) == 0
    assert shared, "the kernel is slow unless it sees that channels share them"
    dt = dt + dt_bias
    B, C = (part.repeat_interleave(x.shape[1] // part.shape[1], dim=1) for part in (B, C))  # R H N
    state.copy_(state * (dt[..., None] * A).exp() + (x * dt)[..., None] * B[:, :, None])
    return (state * C[:, :, None]).sum(-1) + x * D


def without_state(state, *rest, **more):
    return plain_kernel(state.clone(), *rest, **more)


def without_skip(state, x, dt, A, B, C, D=None, dt_bias=None):
    return plain_kernel(state, x, dt, A, B, C, D=D * 0, dt_bias=dt_bias)


def groups_in_turn(state, x, dt, A, B, C, D=None, dt_bias=None):
    """Heads dealt to groups one by one instead of in blocks."""
    B, C = (part.repeat(1, x.shape[1] // part.shape[1], 1) for part in (B, C))
    return plain_kernel(state, x, dt, A, B, C, D=D, dt_bias=dt_bias)


def broken(*args, **more):
    raise RuntimeError("no such instruction\nand more")


@pytest.fixture(autouse=True)
def asked_anew():
    """What is installed is asked once a process."""
    step_kernel._is_installed.cache_clear()
    yield
    step_kernel._is_installed.cache_clear()


def install(monkeypatch, kernel):
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", step_kernel.MODULE)
    modules = {name: types.ModuleType(name) for name in names}
    modules[step_kernel.MODULE].selective_state_update = kernel
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(step_kernel, "_findings", lambda device: tuple(step_kernel.step_findings(step_kernel._triton_step, CPU)))


def test_an_installed_kernel_is_used_after_its_probe(monkeypatch):
    install(monkeypatch, plain_kernel)
    step = step_kernel.fast_step(CUDA)
    torch.manual_seed(0)
    given = torch.randn(2, 6, 4), torch.rand(2, 6), -torch.rand(6), torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(6)
    state = torch.randn(2, 6, 4, 5)
    other = state.clone()
    torch.testing.assert_close(step(*given, state), scan_step(*given, other))
    torch.testing.assert_close(state, other)


@pytest.mark.parametrize("kernel", [without_state, without_skip, groups_in_turn, broken])
def test_a_wrong_kernel_is_not_used(monkeypatch, kernel):
    install(monkeypatch, kernel)
    assert step_kernel.fast_step(CUDA) is None


def test_without_the_package_and_on_a_processor_it_is_plain_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    assert step_kernel.fast_step(CUDA) is None and step_kernel.fast_step(CPU) is None
    found = step_kernel.step_probe("cpu")
    assert len(found) == 2 and all(ok and name.startswith("plain PyTorch, a step") for name, _, ok in found)


@pytest.mark.gpu
def test_the_step_of_this_gpu_holds():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert [finding for finding in step_kernel.step_probe("cuda") if not finding[2]] == []
