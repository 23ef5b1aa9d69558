"""What all tests share: a quiet, single-threaded process without network, and one tiny random model built once."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny():
    """(model, processor) of the tiny preset with random weights. Shared: a test that changes weights takes a copy."""
    from vlm.assemble import assemble

    return assemble("tiny", seed=0)


@pytest.fixture(scope="session")
def tiny_model(tiny):
    return tiny[0]


@pytest.fixture(scope="session")
def tiny_processor(tiny):
    return tiny[1]


@pytest.fixture(scope="session")
def exact_model():
    """The tiny model in float64, with larger weights: differences between two ways of computing are then rounding or a bug, never both."""
    from vlm.assemble import assemble

    model, _ = assemble("tiny", seed=1)
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(2.0)
            elif name.endswith("dt_bias"):
                parameter.add_(3.0)  # time steps near 0.2, so that the recurrent state matters
    return model.eval()


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory):
    """The tiny model saved as a folder. Shared: nobody writes into it."""
    from vlm.checkpoint import save_model

    return save_model(*tiny, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def one_rank(tmp_path_factory):
    """torch.distributed with this process as its only rank."""
    meeting = tmp_path_factory.mktemp("rendezvous") / "file"
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def pretend_gpu(monkeypatch):
    """A GPU that is not there (tests/pretend_gpu.py): cuda:1, while cuda:0 is the current one."""
    from pretend_gpu import PretendGpu

    with PretendGpu(monkeypatch) as gpu:
        yield gpu
