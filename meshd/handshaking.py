"""Which ways the handshake messages of one peer go.

An initiation goes through every relay and to every endpoint that agreed. Its copies are replays for the other
side, so the answer goes all these ways too, and a copy that arrives is answered again for a moment: else one
lost answer, or a path that works one way only, would cost a retry or never end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from crossedge.meshd.peerport import Port
from crossedge.wire.endpoint import Endpoint, RelayEndpoint

if TYPE_CHECKING:
    from crossedge.meshd.peer import MeshPeer

SPRAY_AFTER: Final = 1.0  # seconds without a relay after which handshakes go to the candidates themselves
RESPONSE_TIME: Final = 1.0  # seconds for which our answer to an initiation may be sent again
TRANSPORT: Final = 4  # first byte of a WireGuard transport message
NEVER: Final = float("-inf")


class Handshaking:
    """The handshakes with one peer."""

    __slots__ = ("_peer", "_port", "_responded", "_response", "called", "since")

    def __init__(self, peer: MeshPeer, port: Port) -> None:
        self._peer = peer
        self._port = port
        self._response = b""
        self._responded = NEVER
        self.called = False
        """Whether a rendezvous took our last call, and with it our initiation."""
        self.since = NEVER
        """When the opening of the session began, in seconds of `now`."""

    def endpoints(self, now: float) -> list[Endpoint]:
        """Return where a handshake goes.

        Where there is neither relay nor agreement and no call can help, to the endpoint that was good in an
        earlier life and to the candidates themselves, paid from the budget.
        """
        peer = self._peer
        ways: list[Endpoint] = [path.endpoint for path in peer.paths.relays()]
        ways += peer.paths.consented()
        if ways:
            return ways
        tried = [] if peer.last_good is None else [peer.last_good]
        if not self.called or now - self.since >= SPRAY_AFTER:
            tried += [endpoint for endpoint in peer.offers.candidates() if endpoint != peer.last_good]
        return [endpoint for endpoint in tried if self._port.spend(peer, endpoint, now)]

    def send(self, datagram: bytes, now: float) -> None:
        """Send what the session made: handshakes wherever they may arrive, keepalives the way data goes."""
        if datagram[0] == TRANSPORT:
            relays = tuple(path.endpoint for path in self._peer.paths.relays()[:1])
            for endpoint in self._peer.link.endpoints or relays:
                self._port.send(endpoint, datagram)
            return
        for endpoint in self.endpoints(now):
            self._port.send(endpoint, datagram)

    def try_way(self, endpoint: Endpoint, now: float) -> None:
        """Let a handshake that goes on try a new way; what a call carried already is not repeated."""
        session = self._peer.session
        if session is None:
            return
        if session.initiation is not None and not (isinstance(endpoint, RelayEndpoint) and self.called):
            self._port.send(endpoint, session.initiation)
        self.repeat(endpoint, now)

    def responded(self, response: bytes, destination: Endpoint, now: float) -> None:
        """Send our answer to the peer's initiation every way, not only back."""
        self._response, self._responded = response, now
        for endpoint in self.endpoints(now):
            if endpoint != destination:
                self._port.send(endpoint, response)

    def repeat(self, endpoint: Endpoint, now: float) -> None:
        """Send the last answer again, while it is fresh and the peer has not shown that it has it."""
        session = self._peer.session
        fresh = session is not None and session.next is not None and now - self._responded < RESPONSE_TIME
        if fresh and self._peer.sources.pays(endpoint, len(self._response)):
            self._port.send(endpoint, self._response)
