"""Random scans and their error against the float64 recurrence: any shape, length, clamp and border. For the tests and for benchmarks."""

import math

import torch

from vlm.decoder.ssd import chunk_scan, recurrent_scan


def random_segments(generator: torch.Generator, batch: int, length: int, kind: str) -> torch.Tensor:
    """(B, T) non-decreasing numbers; borders differ from row to row."""
    share = {"some": 0.02, "many": 0.3, "all": 1.0}[kind]
    steps = (torch.rand(batch, length, generator=generator) < share).long()
    return (steps.cumsum(1) * 3 + 5).to(torch.int32)  # neither from 0 nor by 1: only "changes" counts


def random_case(seed: int, length: int | None = None) -> tuple[dict, dict, int]:
    """Tensors (float32), keyword settings and a chunk size, of a random shape; lengths from 1 to 3,000, short ones more often."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=generator))]

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    batch, groups = pick(1, 1, 2, 3), pick(1, 2, 4)
    heads, width, state = groups * pick(1, 2, 3), pick(1, 4, 8), pick(1, 5, 16)
    length = length or round(math.exp(torch.rand((), generator=generator).item() * math.log(3000)))
    softplus = pick(True, True, False)
    tensors = {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads) if softplus else normal(batch, length, heads).abs() * 0.3,
        "A": -torch.rand(heads, generator=generator) * pick(0.2, 2.0, 16.0) - 1e-3,
        "B": normal(batch, length, groups, state),
        "C": normal(batch, length, groups, state),
    }
    if pick(True, False):
        tensors["D"] = pick(normal(heads), normal(heads, width))
    if pick(True, False):
        tensors["z"] = normal(batch, length, heads, width)
    if softplus and pick(True, False):
        tensors["dt_bias"] = normal(heads) - 2.0
    if pick(True, False):
        tensors["initial_states"] = normal(batch, heads, width, state)
    settings = {"dt_softplus": softplus, "dt_limit": pick((0.0, float("inf")), (0.05, 0.5), (0.0, 0.3), (0.2, float("inf")))}
    segments = pick(None, "some", "many", "all")
    if segments:
        settings["seq_idx"] = random_segments(generator, batch, length, segments)
    return tensors, settings, pick(1, 7, 16, 32, 64, 128, 1000)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return ((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def compare(tensors: dict, settings: dict, chunk_size: int, weigh) -> dict[str, float]:
    """Relative error of y, the final state and every gradient. The loss is the sum of both, weighted: `weigh` makes the weights from what
    they weigh."""
    slow = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    fast = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    expected = recurrent_scan(**slow, **settings)
    found = chunk_scan(**fast, **settings, chunk_size=chunk_size, return_final_states=True)
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.float32
    weights = [weigh(part.detach()).float() for part in expected]
    torch.autograd.backward(expected, [weight.double() for weight in weights])
    torch.autograd.backward(found, weights)
    errors = {name: relative(a.detach(), b.detach()) for name, a, b in zip(("y", "state"), found, expected, strict=True)}
    return errors | {f"gradient of {name}": relative(fast[name].grad, slow[name].grad) for name in tensors}
