"""Choose the next token of every running row: greedy for all at once, drawn ones each with their own generator."""

import torch
from torch import Tensor

__all__ = ["choose_tokens", "draw_token"]


def draw_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from logits (vocabulary,) of any device. The draw is made on the CPU in float64 from this row alone, so that it depends on
    the seed and not on batch mates or the device."""
    probabilities = ((logits - logits.max()).cpu().double() / temperature).softmax(-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
    return int(torch.multinomial(probabilities / probabilities.sum(), 1, generator=generator))


def choose_tokens(logits: Tensor, tickets: list) -> list[int | None]:
    """logits (R, vocabulary) -> a token for each ticket; None where the logits are no numbers."""
    best, tokens = logits.max(-1)
    tokens, finite = tokens.tolist(), best.isfinite().tolist()
    for place, ticket in enumerate(tickets):
        if not finite[place]:
            tokens[place] = None
        elif ticket.generator is not None:
            tokens[place] = draw_token(logits[place], ticket.request.temperature, ticket.request.top_p, ticket.generator)
    return tokens
