"""The endpoints from which one peer is heard, or at which it answers, and the paths that become of them.

An endpoint that something authentic came from is worth a challenge; one that met a challenge is worth a
handshake and, with a session, a proof at full size. What anybody may have sent on from elsewhere earns no
more bytes than it brought: the path's credit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from crossedge.latency.readings import Reading
from crossedge.meshd.inner import ProbeReply
from crossedge.meshd.path import Path, State
from crossedge.meshd.peerport import Port
from crossedge.meshd.punch import Phase
from crossedge.wire.endpoint import (
    DirectEndpoint,
    Endpoint,
    RelayEndpoint,
    SocketEndpoint,
    UdpEndpoint,
    remote_of,
)

if TYPE_CHECKING:
    from crossedge.meshd.peer import MeshPeer

HEARD_TIME: Final = 10.0
"""Seconds for which a ping that came before the session makes its source worth a proof."""


class Sources:
    """What is heard of one peer, by the endpoint that it came from."""

    __slots__ = ("_peer", "_port")

    def __init__(self, peer: MeshPeer, port: Port) -> None:
        self._peer = peer
        self._port = port

    def learn_relay(self, endpoint: RelayEndpoint, now: float, *, heard: bool) -> None:
        """Take a channel that leads to the peer; `heard`: something authentic came through it."""
        peer = self._peer
        path = self._path(endpoint, now)
        if path is None:
            return
        if heard:
            path.heard(now)
        if peer.up(now):
            self._prove(path, now)
        elif not heard:
            peer.handshaking.try_way(endpoint, now)
        self._port.touch(peer)

    def pinged(self, source: DirectEndpoint, size: int, now: float) -> None:
        """Note an authentic, fresh ping from here, `size` bytes longer than its answer: challenge it."""
        peer = self._peer
        path = self._path(source, now)
        if path is None:
            return
        path.heard(now)
        path.credit += size
        peer.punch.heard(source, now, short=path.limited)
        if peer.up(now) and path.state in (State.UNPROVEN, State.LOST):
            self._prove(path, now)
        self._port.touch(peer)

    def ponged(self, endpoint: DirectEndpoint, now: float) -> None:
        """Note that the peer answered our challenge to this endpoint: it takes handshakes and proofs now."""
        peer = self._peer
        path = self._path(endpoint, now)
        if path is None:
            return
        first = not path.consented
        path.consented = True
        path.heard(now)
        if peer.up(now):
            self._prove(path, now)
            if first:
                path.nudge(now)  # what it got before was small
        elif first:
            peer.handshaking.try_way(endpoint, now)
        self._port.touch(peer)

    def handshaken(self, source: Endpoint, size: int, now: float) -> None:
        """Note an authentic handshake message. Even a response may have been sent on from elsewhere."""
        peer = self._peer
        peer.last_heard = now
        path = self._path(source, now)
        if path is not None:
            path.heard(now)
            path.credit += size
        self._port.touch(peer)

    def repeated(self, source: Endpoint, size: int, now: float) -> None:
        """Answer a copy of the peer's last initiation; whoever sent it may be anybody."""
        peer = self._peer
        path = peer.paths.get(source)
        if path is not None:
            path.credit += size
        peer.handshaking.repeat(source, now)

    def roamed(self, source: Endpoint, size: int, now: float) -> None:
        """Note that `size` bytes from an endpoint were genuine and new; where it is new it is challenged."""
        peer = self._peer
        peer.last_heard = now
        path = self._path(source, now)
        if path is None:
            return
        path.heard(now)
        path.credit += size
        if peer.up(now) and (path.state is State.UNPROVEN or (path.limited and path.state is State.LOST)):
            self._prove(path, now)
            self._port.touch(peer)

    def pays(self, endpoint: Endpoint, size: int) -> bool:
        """Tell whether an answer of so many bytes may go to an endpoint, and count them."""
        path = self._peer.paths.get(endpoint)
        if path is None or path.pays(size):
            return True
        self._port.dropped["unproven-source"] += 1
        return False

    def replied(self, reply: ProbeReply, source: Endpoint, now: float, stamp: float) -> None:
        """Take the answer to a probe."""
        peer = self._peer
        path = peer.paths.replied(reply, source, stamp, now)
        if path is None:
            self._port.dropped["unasked-probe-reply"] += 1
            return
        peer.proved_at = now
        if path.state is State.PROVEN and not path.relay:
            if isinstance(path.endpoint, UdpEndpoint):
                peer.last_good = path.endpoint
            if peer.punch.phase is not Phase.DONE:
                peer.punch.done()
                peer.later.end()

    def _path(self, endpoint: Endpoint, now: float) -> Path | None:
        """Return the path to an endpoint, a new one if it may and can be one."""
        peer = self._peer
        path = peer.paths.get(endpoint)
        if path is None and self._port.usable(endpoint):
            path = peer.paths.add(endpoint, now)
            if path is None:
                self._port.dropped["paths-full"] += 1
        if path is not None:
            if not isinstance(endpoint, RelayEndpoint):
                path.offered = remote_of(endpoint) in peer.offers
            if path.record is None:
                if peer.reading is None:
                    peer.reading = Reading()
                path.record = peer.reading.relayed if path.relay else peer.reading.direct
        return path

    def _prove(self, path: Path, now: float) -> None:
        if not self._peer.measuring.only:
            path.prove(now)

    def free_sockets(self) -> None:
        """Close the further sockets that neither a path nor a try that is going on uses."""
        peer = self._peer
        used = set(peer.later.sockets)
        for path in peer.paths:
            if isinstance(path.endpoint, SocketEndpoint):
                if path.state is State.LOST:
                    peer.paths.remove(path.endpoint)
                else:
                    used.add(path.endpoint.local)
        self._port.free_sockets(peer, used)

    def prove_all(self, now: float) -> None:
        """Prove every path that was heard, agreed to or led through a relay: the session is up."""
        peer = self._peer
        for path in peer.paths:
            recently = path.last_heard is not None and now - path.last_heard < HEARD_TIME
            if path.relay or path.consented or recently:
                if not isinstance(path.endpoint, RelayEndpoint):
                    path.offered = remote_of(path.endpoint) in peer.offers
                path.prove(now)
