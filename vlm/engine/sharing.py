"""Which prefixes of a set of prompts are computed once: a tree whose inner nodes are shared prefixes and whose leaves are the prompts.

Thirty questions about one picture are one node (the picture) and thirty short leaves. The same rule finds a shared system text, a shared
document, or a shared conversation; nobody has to say what is shared.
"""

from dataclasses import dataclass

import numpy as np

__all__ = ["LEAST_SHARED_TOKENS", "Piece", "common_length", "plan_pieces"]

LEAST_SHARED_TOKENS = 16  # a shorter prefix costs more as a call of its own than it saves


@dataclass(frozen=True)
class Piece:
    """Tokens `start` to `end` of prompt `owner`, computed after its `parent` piece (index into the plan; None: after what is kept).

    members: prompts that contain it. depth: 0 for a piece without parent. A leaf ends where its prompt ends and has that one member.
    """

    owner: int
    start: int
    end: int
    parent: int | None
    depth: int
    members: tuple[int, ...]
    is_leaf: bool


def common_length(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the common prefix of two identities."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    place = int(different.argmax()) if length else 0
    return place if length and different[place] else length


def plan_pieces(identities: list[np.ndarray], starts: list[int], cuts: list[tuple[int, ...]] | None = None) -> list[Piece]:
    """Pieces in an order in which parents come first; each prompt has exactly one leaf, of at least one token.

    identities: of the prompts; starts: tokens of each whose state is kept already. cuts: lengths at which a prompt's prefix is wanted as
    a piece of its own, even if nobody shares it.
    """
    cuts = cuts or [()] * len(identities)
    pieces: list[Piece] = []

    def add(owner: int, start: int, end: int, parent: int | None, members: list[int], is_leaf: bool) -> int:
        depth = 0 if parent is None else pieces[parent].depth + 1
        pieces.append(Piece(owner, start, end, parent, depth, tuple(members), is_leaf))
        return len(pieces) - 1

    def divide(members: list[int], start: int, parent: int | None, looked: int) -> None:
        """members share their first `looked` tokens; what stands before `start` is computed."""
        owner = members[0]
        limit = min(len(identities[member]) for member in members) - 1  # a leaf needs a token
        common = min([limit, *(common_length(identities[owner], identities[member]) for member in members[1:])])
        wanted = {cut for member in members for cut in cuts[member] if start < cut <= common}
        if len(members) > 1 and common - start >= LEAST_SHARED_TOKENS:
            wanted.add(common)
        for end in sorted(wanted):
            parent = add(owner, start, end, parent, members, False)
            start = end
        if len(members) == 1:
            add(owner, start, len(identities[owner]), parent, members, True)
            return
        branches: dict[int, list[int]] = {}
        for member in members:
            branches.setdefault(int(identities[member][common]), []).append(member)
        for branch in branches.values():
            if len(branch) == len(members) and common <= looked:  # equal to their last token: nothing more to share
                for member in branch:
                    add(member, start, len(identities[member]), parent, [member], True)
            else:
                divide(branch, start, parent, common)

    if identities:
        for start in sorted(set(starts)):
            divide([index for index, found in enumerate(starts) if found == start], start, None, -1)
    return pieces
