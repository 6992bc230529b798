"""Pings that wait for their pong: which random number went to which endpoint of whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from crossedge.wire.endpoint import DirectEndpoint

CHALLENGES_MAX: Final = 2048
ANSWER_TIME: Final = 5.0  # seconds for which an answer counts (as Tailscale's)


class _Challenge(NamedTuple):
    node_id: bytes
    endpoint: DirectEndpoint | None
    at: float


class Challenges:
    """The table, the oldest forgotten first."""

    __slots__ = ("_random", "_table")

    def __init__(self, random: Callable[[int], bytes]) -> None:
        self._random = random
        self._table: dict[int, _Challenge] = {}

    def new(self, node_id: bytes, endpoint: DirectEndpoint | None, now: float) -> int:
        """Return the random number for a challenge to an endpoint of a node; None: to many at once."""
        if len(self._table) >= CHALLENGES_MAX:
            del self._table[next(iter(self._table))]
        number = int.from_bytes(self._random(8), "big")
        self._table[number] = _Challenge(node_id, endpoint, now)
        return number

    def met(self, number: int, node_id: bytes, now: float) -> tuple[bool, DirectEndpoint | None]:
        """Tell whether this number is outstanding with this node, and return the endpoint to which it went.

        It counts once and only in time. None: it went to many, so its answer says nothing of any of them.
        """
        challenge = self._table.get(number)
        if challenge is None or challenge.node_id != node_id:
            return False, None
        del self._table[number]
        return now - challenge.at < ANSWER_TIME, challenge.endpoint
