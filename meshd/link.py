"""The way to one peer as the data path sees it: a session, one or two endpoints, a datagram size, a queue.

`Mesh` owns links and changes them; the data path reads them per batch and counts in them. What was taken from
the TUN before there is a session waits here, within bounds, the oldest dropped first.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, Protocol

from crossedge.meshd.constants import SUPERFRAME_OVERHEAD
from crossedge.meshd.growth import Growth
from crossedge.meshd.keypair import Keypair
from crossedge.meshd.virtio import GSO_TYPES
from crossedge.wire.endpoint import Endpoint, RelayEndpoint
from crossedge.wire.relay import HEADER as RELAY_HEADER

SAFE_DATAGRAM: Final = 1232  # UDP payload that passes a path of 1,280 bytes over IPv6
SMALLEST_DATAGRAM: Final = 512  # UDP payload below which no path is believed to be
LARGEST_DATAGRAM: Final = 65_000
QUEUE_FRAMES: Final = 256
QUEUE_BYTES: Final = 512 * 1024


class SessionPort(Protocol):
    """What the data path wants of a session; `session.Session` has it."""

    @property
    def current(self) -> Keypair | None:
        """The keypair to send with, if there is one; it says itself whether it still may be used."""

    def data_sent(self, now: float, size: int) -> None:
        """Follow a batch of sealed data: `size` plaintext bytes."""

    def data_received(self, now: float, size: int, keypair: Keypair) -> None:
        """Follow a batch of opened data: `size` plaintext bytes of packets, 0 where there was none.

        Keepalives and in-session messages are no packets. Comes before the in-session messages of the batch.
        """


@dataclass(slots=True)
class Traffic:
    """What passed in one direction: transport data and superframes."""

    datagrams: int = 0
    size: int = 0
    """Plaintext in bytes."""
    at: float = float("-inf")
    """`now` of the last batch, in seconds."""


class Link:
    """One peer of the data path."""

    __slots__ = (
        "_datagram_size",
        "_gso",
        "_largest_chunk",
        "agreed",
        "endpoints",
        "growth",
        "name",
        "overhead",
        "queue",
        "queued_bytes",
        "received",
        "room",
        "sent",
        "session",
        "sources",
        "stock",
    )

    def __init__(self, name: str, session: SessionPort, *, stock: bool = False) -> None:
        """Make a link without endpoints. `stock` is a plain WireGuard peer: no superframes, no hello.

        To a stock peer a packet that does not fit is answered with "too big"; to a meshd, which will take
        superframes as soon as both hellos are there, it waits in the queue.
        """
        self.name = name
        self.session = session
        self.stock = stock
        self.endpoints: tuple[Endpoint, ...] = ()
        self.sources: frozenset[Endpoint] = frozenset()
        """Endpoints from which pieces of records are kept until they are whole: those we send to, and those
        that the peer was heard from. Each end chooses its own way, so they need not be the same."""
        self.overhead = 0
        """Bytes of relay header in each datagram."""
        self._datagram_size = SAFE_DATAGRAM
        self.agreed: Keypair | None = None
        """The keypair under which the peer takes superframes."""
        self._gso = GSO_TYPES
        self._largest_chunk = LARGEST_DATAGRAM
        self.room = SAFE_DATAGRAM - SUPERFRAME_OVERHEAD
        """How much plaintext, in bytes, a record of one datagram has room for."""
        self.growth = Growth()
        """How long records may be."""
        self.queue: deque[bytes] = deque()
        """Frames (virtio header and packet) that wait for a session, an endpoint or the hello."""
        self.queued_bytes = 0
        self.sent = Traffic()
        self.received = Traffic()

    @property
    def datagram_size(self) -> int:
        """UDP payload that we may fill, in bytes, a relay's header not counted."""
        return self._datagram_size

    @datagram_size.setter
    def datagram_size(self, size: int) -> None:
        self._datagram_size = size
        self._measure()

    @property
    def largest_chunk(self) -> int:
        """The longest superframe datagram that the peer takes, in bytes."""
        return self._largest_chunk

    @largest_chunk.setter
    def largest_chunk(self, size: int) -> None:
        self._largest_chunk = size
        self._measure()

    @property
    def gso(self) -> frozenset[int]:
        """Types of super-packets that the peer can write."""
        return self._gso

    @gso.setter
    def gso(self, types: frozenset[int]) -> None:
        self._gso = types
        self._measure()

    def _measure(self) -> None:
        self.room = min(self._datagram_size, self._largest_chunk) - SUPERFRAME_OVERHEAD
        self.growth.changed()

    @property
    def superframes(self) -> bool:
        """Whether what is sent now goes as superframes."""
        return self.agreed is not None and self.agreed is self.session.current

    def set_path(self, endpoints: tuple[Endpoint, ...], datagram_size: int = SAFE_DATAGRAM) -> None:
        """Send to these endpoints from now on: none, one, or two while in doubt (both get the same bytes).

        `datagram_size` is the largest UDP payload that passes to all of them, a relay's header included.
        """
        relayed = any(isinstance(endpoint, RelayEndpoint) for endpoint in endpoints)
        self.overhead = RELAY_HEADER if relayed else 0
        if endpoints != self.endpoints:
            self.growth.restart()
        self.endpoints = endpoints
        self.sources = frozenset(endpoints)
        self.datagram_size = max(SMALLEST_DATAGRAM, min(datagram_size, LARGEST_DATAGRAM)) - self.overhead

    def allow_superframes(self, keypair: Keypair, gso: frozenset[int], largest_chunk: int) -> None:
        """Send superframes under `keypair`, whose superframe keys both sides have, as its hellos said."""
        self.agreed = keypair
        self.gso = gso & GSO_TYPES
        self.largest_chunk = max(SMALLEST_DATAGRAM, largest_chunk)

    def hold(self, frame: bytes) -> int:
        """Queue one frame and return how many older ones were dropped for it."""
        self.queue.append(frame)
        self.queued_bytes += len(frame)
        dropped = 0
        while len(self.queue) > QUEUE_FRAMES or self.queued_bytes > QUEUE_BYTES:
            self.queued_bytes -= len(self.queue.popleft())
            dropped += 1
        return dropped

    def take_queue(self) -> list[bytes]:
        """Empty the queue and return its frames, oldest first."""
        frames = list(self.queue)
        self.queue.clear()
        self.queued_bytes = 0
        return frames
