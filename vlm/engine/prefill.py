"""Read the prompts of newly admitted requests: shared prefixes once, everything packed, each request's state forked into its row. A long
prompt is begun before, a part a step.

Steps: plan the pieces; encode each distinct tile once; read the pieces level by level, one packed call a level; keep the prefixes that may
come again; the leaves go straight into the rows of the running batch.
"""

import numpy as np
import torch
from torch import Tensor

from ..decoder.serving import ServingDecoder
from ..decoder.slots import Common, Slots
from ..modeling import VisionLanguageModel
from ..processing import VLMProcessor
from .kept_states import KeptStates
from .memory import StateCost, rounded_span
from .prompt import Prompt
from .sharing import Piece, common_length, plan_pieces
from .text_scores import score_texts
from .ticket import Begun, Ticket
from .tile_encoding import TileEncoder, keys_within

__all__ = ["Prefill"]

LEAST_FAMILY = 4  # questions about one picture whose SSM states are not copied for each
TOKENS_A_CALL = {"cpu": 2048, "cuda": 32768}  # packed together: bounds the activations, and on a CPU keeps them near


def _whole(index: int, ticket: Ticket, found: tuple[int, Slots] | None) -> Piece:
    """A prompt that shares nothing but what is kept."""
    return Piece(index, found[0] if found else 0, len(ticket.prompt), None, 0, (index,), True)


class Prefill:
    """Reads prompts with one model; `kept` is looked up and filled."""

    def __init__(self, model: VisionLanguageModel, processor: VLMProcessor, decoder: ServingDecoder, kept: KeptStates):
        self.model, self.processor, self.decoder, self.kept = model, processor, decoder, kept
        self.image_token_id = model.config.image_token_id
        self._tiles = TileEncoder(model, processor, decoder.packed)
        self.cost = StateCost.of(decoder.language_model.config, decoder.weight.dtype)

    @property
    def device(self) -> torch.device:
        return self.decoder.weight.device

    def plan(self, tickets: list[Ticket]) -> tuple[list[Piece], list[tuple[int, Slots] | None]]:
        """The pieces to read, and for each ticket the kept state it goes on from."""
        found = [self._found(ticket, tickets) for ticket in tickets]
        # A prefix is worth a piece of its own when the caller says it goes on, or when it came up in an earlier call.
        prefixes = {ticket.prompt.identity[:cut].tobytes() for ticket in tickets for cut in ticket.prompt.cuts}
        again = {prefix for prefix in prefixes if self.kept.seen_before(prefix)}
        cuts = [
            tuple(cut for cut in ticket.prompt.cuts if ticket.keep or ticket.prompt.identity[:cut].tobytes() in again) for ticket in tickets
        ]
        starts = [0 if state is None else state[0] for state in found]
        return plan_pieces([ticket.prompt.identity for ticket in tickets], starts, cuts), found

    def _found(self, ticket: Ticket, tickets: list[Ticket]) -> tuple[int, Slots] | None:
        """The longest prefix that is read: kept, or begun by one of `tickets`."""
        identity, best = ticket.prompt.identity, self.kept.find(ticket.prompt.identity)
        for other in tickets:
            begun = other.begun
            if begun is None or begun.length >= len(identity) or (best is not None and best[0] >= begun.length):
                continue
            if other is ticket or np.array_equal(identity[: begun.length], other.prompt.identity[: begun.length]):
                best = begun.length, begun.state
        return best

    def unread(self, ticket: Ticket) -> int:
        """Tokens of its prompt that are still to be read."""
        begun = 0 if ticket.begun is None else ticket.begun.length
        kept = self.kept.find(ticket.prompt.identity)
        return len(ticket.prompt) - max(begun, 0 if kept is None else kept[0])

    @torch.inference_mode()
    def read_on(self, ticket: Ticket, most_tokens: int, left: int) -> None:
        """Read the next `most_tokens` of a long prompt, or fewer: a part ends where a prefix is to be kept, and between two tiles. The last
        `left` tokens are for `read`, which goes on from there."""
        prompt = ticket.prompt
        if ticket.begun is None:
            pieces, (found,) = self.plan([ticket])
            state = self.decoder.slots(1, rounded_span(len(prompt)))
            if found is None:
                state.clear([0])
            else:
                state.fork(found[1], [0], [0])
            length = 0 if found is None else found[0]
            ticket.begun = Begun(state, length, tuple(piece.end for piece in pieces if not piece.is_leaf), length)
        begun = ticket.begun
        end = min([begun.length + most_tokens, len(prompt) - left, *(cut for cut in begun.wanted if cut > begun.length)])
        piece = Piece(0, begun.length, self._between_tiles(prompt, begun.length, end), None, 0, (0,), False)
        self._read_together([(piece, 0)], [ticket], self._tiles.encode([ticket], [piece]), begun.state, {})
        begun.length = piece.end
        if piece.end in begun.wanted:
            self.keep(prompt.identity[: piece.end], begun.state, 0)

    def keep_begun(self, ticket: Ticket, following: Ticket) -> None:
        """Keep what a long prompt has begun, which nobody writes to any more, when one that has to wait begins with it too."""
        prefix = ticket.prompt.identity[: ticket.begun.length]
        if common_length(prefix, following.prompt.identity) == len(prefix):
            self.kept.keep(prefix, ticket.begun.state)

    def _between_tiles(self, prompt: Prompt, start: int, end: int) -> int:
        """`end`, or the border of the tile it would cut: the one in front, where that is behind `start`. No prompt ends with a tile."""
        place = int(prompt.tile_starts.searchsorted(end)) - 1
        first = int(prompt.tile_starts[place]) if place >= 0 else end
        behind = first + self.processor.visual_tokens_per_tile
        if not first < end < behind:
            return end
        return first if first > start else behind

    @torch.inference_mode()
    def read(self, tickets: list[Ticket], slots: Slots, rows: list[int], most_bytes: int) -> Tensor:
        """Fill `rows` of `slots` with the tickets' prompts -> logits (tickets, vocabulary) of their first token; sets their scores.

        most_bytes: for the states of shared prefixes meanwhile; when they need more, each prompt is read for itself."""
        pieces, found = self.plan(tickets)
        inner = [index for index, piece in enumerate(pieces) if not piece.is_leaf]
        span = rounded_span(max((pieces[index].end for index in inner), default=0))
        if self.cost.bytes(len(inner), span) > most_bytes:
            pieces, inner = [_whole(index, ticket, found[index]) for index, ticket in enumerate(tickets)], []
        visual = self._tiles.encode(tickets, pieces)
        places = {index: place for place, index in enumerate(inner)}
        nodes = self.decoder.slots(len(inner), span) if inner else None
        for depth in range(max((pieces[index].depth for index in inner), default=-1) + 1):
            level = [index for index in inner if pieces[index].depth == depth]
            targets = [places[index] for index in level]
            self._read_pieces([pieces[index] for index in level], tickets, found, visual, nodes, nodes, targets, places)
            for index, place in zip(level, targets, strict=True):
                self.keep(tickets[pieces[index].owner].prompt.identity[: pieces[index].end], nodes, place)
        leaves = sorted((piece for piece in pieces if piece.is_leaf), key=lambda piece: piece.owner)
        last = self._read_pieces(leaves, tickets, found, visual, nodes, slots, rows, places)
        for piece, ticket in zip(leaves, tickets, strict=True):
            if ticket.begun is not None:
                ticket.shared_tokens = ticket.begun.shared
            else:
                ticket.shared_tokens = 0 if found[piece.owner] is None else found[piece.owner][0]
            parent = piece.parent
            while parent is not None:  # a prefix read for several counts as shared for all but its owner
                if pieces[parent].owner != piece.owner:
                    ticket.shared_tokens += pieces[parent].end - pieces[parent].start
                parent = pieces[parent].parent
        if nodes is not None:
            nodes.common = [None] * nodes.rows  # those who go on from these rows need not hold what these went on from
        logits = self.mask(self.decoder.logits(last))
        score_texts(tickets, logits, slots, rows, model=self.model, processor=self.processor, decoder=self.decoder, mask=self.mask)
        return logits

    def mask(self, logits: Tensor) -> Tensor:
        """A placeholder said would need a tile; it never is."""
        logits[:, self.image_token_id] = float("-inf")
        return logits

    def _read_pieces(self, pieces, tickets, found, visual, nodes, slots, rows, places) -> Tensor:
        """Read pieces whose parents are read, a few packed calls -> hidden state of the last token of each, (pieces, D)."""
        # 1. Every row starts from a copy of its parent's state, or from nothing; where many go on from one picture its SSM states are not
        #    copied but read where they stand.
        common = self._fork(pieces, found, nodes, slots, rows, places)
        # 2. As many pieces a call as stay together below the limit.
        most = TOKENS_A_CALL["cuda" if self.device.type == "cuda" else "cpu"]
        calls: list[list[tuple[Piece, int]]] = []
        tokens = 0
        for piece, row in zip(pieces, rows, strict=True):
            length = piece.end - piece.start
            if not calls or tokens + length > most:
                calls.append([])
                tokens = 0
            calls[-1].append((piece, row))
            tokens += length
        return torch.cat([self._read_together(call, tickets, visual, slots, common) for call in calls])

    def _fork(self, pieces, found, nodes, slots: Slots, rows, places) -> dict[int, Common]:
        """Make every row ready to read on -> for rows whose SSM states were left where they are, where that is."""
        common: dict[int, Common] = {}
        forked: set[int] = set()
        for source, origins, targets in self._origins(pieces, found, nodes, rows, places):
            families: dict[int, list[int]] = {}
            for origin, target in zip(origins, targets, strict=True):
                families.setdefault(origin, []).append(target)
            shared = {
                origin: Common(source, origin, source.counts[origin]) if source is not slots and len(family) > 1 else None
                for origin, family in families.items()
            }
            # Scan and attention of each such family are calls of their own, which a processor makes sooner than a copy of the state.
            least = min(LEAST_FAMILY, len(rows)) if self.device.type == "cpu" else len(rows)
            left = {origin for origin, family in families.items() if shared[origin] is not None and len(family) >= least}
            for with_ssm in (False, True):
                pairs = [(origin, row) for origin, family in families.items() if (origin not in left) == with_ssm for row in family]
                slots.fork(source, [origin for origin, _ in pairs], [row for _, row in pairs], with_ssm=with_ssm)
            for origin, family in families.items():
                for row in family:
                    slots.common[row] = shared[origin]
                    if origin in left:
                        common[row] = shared[origin]
            forked.update(targets)
        slots.clear([row for row in rows if row not in forked])
        return common

    def _read_together(self, call: list[tuple[Piece, int]], tickets, visual, slots: Slots, common: dict[int, Common]) -> Tensor:
        """Words and visual tokens, packed in the same order."""
        pieces = [piece for piece, _ in call]
        ids = [token for piece in pieces for token in tickets[piece.owner].prompt.ids[piece.start : piece.end]]
        shown = visual.of([key for piece in pieces for key in keys_within(tickets[piece.owner].prompt, piece)])
        embeddings = self.model.embed(torch.tensor([ids], device=self.device), visual_tokens=shown)[0]
        lengths = [piece.end - piece.start for piece in pieces]
        rows = [row for _, row in call]
        return self.decoder.prefill(embeddings, slots, rows, lengths, last_only=True, commons=[common.get(row) for row in rows])

    @staticmethod
    def _origins(pieces, found, nodes, rows, places):
        """(source, its rows, our rows) for each source that the pieces go on from."""
        by_source: dict[int, tuple[Slots, list[int], list[int]]] = {}
        for piece, row in zip(pieces, rows, strict=True):
            if piece.parent is not None:
                source, origin = nodes, places[piece.parent]
            elif found[piece.owner] is not None:
                source, origin = found[piece.owner][1], 0
            else:
                continue
            _, origins, targets = by_source.setdefault(id(source), (source, [], []))
            origins.append(origin)
            targets.append(row)
        return by_source.values()

    def keep(self, identity: np.ndarray, source: Slots, row: int) -> None:
        """Keep a copy of a row that has read the prefix with this identity. Where there is no memory for it, what was kept is given back
        instead: it is for speed alone, and no answer may be lost by it."""
        if not self.kept.most_bytes:
            return
        try:
            state = self.decoder.slots(1, len(identity))
            if self.kept.wants(state.size_bytes()):
                state.fork(source, [row], [0])
                self.kept.keep(identity, state)
        except (MemoryError, RuntimeError):  # torch's lack of memory is a RuntimeError
            self.kept.clear()
