"""The way that one peer's data takes: the choice among its paths, as the data path and people hear of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from crossedge.meshd.events import LinkReady, PathChanged
from crossedge.meshd.path import Path, State
from crossedge.meshd.peerport import Port
from crossedge.wire.endpoint import Endpoint, RelayEndpoint

if TYPE_CHECKING:
    from crossedge.meshd.peer import MeshPeer

IDLE: Final = "idle"  # why the endpoints change, where nobody needs to hear of it


class Way:
    """Where one peer's data goes."""

    __slots__ = ("_peer", "_port", "_told")

    def __init__(self, peer: MeshPeer, port: Port) -> None:
        self._peer = peer
        self._port = port
        self._told: tuple[Endpoint, ...] = ()

    @property
    def direct(self) -> Path | None:
        """The direct path that data takes alone, if it does."""
        peer = self._peer
        current = peer.paths.current
        if current is None or current.relay or peer.link.endpoints != (current.endpoint,):
            return None
        return current

    def choose(self, now: float) -> None:
        """Choose again by what is proven now."""
        peer = self._peer
        if not peer.up(now):
            if peer.session is not None and peer.session.current is None:
                self.set((), 0, IDLE if peer.parting else "no session")
                peer.link.sources = frozenset(peer.paths.heard())  # of what is still on its way
            return
        lively = peer.lively(now)
        endpoints, size = peer.paths.select(now, lively=lively)
        first = peer.paths.get(endpoints[0]) if endpoints else None
        if not lively or (len(endpoints) > 1 and first is not None and first.state is State.PROVEN):
            reason = IDLE
        elif len(endpoints) > 1:
            reason = "in doubt"
        else:
            relayed = any(isinstance(endpoint, RelayEndpoint) for endpoint in endpoints)
            reason = "relayed" if relayed else "direct"
        self.set(endpoints, size, reason)
        peer.link.sources = frozenset(endpoints).union(peer.paths.heard())
        keepalive = self._port.keepalive(peer)
        for path in peer.paths.directs():  # a relay is asked as often as ever: it shows that we are in reach
            path.keepalive = keepalive

    def set(self, endpoints: tuple[Endpoint, ...], size: int, reason: str) -> None:
        """Send data to these endpoints from now on, in datagrams of `size` bytes; `reason` is for people."""
        peer = self._peer
        changed = endpoints != peer.link.endpoints
        if changed or (endpoints and size - peer.link.overhead != peer.link.datagram_size):
            peer.link.set_path(endpoints, size)
        if endpoints != self._told and (reason != IDLE or not self._told) and not peer.measuring.only:
            self._port.emit(PathChanged(peer.name, self._told, endpoints, reason))
            self._told = endpoints
        self.flush()

    def flush(self) -> None:
        """Let what waits for an endpoint go."""
        link = self._peer.link
        if link.queue and link.endpoints:
            self._port.emit(LinkReady(link))
