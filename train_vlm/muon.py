"""Muon for matrices, AdamW for the rest: a small model from scratch needs under half of the steps (docs/decisions.md).

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a weight matrix by the nearest matrix with all
singular values alike, found by a few Newton-Schulz iterations; the step is scaled so that its root mean square is that of an AdamW step
(Liu et al. 2025, arXiv 2502.16982, section 2.2), and rates carry over.

Ours, because torch's and DeepSpeed's iterate in bfloat16: on a processor without bfloat16 units that took 101 ms for a 128 x 616 matrix,
float32 takes 8 ms; and both leave convolutions out. It needs whole matrices, so it runs with ZeRO stage 0 only.
"""

import torch
from torch import Tensor, nn

from vision_encoders.gathering import gather_over_ranks

__all__ = ["MuonAdamW", "is_muon_matrix", "orthogonalize", "share_out"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic, steepest at zero
UNSUITED = ("embeddings", "lm_head", "conv1d")  # rows are words, or one filter a channel: not maps between spaces


def is_muon_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a weight matrix (or a convolution, as a matrix of its outputs) that Muon updates."""
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) > 8 and not any(word in name for word in UNSUITED)


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """(m, n) -> (m, n) float32, about U V^T of the singular value decomposition U S V^T: singular values between 0.7 and 1.2."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).float()
    x = x / (x.norm() + 1e-7)
    within, directly = _products(*x.shape, iterations)
    x = (_iterate_within_gram if within < directly else _iterate)(x, iterations)
    return x.T if is_tall else x


def _iterate(x: Tensor, iterations: int) -> Tensor:
    """The definition: x <- (a + b g + c g^2) x, where g = x x^T."""
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def _iterate_within_gram(x: Tensor, iterations: int) -> Tensor:
    """The same without touching x in between: every iteration multiplies x by a polynomial p of its own g from the left, and turns g into
    p g p. All of them are (m, m), and their product meets x once at the end."""
    a, b, c = COEFFICIENTS
    gram, factor = x @ x.T, None
    for left in reversed(range(iterations)):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        factor = polynomial if factor is None else polynomial @ factor
        if left:
            gram = polynomial @ gram @ polynomial
    return factor @ x


def _products(rows: int, columns: int, iterations: int = 5) -> tuple[int, int]:
    """Multiplications of all iterations on a wide matrix: within its Gram matrix, and directly."""
    square, wide = rows**3, rows**2 * columns
    return 2 * wide + (4 * iterations - 3) * square, iterations * (2 * wide + square)


def _cost(matrix: Tensor) -> int:
    """Multiplications that an update takes."""
    return min(_products(*sorted((matrix.shape[0], matrix[0].numel()))))


def share_out(costs: list[int], ranks: int) -> list[int]:
    """The rank of each piece of work, so that the ranks finish together: the dearest first, each to the rank with the least so far."""
    loads, owners = [0] * ranks, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owners[number] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[number]] += costs[number]
    return owners


class MuonAdamW(torch.optim.Optimizer):
    """Parameter groups with `"kind": "muon"` (keys lr, weight_decay) are updated by Muon, the others by torch's AdamW."""

    def __init__(self, groups: list[dict], *, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, momentum: float = 0.95):
        matrices = [group for group in groups if group.get("kind") == "muon"]
        others = [group for group in groups if group.get("kind") != "muon"]
        super().__init__(matrices or [{"params": [], "kind": "muon"}], {"lr": 1e-3, "weight_decay": 0.0, "momentum": momentum})
        # The same dictionaries are groups of both, so that a rate set on this optimizer reaches AdamW too.
        self._adamw = torch.optim.AdamW(others, betas=betas, eps=eps, foreach=True) if others else None
        if self._adamw is not None:
            self.param_groups += self._adamw.param_groups
            self._adamw.state = self.state  # one table of states: what is saved and loaded is the whole optimizer

    def __setstate__(self, state: dict) -> None:
        """Called by load_state_dict with new tables: AdamW must go on with these, not with its own."""
        super().__setstate__(state)
        if getattr(self, "_adamw", None) is not None:
            self._adamw.param_groups = [group for group in self.param_groups if group.get("kind") != "muon"]
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_matrices()
        if self._adamw is not None:
            self._adamw.step()
        return loss

    def _step_matrices(self) -> None:
        """Each rank makes the updates of its share of the matrices and hears the others'."""
        pairs = [(group, p) for group in self.param_groups if group.get("kind") == "muon" for p in group["params"] if p.grad is not None]
        if not pairs:
            return
        is_shared = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_shared else (0, 1)
        owners = share_out([_cost(parameter) for _, parameter in pairs], ranks)
        made = []
        for owner, (group, parameter) in zip(owners, pairs, strict=True):
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
            gradient = parameter.grad.float()
            state["momentum"].lerp_(gradient, 1.0 - group["momentum"])
            if owner == rank:
                nesterov = gradient.lerp(state["momentum"], group["momentum"])
                made.append(orthogonalize(nesterov.flatten(1)).flatten())
        for (group, parameter), update in zip(pairs, _told(made, owners, [p for _, p in pairs], rank, ranks), strict=True):
            scale = 0.2 * max(parameter.shape[0], parameter[0].numel()) ** 0.5
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
            parameter.add_(update.view_as(parameter).to(parameter.dtype), alpha=-group["lr"] * scale)


def _told(made: list[Tensor], owners: list[int], parameters: list[Tensor], rank: int, ranks: int) -> list[Tensor]:
    """The updates that this rank made -> all of them, in order, on every rank. One message a rank, all of one length."""
    if ranks == 1:
        return made
    sizes = [[p.numel() for p, owner in zip(parameters, owners, strict=True) if owner == each] for each in range(ranks)]
    unused = torch.zeros(max(map(sum, sizes)) - sum(sizes[rank]), dtype=torch.float32, device=parameters[0].device)
    messages = gather_over_ranks(torch.cat([*made, unused]))
    updates = [iter(message[: sum(own)].split(own)) for message, own in zip(messages, sizes, strict=True)]
    return [next(updates[owner]) for owner in owners]
