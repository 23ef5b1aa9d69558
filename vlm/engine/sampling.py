"""Choose the next token of every running row: the likeliest for greedy ones, a draw with its own generator for each of the others.

A draw is one number of the row's generator, on the CPU, looked up in the row's cumulated probabilities in float64, on the model's device:
it depends on the seed and the row's logits alone, and 128 rows over 131,072 words are not carried to the host at every step.

Letters: R rows, V vocabulary, K most probable tokens.
"""

import torch
from torch import Tensor

from .request import TokenLogprobs

__all__ = ["choose_tokens", "draw_tokens", "told_logprobs"]

ROWS_TOLD_TOGETHER = 8  # of log-probabilities: a megabyte a row, of 131,072 words
MOST_PROBABLE = 1024
"""Tokens among which the `top_p` ones are looked for before all of a row is sorted."""


def _look_up(shares: Tensor, uniform: Tensor) -> Tensor:
    """shares (R, K) >= 0, uniform (R,) in [0, 1) -> (R,) places drawn by these shares; never one without any."""
    cumulated = shares.cumsum(-1)
    total = cumulated[:, -1:].contiguous()
    place = torch.searchsorted(cumulated, uniform[:, None] * total, right=True)
    # Rounded up to the total itself, the last place with a share.
    return torch.minimum(place, torch.searchsorted(cumulated, total)).squeeze(-1)


def _nucleus(ordered: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities in falling order (R, K), without those behind the first that together reach top_p (R,)."""
    return ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p[:, None], 0.0)


def draw_tokens(logits: Tensor, temperatures: list[float], top_p: list[float], generators: list[torch.Generator]) -> list[int]:
    """logits (R, V) of any device, finite or -inf -> a token for each row, drawn from the `top_p` most probable share."""
    device = logits.device
    wide = (logits - logits.max(-1, keepdim=True).values).double()
    probabilities = (wide / torch.tensor(temperatures, dtype=torch.float64, device=device)[:, None]).softmax(-1)
    uniform = torch.stack([torch.rand((), dtype=torch.float64, generator=generator) for generator in generators]).to(device)
    wanted = torch.tensor(top_p, dtype=torch.float64, device=device)
    # Which way a row goes is its own affair, so that its draw does not depend on batch mates.
    drawn = [row for row, share in enumerate(top_p) if share < 1.0]
    tokens = torch.empty(len(logits), dtype=torch.long, device=device)
    if len(drawn) < len(logits):
        whole = torch.tensor([row for row, share in enumerate(top_p) if share >= 1.0], device=device)
        tokens[whole] = _look_up(probabilities[whole], uniform[whole])
    if drawn:
        rows = torch.tensor(drawn, device=device)
        most, order = probabilities[rows].topk(min(MOST_PROBABLE, logits.shape[-1]))
        is_enough = most.sum(-1) >= wanted[rows]
        for some, given in ((rows[is_enough], (most[is_enough], order[is_enough])), (rows[~is_enough], None)):
            if len(some):
                ordered, order = given or probabilities[some].sort(descending=True)
                tokens[some] = order.gather(1, _look_up(_nucleus(ordered, wanted[some]), uniform[some])[:, None]).squeeze(1)
    return tokens.tolist()


def choose_tokens(logits: Tensor, tickets: list) -> list[int | None]:
    """logits (R, V) -> a token for each ticket; None where the logits are no numbers."""
    best, tokens = logits.max(-1)
    tokens, finite = tokens.tolist(), best.isfinite().tolist()
    drawn = [row for row, ticket in enumerate(tickets) if finite[row] and ticket.generator is not None]
    if drawn:
        requests = [tickets[row].request for row in drawn]
        some = logits if len(drawn) == len(logits) else logits.index_select(0, torch.tensor(drawn, device=logits.device))
        found = draw_tokens(
            some,
            [request.temperature for request in requests],
            [request.top_p for request in requests],
            [tickets[row].generator for row in drawn],
        )
        for row, token in zip(drawn, found, strict=True):
            tokens[row] = token
    return [token if fine else None for token, fine in zip(tokens, finite, strict=True)]


def told_logprobs(logits: Tensor, tokens: list[int | None], tickets: list) -> list[TokenLogprobs | None]:
    """logits (R, V), the tokens chosen from them, and whose they are -> what a ticket that asks is told of its token, None for others."""
    told: list[TokenLogprobs | None] = [None] * len(tickets)
    asking = [row for row, ticket in enumerate(tickets) if tokens[row] is not None and ticket.request.logprobs is not None]
    for start in range(0, len(asking), ROWS_TOLD_TOGETHER):
        rows = asking[start : start + ROWS_TOLD_TOGETHER]
        scores = logits[torch.tensor(rows, device=logits.device)].double().log_softmax(-1)
        own = scores.gather(1, torch.tensor([[tokens[row]] for row in rows], device=logits.device)).squeeze(1).tolist()
        most = min(max(tickets[row].request.logprobs for row in rows), logits.shape[-1])
        best, order = (part.tolist() for part in scores.topk(most))
        for place, row in enumerate(rows):
            top = list(zip(order[place], best[place], strict=True))
            # Of equals, which there are many in half precision, topk may take others first than the choice did.
            if top and top[0][1] == own[place] and top[0][0] != tokens[row]:
                top = [(tokens[row], own[place]), *((token, score) for token, score in top if token != tokens[row])]
            told[row] = TokenLogprobs(tokens[row], own[place], tuple(top[: tickets[row].request.logprobs]))
    return told
