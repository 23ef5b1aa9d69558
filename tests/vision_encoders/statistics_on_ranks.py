"""What BatchNorm layers make of tiles that two ranks hold between them: started by test_shared_statistics.py, writes what it saw as JSON.

python -m torch.distributed.run --nproc_per_node 2 statistics_on_ranks.py OUT
"""

import copy
import json
import sys

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from vision_encoders import build_vision_encoder
from vision_encoders.running_statistics import unmoved_statistics
from vision_encoders.shared_statistics import share_statistics

SPLIT = 2  # of seven tiles the first rank holds so many
LAYERS = {
    "plain": lambda: nn.BatchNorm2d(5),
    "without affine": lambda: nn.BatchNorm2d(5, affine=False),
    "without running statistics": lambda: nn.BatchNorm2d(5, track_running_stats=False),
    "cumulative": lambda: nn.BatchNorm2d(5, momentum=None),
    "with an activation": lambda: BatchNormAct2d(5),
    "frozen affine": lambda: nn.BatchNorm2d(5).requires_grad_(False),
}


def passes(module: nn.Module, given: torch.Tensor, wanted: torch.Tensor) -> list[torch.Tensor]:
    """Two passes forwards and backwards -> output and gradient of the input of the second."""
    for _ in range(2):
        x = given.clone().requires_grad_()
        y = module(x)
        (y * wanted).sum().backward()
        module.zero_grad(set_to_none=False)
    x = given.clone().requires_grad_()
    y = module(x)
    (y * wanted).sum().backward()
    return [y.detach(), x.grad]


def buffers_and_gradients(module: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Running statistics, and the gradients of the parameters summed over all ranks that hold a part of the tiles."""
    return [buffer.double() for buffer in module.buffers()], [p.grad for p in module.parameters() if p.grad is not None]


def distance(module: nn.Module, given: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference between one process with all tiles and two with a part each; of output, gradients, running statistics."""
    rank = dist.get_rank()
    whole, part = module.train(), copy.deepcopy(module).train()
    assert share_statistics(part) == sum(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in part.modules())
    mine = slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)
    expected, found = passes(whole, given, wanted), passes(part, given[mine], wanted[mine])
    pairs = [(each[mine], other) for each, other in zip(expected, found, strict=True)]
    (buffers, gradients), (own_buffers, own_gradients) = buffers_and_gradients(whole), buffers_and_gradients(part)
    for gradient in own_gradients:
        dist.all_reduce(gradient)
    pairs += list(zip(buffers + gradients, own_buffers + own_gradients, strict=True))
    return max((each - other).abs().max().item() for each, other in pairs)


def blank(dtype) -> dict:
    """The second rank has a blank tile: the first must find what it finds alone, and both move alike. Then both have one."""
    torch.manual_seed(1)
    alone = nn.BatchNorm2d(5).to(dtype).train()
    shared = copy.deepcopy(alone)
    share_statistics(shared)
    x, tile = torch.randn(4, 5, 3, 3, dtype=dtype), torch.full((1, 5, 3, 3), 9.0, dtype=dtype)
    if dist.get_rank():
        with unmoved_statistics(shared):
            given = tile.clone().requires_grad_()
            y = shared(given)
            (0.0 * y).sum().backward()
        alone(x)
        found = {"finite": bool(y.isfinite().all()), "gradient": given.grad.abs().max().item()}
    else:
        found = dict(zip(("output", "gradient"), ((a - b).abs().max().item() for a, b in zip(passes_once(alone, x), passes_once(shared, x),
                                                                                              strict=True)), strict=True))  # fmt: skip
    found["running"] = max((a.double() - b.double()).abs().max().item() for a, b in zip(alone.buffers(), shared.buffers(), strict=True))
    before = [buffer.clone() for buffer in shared.buffers()]
    with unmoved_statistics(shared):
        y = shared(tile)
        y.sum().backward()
    found["blank everywhere"] = y.isfinite().all().item() and all(torch.equal(a, b) for a, b in zip(before, shared.buffers(), strict=True))
    return found


def passes_once(module: nn.Module, given: torch.Tensor) -> list[torch.Tensor]:
    x = given.clone().requires_grad_()
    y = module(x)
    (y * y.detach().sin()).sum().backward()
    return [y.detach(), x.grad]


def main(out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    result = {}
    shapes = {"tiles": (7, 5, 4, 6), "rows": (7, 5)}
    given = {name: torch.randn(shape, dtype=torch.float64) * 3 + 2 for name, shape in shapes.items()}
    for name, make in LAYERS.items():
        wanted = torch.randn(shapes["tiles"], dtype=torch.float64)
        result[name] = distance(make().double(), given["tiles"], wanted)
        result[f"{name}, channels last"] = distance(make().double(), given["tiles"].to(memory_format=torch.channels_last), wanted)
    result["rows"] = distance(nn.BatchNorm1d(5).double(), given["rows"], torch.randn(shapes["rows"], dtype=torch.float64))
    encoder = build_vision_encoder("timm:resnet10t", image_size=32, output_stride=8).double()
    wanted = torch.randn(7, 16, encoder.hidden_size, dtype=torch.float64)
    result["encoder"] = distance(encoder, torch.randn(7, 3, 32, 32, dtype=torch.float64), wanted)
    float32 = [tensor.float() for tensor in (given["tiles"], torch.randn(shapes["tiles"]))]
    result["float32"] = distance(nn.BatchNorm2d(5), *float32)
    half, x = nn.BatchNorm2d(5).bfloat16(), float32[0].bfloat16()  # the same on both ranks: together as each alone
    share_statistics(half)
    y = half(x)
    error = (y.float() - nn.functional.batch_norm(x.float(), None, None, training=True)).abs().max().item()
    result["bfloat16"] = [str(y.dtype), str(half.running_mean.dtype), error]
    own = nn.BatchNorm2d(5, track_running_stats=False).bfloat16()
    share_statistics(own)
    result["eval"] = all(layer.eval()(x).isfinite().all().item() for layer in (half, own) if dist.get_rank())  # no collective
    result["blank"] = blank(torch.float64)
    of_ranks = [None, None]
    dist.all_gather_object(of_ranks, result)
    if dist.get_rank() == 0:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(of_ranks, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
