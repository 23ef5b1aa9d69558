"""States of prefixes read before, least recently used out first: how a conversation goes on without being read again.

A kept state is exact: it is found only by a prompt that starts with the very same tokens and pictures. It is never written to; whoever goes
on from it copies it.
"""

import hashlib
from collections import OrderedDict

import numpy as np

from ..decoder.slots import Slots

__all__ = ["KeptStates"]

MOST_SEEN = 4096  # prefixes remembered by digest alone


class KeptStates:
    """At most `most_bytes` of one-row states, by the identity of the prefix they have read."""

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self.bytes = 0
        self._states: OrderedDict[bytes, tuple[np.ndarray, Slots]] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    @staticmethod
    def _key(identity: bytes) -> bytes:
        return hashlib.blake2b(identity, digest_size=32).digest()

    def find(self, identity: np.ndarray) -> tuple[int, Slots] | None:
        """The longest kept prefix of a prompt that leaves at least one token to read: its length and its state."""
        best = None
        for key, (prefix, state) in self._states.items():
            length = len(prefix)
            if length < len(identity) and (best is None or length > best[0]) and identity[length - 1] == prefix[-1]:
                if np.array_equal(identity[:length], prefix):
                    best = length, state, key
        if best is None:
            return None
        self._states.move_to_end(best[2])
        return best[:2]

    def wants(self, size_bytes: int) -> bool:
        """Whether a state of that size would be kept."""
        return 0 < size_bytes <= self.most_bytes

    def keep(self, identity: np.ndarray, state: Slots) -> None:
        """`state`: one row that has read exactly this prefix; nobody may write to it afterwards."""
        size = state.size_bytes()
        if not len(identity) or not self.wants(size):
            return
        key = self._key(identity.tobytes())
        if key in self._states:
            self._states.move_to_end(key)
            return
        self._states[key] = identity.copy(), state
        self.bytes += size
        while self.bytes > self.most_bytes:
            _, (_, old) = self._states.popitem(last=False)
            self.bytes -= old.size_bytes()

    def seen_before(self, identity: bytes) -> bool:
        """Whether the prefix with this identity (its bytes) came up in an earlier call; it is noted for the next one."""
        key = self._key(identity)
        known = key in self._seen
        self._seen[key] = None
        self._seen.move_to_end(key)
        if len(self._seen) > MOST_SEEN:
            self._seen.popitem(last=False)
        return known

    def clear(self) -> None:
        """Forget everything, as after a change of the weights."""
        self._states.clear()
        self._seen.clear()
        self.bytes = 0
