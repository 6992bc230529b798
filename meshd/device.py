"""What all sessions of one daemon share: its static key, randomness, timestamps and the table of indices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from crossedge.meshd.constants import INDICES_MAX
from crossedge.meshd.noise import PrivateKey

if TYPE_CHECKING:
    from crossedge.meshd.keypair import Keypair
    from crossedge.meshd.session import Session


class Device:
    """One static key with its sessions' indices.

    `indices` maps the receiver index of transport data and superframes to (session, keypair); the data plane
    reads it, only sessions write it. `waiting` maps the index of an initiation that was not answered yet.
    Each session has at most one of the latter and three of the former. `dropped` counts by reason.
    """

    __slots__ = ("dropped", "indices", "random", "static", "timestamp", "waiting")

    def __init__(
        self,
        static: PrivateKey,
        random: Callable[[int], bytes],
        timestamp: Callable[[float], bytes],
    ) -> None:
        """Take the key, a source of random bytes, and `timestamp(now)`: strictly growing TAI64N labels."""
        self.static = static
        self.random = random
        self.timestamp = timestamp
        self.indices: dict[int, tuple[Session, Keypair]] = {}
        self.waiting: dict[int, Session] = {}
        self.dropped: Counter[str] = Counter()

    def new_index(self) -> int | None:
        """Return a random index that nobody uses, or None (counted) where there are too many already."""
        if len(self.indices) + len(self.waiting) >= INDICES_MAX:
            self.dropped["no-index"] += 1
            return None
        while True:
            index = int.from_bytes(self.random(4), "little")
            if index not in self.indices and index not in self.waiting:
                return index
