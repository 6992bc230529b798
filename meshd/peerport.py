"""The two sides of a peer: what it needs of its mesh, and what the data path sees of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from crossedge.meshd.events import MeshEvent
from crossedge.meshd.hello import HelloExchange
from crossedge.meshd.inner import BlocklistAsk, BlocklistPart, Place
from crossedge.meshd.keypair import Keypair
from crossedge.meshd.punch import Shot, Volley
from crossedge.meshd.session import Session
from crossedge.meshd.transmit import Make
from crossedge.wire.endpoint import DirectEndpoint, Endpoint, UdpEndpoint
from crossedge.wire.record import NatVerdict

if TYPE_CHECKING:
    from crossedge.meshd.peer import MeshPeer


class Port(Protocol):
    """What a peer needs of the mesh it belongs to."""

    dropped: Counter[str]
    seal_time: float
    """Seconds from the moment that a probe names as its departure to when it is sealed, at the least."""

    def send(self, endpoint: Endpoint, datagram: bytes, ttl: int | None = None) -> None:
        """Transmit a datagram."""

    def send_late(self, endpoint: Endpoint, make: Make) -> None:
        """Transmit a datagram that is made when it leaves: it says when that was."""

    def spend(self, peer: MeshPeer, endpoint: DirectEndpoint, now: float) -> bool:
        """Pay for a packet to an endpoint that has not agreed; False (counted) where it may not go."""

    def send_ping(self, peer: MeshPeer, shot: Shot, now: float) -> None:
        """Send a sealed ping, if it can be paid for."""

    def send_volley(self, peer: MeshPeer, volley: Volley, now: float) -> None:
        """Send one sealed ping to many endpoints, as far as they can be paid for."""

    def call(
        self, peer: MeshPeer, attempt: int, now: float, fresh: Sequence[UdpEndpoint] | None = None
    ) -> bool:
        """Call the peer through every rendezvous that both know; False where there is none in reach.

        `fresh` are endpoints that were opened for this try, named instead of our candidates.
        """

    def verdict(self) -> NatVerdict:
        """Return what the NAT before us is known to be."""

    def verdict_of(self, peer: MeshPeer) -> NatVerdict:
        """Return what the NAT before a peer is known to be, by it or by who shares its public address."""

    def picture(self) -> object:
        """Return what of ourselves makes another try to punch worth it where it changes."""

    def port_step(self) -> int:
        """Return the usual distance between the ports that our NAT gives in order, not 0."""

    def take_sockets(self, peer: MeshPeer, count: int) -> tuple[int, ...]:
        """Return numbers for so many further sockets of ours; none where there are not as many left."""

    def free_sockets(self, peer: MeshPeer, kept: Collection[int]) -> None:
        """Close every further socket that the peer has, but those."""

    def scout(self, local: int, now: float) -> bool:
        """Ask a STUN server where it sees this socket; False where there is none to ask."""

    def begin_spray(self, now: float) -> float:
        """Begin a spray of ours and return `now`, or return when that may be."""

    def spray_target(self, peer: MeshPeer) -> str | None:
        """Return the peer's address of which many ports may be tried; None where that may not be."""

    def draw_ports(self, count: int, low: int, high: int) -> list[int]:
        """Return so many different random ports."""

    def rebind(self, peer: MeshPeer, now: float) -> None:
        """Bind our side of the peer's relay channels anew, and look whether our mapping moved."""

    def statement(self, now: float) -> bytes:
        """Return the plaintext that tells a peer our newest record."""

    def new_session(self, peer: MeshPeer, now: float) -> Session | None:
        """Make the peer's session; None (counted) where its key is unusable."""

    def new_hello(self, keypair: Keypair, now: float) -> HelloExchange:
        """Begin the hello of a keypair."""

    def blocklist_part(self, ask: BlocklistAsk) -> BlocklistPart | None:
        """Return a part of the blocklist that we hold."""

    def blocklist_arrived(self, peer: MeshPeer, part: BlocklistPart, now: float) -> None:
        """Take a part of a blocklist that we asked the peer for."""

    def usable(self, endpoint: Endpoint) -> bool:
        """Tell whether anything may be sent to an endpoint from here at all, on a peer's word."""

    def keepalive(self, peer: MeshPeer) -> float:
        """Return how often an idle path has to be used, in seconds, for both NATs to keep their mappings."""

    def measurement_due(self, peer: MeshPeer, now: float) -> bool:
        """Tell whether the pair should be measured while its session is there."""

    def measured(self, peer: MeshPeer, *, answered: bool) -> None:
        """Take note that a measurement of the pair has ended."""

    def tell_place(self, peer: MeshPeer, now: float) -> None:
        """Tell the peer our coordinates, if it has not heard them lately."""

    def place_heard(self, peer: MeshPeer, place: Place, now: float) -> None:
        """Take the coordinates that the peer told."""

    def touch(self, peer: MeshPeer) -> None:
        """Pump this peer soon: something happened to it outside of a call from the mesh."""

    def emit(self, event: MeshEvent) -> None:
        """Hand an event to the shell."""


class Owner(Protocol):
    """Whose session a gate shows."""

    session: Session | None

    def on_data_sent(self, now: float, size: int) -> None:
        """Note that the data path sent a batch."""

    def on_data_received(self, now: float, size: int) -> None:
        """Note that the data path opened a batch; `size` 0: nothing of it was a packet."""

    def on_rotated(self) -> None:
        """Note that another keypair is in use."""


class Gate:
    """The session as the data path sees it; it lets the peer notice traffic."""

    __slots__ = ("_owner",)

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    @property
    def current(self) -> Keypair | None:
        """The keypair to send with."""
        session = self._owner.session
        return None if session is None else session.current

    def data_sent(self, now: float, size: int) -> None:
        """Follow a batch of sealed data: `size` plaintext bytes."""
        owner = self._owner
        if owner.session is not None:
            owner.session.data_sent(now, size)
        owner.on_data_sent(now, size)

    def data_received(self, now: float, size: int, keypair: Keypair) -> None:
        """Follow a batch of opened data: `size` bytes of packets; 0: keepalives and in-session messages."""
        owner = self._owner
        session = owner.session
        if session is None:
            return
        before = session.current
        session.data_received(now, size, keypair)
        if session.current is not before:
            owner.on_rotated()
        owner.on_data_received(now, size)
