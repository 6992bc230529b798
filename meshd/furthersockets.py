"""Numbers for the sockets that later tries of a punch open beside the daemon's own.

The shell opens a numbered socket when something is first sent from it, and closes it when told that its
number was freed. A number is never given twice, so that what comes late to a closed socket is nobody's.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from crossedge.meshd.peer import MeshPeer

FIRST_NUMBER: Final = 1000  # below: the fresh sockets of a network check
SOCKETS_MAX: Final = 320  # open at a time: one spray, and some for other pairs


class FurtherSockets:
    """Who has which further socket."""

    __slots__ = ("_next", "_owners")

    def __init__(self) -> None:
        self._owners: dict[int, MeshPeer | None] = {}
        self._next = FIRST_NUMBER

    def __len__(self) -> int:
        return len(self._owners)

    def __contains__(self, number: object) -> bool:
        return number in self._owners

    def owner(self, number: int) -> MeshPeer | None:
        """Return the peer for whose sake a socket is open."""
        return self._owners.get(number)

    def take(self, peer: MeshPeer | None, count: int) -> tuple[int, ...]:
        """Return so many new numbers; none where not as many may be open. None: for no peer's sake."""
        if len(self._owners) + count > SOCKETS_MAX:
            return ()
        numbers = tuple(range(self._next, self._next + count))
        self._next += count
        self._owners.update(dict.fromkeys(numbers, peer))
        return numbers

    def free(self, peer: MeshPeer | None, kept: Collection[int]) -> tuple[int, ...]:
        """Forget all numbers of a peer but those that are kept; return which."""
        freed = tuple(n for n, owner in self._owners.items() if owner is peer and n not in kept)
        for number in freed:
            del self._owners[number]
        return freed
