"""The GPU that is not there refuses what a real one refuses: a test on it would else prove nothing."""

import pytest
import torch
from pretend_gpu import PretendTensor


def captured(pretend_gpu, work):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(pretend_gpu.device), torch.cuda.graph(graph):
        found = work()
    return graph, found


def test_its_tensors_say_where_they_are_and_compute_right_numbers(pretend_gpu):
    a = torch.arange(6.0, device=pretend_gpu.device).view(2, 3)
    b = (a @ a.T).softmax(-1)
    assert isinstance(b, PretendTensor) and b.device == pretend_gpu.device and b.is_cuda and b.new_zeros(2).is_cuda and not b.cpu().is_cuda
    assert torch.equal(b.cpu(), (torch.arange(6.0).view(2, 3) @ torch.arange(6.0).view(2, 3).T).softmax(-1))
    a[:, 1] = -1.0
    assert a.tolist() == [[0.0, -1.0, 2.0], [3.0, -1.0, 5.0]]


def test_gradients_are_those_of_a_processor(pretend_gpu):
    def gradient(device):
        x = torch.linspace(-1, 1, 8, dtype=torch.float64).to(device).requires_grad_()
        (torch.where(x > 0, x, 0.5) * x.cumsum(0)).sum().backward()
        return x.grad.cpu()

    assert torch.equal(gradient(pretend_gpu.device), gradient("cpu"))


@pytest.mark.parametrize(
    "work", [lambda a, b: a + b, lambda a, b: a @ b, lambda a, b: torch.cat([b, a]), lambda a, b: a.index_copy_(0, b.long(), a)]
)
def test_tensors_of_two_devices_do_not_meet(pretend_gpu, work):
    with pytest.raises(RuntimeError, match="same device"):
        work(torch.ones(2, device=pretend_gpu.device), torch.ones(2))


def test_what_is_captured_has_no_effect_until_it_is_replayed(pretend_gpu):
    count, given, factor = torch.zeros(3, device=pretend_gpu.device), torch.ones(3, device=pretend_gpu.device), 2.0

    def work():
        count.add_(given * factor)
        return count[1:] + 1

    graph, found = captured(pretend_gpu, work)
    assert count.tolist() == [0, 0, 0]
    factor = 5.0  # the host's numbers are those of the capture
    given.copy_(torch.tensor([1.0, 2.0, 3.0]))
    graph.replay()
    assert count.tolist() == [2, 4, 6] and found.tolist() == [5, 7]
    graph.replay()
    assert count.tolist() == [4, 8, 12] and found.tolist() == [9, 13]


@pytest.mark.parametrize(
    "work", [lambda a: a.sum().item(), lambda a: a.cpu(), lambda a: a.nonzero(), lambda a: a + torch.tensor(1.0, device=a.device)]
)
def test_what_needs_the_host_is_not_captured(pretend_gpu, work):
    given = torch.ones(2, device=pretend_gpu.device)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        captured(pretend_gpu, lambda: work(given))
    assert len(pretend_gpu.refused) == 1
    work(given)


def test_nothing_is_captured_from_another_device_than_the_current_one(pretend_gpu):
    graph, count = torch.cuda.CUDAGraph(), torch.zeros(1, device=pretend_gpu.device)
    with torch.cuda.graph(graph):
        count.add_(1)
    graph.replay()
    assert count.tolist() == [1] and not graph.noted
