"""How a session ends that neither side wants: by a Bye, and so that nothing is lost that is on its way.

Who says Bye sends no more, but for a while goes on opening what comes: the other side may have begun to send
before it heard that. Its data calls the farewell off. A packet of our own makes a new handshake, since the
other side has let go by then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from crossedge.meshd.handshaking import NEVER
from crossedge.meshd.inner import Bye
from crossedge.meshd.peerport import Port

if TYPE_CHECKING:
    from crossedge.meshd.peer import MeshPeer

PARTING_TIME: Final = 2.0  # seconds after a Bye for which what is on its way is waited for


class Farewell:
    """The farewells to and of one peer."""

    __slots__ = ("_peer", "_port", "until", "why")

    def __init__(self, peer: MeshPeer, port: Port) -> None:
        self._peer = peer
        self._port = port
        self.why = ""
        """Why we have let go of the session; empty: we have not."""
        self.until = NEVER
        """When it is closed, in seconds of `now`."""

    def bid(self, why: str, now: float) -> None:
        """Let go of the session."""
        peer = self._peer
        if peer.session is None or self.why:
            return
        current = peer.session.current
        if current is not None:
            peer.talk.say(Bye(current.remote_index).encode(), now)
        peer.measuring.stop()
        peer.session.retire()
        self.why, self.until = why, now + PARTING_TIME
        self._port.touch(peer)

    def call_off(self) -> None:
        """Keep the session, or begin it anew."""
        self.why = ""

    def heard(self, index: int, now: float) -> None:
        """Let go of the session as the peer does, or where there is traffic make new keys at once.

        What we send until there are some still reaches it. `index` is that of the keypair which it gave up:
        a handshake that it began afterwards, for a packet, may have overtaken its farewell on a faster path.
        """
        peer = self._peer
        session = peer.session
        if session is None or (session.current is not None and session.current.local_index != index):
            return
        if peer.lively(now):
            session.initiate(now, urgent=True)
        elif session.next is None or now - session.next.created >= PARTING_TIME:
            peer.close("idle")
