"""Handshake messages from anywhere: to the session of whoever wrote them, and what follows for that peer.

`handshakes` does what WireGuard asks for; here it is found out whose message it is, copies that came by other
ways are answered again, and responses leave, as far as the peer's paths pay for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

from crossedge.meshd.device import Device
from crossedge.meshd.directory import Peer as Member
from crossedge.meshd.handshakes import Handshakes
from crossedge.meshd.peer import MeshPeer
from crossedge.meshd.session import Session
from crossedge.meshd.staticpeer import StaticPeer
from crossedge.wire.demux import Kind
from crossedge.wire.endpoint import Endpoint

RECENT_INITIATIONS: Final = 64  # accepted ones, whose copies come by other ways


class Greeter:
    """Takes the handshake messages of one node."""

    __slots__ = (
        "_dropped",
        "_find",
        "_members",
        "_now",
        "_recent",
        "_static",
        "_touch",
        "_transmit",
        "_untried",
        "handshakes",
    )

    def __init__(
        self,
        device: Device,
        members: Mapping[bytes, MeshPeer],
        static: Mapping[bytes, StaticPeer],
        find: Callable[[bytes], Member | None],
        transmit: Callable[[Endpoint, bytes], None],
        touch: Callable[[StaticPeer], None],
        dropped: Counter[str],
    ) -> None:
        """Take the peers.

        Args:
            device: our keys and what is known of handshakes under way.
            members: peers by node id.
            static: stock peers by static key.
            find: returns the member with this static key.
            transmit: sends a datagram.
            touch: has a stock peer pumped soon.
            dropped: what was dropped, by reason.
        """
        self.handshakes = Handshakes(device, self._session_of)
        self._members = members
        self._static = static
        self._find = find
        self._transmit = transmit
        self._touch = touch
        self._dropped = dropped
        self._recent: dict[bytes, MeshPeer] = {}
        self._untried: MeshPeer | None = None
        self._now = 0.0

    def receive(self, datagram: bytes, source: Endpoint, now: float) -> None:
        """Take an initiation, a response or a cookie reply that came from `source` at `now`, in seconds."""
        self._now = now
        initiation = datagram[0] == Kind.INITIATION
        again = self._recent.get(datagram) if initiation else None
        if again is not None:
            self._dropped["repeated-initiation"] += 1
            again.sources.repeated(source, len(datagram), now)
            return
        session = self.handshakes.receive(datagram, source, now)
        untried, self._untried = self._untried, None
        if session is None and untried is not None:
            untried.refuse()  # whoever wrote it knew the member's public key and no more
        owner = None if session is None else session.owner
        if isinstance(owner, MeshPeer):
            owner.sources.handshaken(source, len(datagram), now)
            if initiation:
                if len(self._recent) >= RECENT_INITIATIONS:
                    del self._recent[next(iter(self._recent))]
                self._recent[bytes(datagram)] = owner
        elif isinstance(owner, StaticPeer):
            owner.heard(source, now)
            self._touch(owner)
        while (reply := self.handshakes.poll_transmit()) is not None:
            answer, destination = reply
            if not isinstance(owner, MeshPeer) or owner.sources.pays(destination, len(answer)):
                self._transmit(destination, answer)
            if isinstance(owner, MeshPeer) and answer[0] == Kind.RESPONSE:
                owner.handshaking.responded(answer, destination, now)

    def _session_of(self, static: bytes) -> Session | None:
        """Return the session for whoever has this static key, made if need be; None for strangers."""
        stock = self._static.get(static)
        if stock is not None:
            return stock.session
        member = self._find(static)
        peer = None if member is None else self._members.get(member.node_id)
        if peer is not None and not peer.active:
            self._untried = peer
        return None if peer is None else peer.accept(self._now)
