"""How probable given texts are as (the start of) an answer, for requests that ask: VizWiz's "unanswerable", multiple choice."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..decoder.serving import ServingDecoder
from ..decoder.slots import Slots
from ..modeling import VisionLanguageModel
from ..processing import VLMProcessor
from .ticket import Ticket

__all__ = ["SCORES_A_CALL", "score_texts"]

SCORES_A_CALL = 16


def score_texts(
    tickets: list[Ticket],
    logits: Tensor,
    slots: Slots,
    rows: list[int],
    *,
    model: VisionLanguageModel,
    processor: VLMProcessor,
    decoder: ServingDecoder,
    mask: Callable[[Tensor], Tensor],
) -> None:
    """Sets `scores` of the tickets: log-probability of each text they want scored, behind the prompts that stand in their `rows`.

    logits (tickets, vocabulary): of the first token behind each prompt, masked. The first token of a text is in them; for the others its
    words are read on from a fork of the row. mask: what may not be said, off logits (R, vocabulary)."""
    wanted = []
    for place, ticket in enumerate(tickets):
        if ticket.request.score_texts:
            first = logits[place].double().log_softmax(-1)
            ticket.scores = {}
            for text in ticket.request.score_texts:
                tokens = processor.renderer.encode_plain(text)
                ticket.scores[text] = float(first[tokens[0]]) if tokens else 0.0
                if len(tokens) > 1:
                    wanted.append((place, text, tokens))
    device = logits.device
    for start in range(0, len(wanted), SCORES_A_CALL):
        some = wanted[start : start + SCORES_A_CALL]
        lengths = [len(tokens) - 1 for _, _, tokens in some]
        span = max(slots.counts[rows[place]] + length for (place, _, _), length in zip(some, lengths, strict=True))
        forks, places = decoder.slots(len(some), span), list(range(len(some)))
        forks.fork(slots, [rows[place] for place, _, _ in some], places)
        ids = [token for _, _, tokens in some for token in tokens[:-1]]
        hidden = decoder.prefill(model.embed(torch.tensor([ids], device=device))[0], forks, places, lengths)
        scores = mask(decoder.logits(hidden)).double().log_softmax(-1)
        then = torch.tensor([token for _, _, tokens in some for token in tokens[1:]], device=device)
        for (place, text, _), part in zip(some, scores.gather(1, then[:, None]).squeeze(1).split(lengths), strict=True):
            tickets[place].scores[text] += float(part.sum())
