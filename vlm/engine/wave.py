"""The requests that may be read together, and what that takes: counted one by one, for every request asks it and a queue may be long."""

from collections.abc import Iterable

from ..decoder.slots import Slots
from .sharing import LEAST_SHARED_TOKENS, common_length
from .text_scores import SCORES_A_CALL
from .ticket import Ticket

__all__ = ["Wave", "by_id", "shared_prefix_tokens"]


def shared_prefix_tokens(before: Ticket | None, ticket: Ticket) -> int:
    """Length of the prefix a ticket shares with the one before it; asked again for every ticket behind, so it is remembered."""
    if before is None:
        return 0
    if ticket.compared is None or ticket.compared[0] is not before:
        ticket.compared = before, common_length(before.prompt.identity, ticket.prompt.identity)
    return ticket.compared[1]


def by_id(states: Iterable[Slots]) -> dict[int, Slots]:
    """The different ones among them."""
    return {id(state): state for state in states}


class Wave:
    """tickets: in the order they were added. The counts only grow: a wave whose last ticket is taken out again is good for its tickets."""

    def __init__(self, tickets: Iterable[Ticket] = ()):
        self.tickets: list[Ticket] = []
        self.families = 0  # prefixes that are read once
        self.texts = 0  # to be scored
        self.longest_tokens = 0  # of a prompt
        self.begun: dict[int, Slots] = {}  # states of prompts that are read in part
        for ticket in tickets:
            self.add(ticket)

    def add(self, ticket: Ticket) -> None:
        before = self.tickets[-1] if self.tickets else None
        self.families += shared_prefix_tokens(before, ticket) < LEAST_SHARED_TOKENS
        self.texts += len(ticket.request.score_texts)
        self.longest_tokens = max(self.longest_tokens, len(ticket.prompt))
        self.tickets.append(ticket)
        if ticket.begun is not None:
            self.begun[id(ticket.begun.state)] = ticket.begun.state

    @property
    def forks(self) -> int:
        """Rows that scoring their texts takes at a time."""
        return min(SCORES_A_CALL, self.texts)
